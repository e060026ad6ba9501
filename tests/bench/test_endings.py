"""A benchmark that is told to end, or is killed, leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.stack


def until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "condition not met in time"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["bench/streams.py", "--streams", "20"], signal.SIGTERM),
        (["bench/streams.py", "--streams", "20"], signal.SIGKILL),
        (["bench/scheduler.py", "--only", "everysec"], signal.SIGTERM),
        (["-m", "bench.overload", "--seconds", "60"], signal.SIGTERM),
    ],
    ids=lambda value: value[-3].strip("-") if isinstance(value, list) else value.name,
)
def test_nothing_is_left(command: list[str], number: signal.Signals, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        bench = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    tree = psutil.Process(bench.pid)
    left: list[psutil.Process] = []
    try:
        until(lambda: len(tree.children(recursive=True)) >= 3 or bench.poll() is not None)
        started = tree.children(recursive=True)
        bench.send_signal(number)
        code = bench.wait(120)
        _, left = psutil.wait_procs(started, timeout=120)
    finally:
        for process in (bench, *left):
            process.kill()
    assert not left
    assert started, (tmp_path / "log").read_text()
    if number == signal.SIGTERM:
        assert code == 128 + number
        assert not list(tmp_path.glob("laps-*"))
        assert "Traceback" not in (tmp_path / "log").read_text()
