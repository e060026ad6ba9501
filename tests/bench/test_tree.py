"""What `--tree` promises: the scheduler of that tree runs, wherever the benchmark is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_scheduler_comes_from_the_tree(tmp_path: Path) -> None:
    package = tmp_path / "laps"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text('raise SystemExit("this is the other tree")\n')
    argv = [sys.executable, "bench/scheduler.py", "--only", "everysec", "--tree", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "this is the other tree" in done.stdout + done.stderr
