"""Five times the capacity, at its short setting: what is admitted is served, the rest is told when to come
back, memory stays flat, and who does not read harms nobody. Latencies are for the long setting to judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(600)
def test_overload(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench.overload", "--seconds", "3", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert figures["5x"]["refused"] > 0
    assert figures["5x"]["admitted"] + figures["5x"]["refused"] == figures["5x"]["offered"]
    assert figures["latency_ratio"]["p50"] > 0
    assert figures["slow_reader_tokens"] == 600
