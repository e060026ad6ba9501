"""What the Makefile would do, by its dry run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def commands(*arguments: str) -> list[str]:
    # Not as the `make` above these tests was called.
    given = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "PYTHON", "PIP_ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in given}
    made = subprocess.run(
        ["make", "--no-print-directory", "--always-make", "--dry-run", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return made.stdout.splitlines()


def test_only_torch_is_looked_for_where_the_arguments_for_pip_point() -> None:
    """An index of torch alone has none of the other packages."""
    lines = commands("PIP_ARGS=--index-url https://torch.example", "setup", "fuzz", "peers")
    installs = [line for line in lines if "pip install" in line]
    assert {"requirements/run.txt", "requirements/fuzz.txt"} <= set(" ".join(installs).split())
    assert sum("https://torch.example" in line for line in installs) == 2, "ours, and the one beside vLLM"
    for line in installs:
        assert ("https://torch.example" in line) == ("grep '^torch=='" in line), line


def test_clean_removes_every_folder_that_git_ignores_at_the_root() -> None:
    (removed,) = (set(line.split()) for line in commands("clean"))
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    ours = {name for name in ignored if name.startswith(".")} | {"scheduler_svc/compiled/built"}
    assert ours <= removed
