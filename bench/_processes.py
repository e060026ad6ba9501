"""Processes that a benchmark starts, what they cost, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from laps import launcher

BENCH = Path(__file__).parent
READY_TIMEOUT_S = 60.0


def end_on_sigterm() -> None:
    """SIGTERM ends the benchmark as Ctrl-C does: what it has started and written aside goes with it."""

    def end(number: int, _frame: object) -> None:
        # A second one does not wait for that.
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def bound_to_us(command: list[str]) -> list[str]:
    """The command line of a process that ends with this one, however this one ends."""
    return [command[0], "-I", "-S", str(launcher.__file__), str(os.getpid()), *command]


def cores_apart() -> tuple[frozenset[int], frozenset[int]]:
    """One core for what is measured and the others for the rest; all for both where there is only one."""
    first, *others = sorted(os.sched_getaffinity(0))
    return frozenset({first}), frozenset(others or {first})


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """What is started inside runs on these alone; none: wherever there is room."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Process:
    """A process whose output goes to a file, or that answers commands on its standard streams.

    It ends with us.
    """

    def __init__(
        self,
        argv: list[str],
        log: IO[bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        talks: bool = False,
    ) -> None:
        pipe = subprocess.PIPE if talks else None
        self.process = subprocess.Popen(
            bound_to_us([sys.executable, *argv]),
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or log,
            stderr=log,
        )
        self.usage = Usage(self.process.pid)
        self._log = Path(log.name)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command, one answer."""
        self.tell(do, **arguments)
        return self.answer()

    def tell(self, do: str, **arguments: Any) -> None:
        """A command whose `answer` is fetched later."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} has ended:\n{self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()


class Usage:
    """What a process has used."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    @property
    def cpu_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    @property
    def rss_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    @property
    def open_files(self) -> int:
        return int(self._process.num_fds())


@contextmanager
def measured_cpu(processes: Mapping[str, Usage]) -> Iterator[dict[str, float]]:
    """CPU seconds of each process in the block, by name; filled in at its end."""
    before = {name: usage.cpu_s for name, usage in processes.items()}
    spent: dict[str, float] = {}
    yield spent
    spent.update({name: usage.cpu_s - before[name] for name, usage in processes.items()})


def wait_for(log: Path, words: str, process: Process, *, times: int = 1) -> None:
    """Until the log has lines with these words, so many."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    found, rest = 0, ""
    with log.open(errors="replace") as lines:
        # Only what is new is read: of a log of many megabytes a look at all of it would take a core away from
        # the very process that is waited for.
        while True:
            *whole, rest = (rest + lines.read()).split("\n")
            found += sum(words in line for line in whole)
            if found >= times:
                return
            if process.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"no {words!r} in {log}:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.005)
