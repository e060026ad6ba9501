"""One child process: started again when it dies, stopped in order, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from laps import last_words
from laps.logs import get_logger

_LAUNCHER = str(Path(__file__).with_name("launcher.py"))
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
_LAST_LINES = 20
"""Of a log, in which the last trouble is looked for."""
HEALTHY_AFTER_S = 10.0
"""A child that ran this long begins with the first backoff again."""


async def _always() -> bool:
    return True


@dataclass(frozen=True)
class ChildSpec:
    """What to run. `is_ready` says whether it does its work."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    is_ready: Callable[[], Awaitable[bool]] = _always


class Child:
    """Runs a command until `stop`. Use it in the thread that lives longest: a child ends with its thread."""

    def __init__(self, spec: ChildSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.starts = 0
        self.ends_for_good = False
        """An exit code above 0 is the end: it is not started again. For a start that somebody watches."""
        self.exit_code: int | None = None
        """Of the last run: negative is a signal."""
        self.ended_with = ""
        """Why its last run ended, as far as its log tells. See `last_words`."""
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._stopping = False
        self._log_start_bytes = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        """None between two runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process is not None else None

    async def start(self) -> None:
        await self._spawn()
        self._keeping = asyncio.create_task(self._keep(), name=f"child {self.name}")

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s` seconds. Returns when it is gone."""
        self._stopping = True
        if self._keeping is not None:
            if self.pid is None:
                self._keeping.cancel()
            else:
                self.signal(signal.SIGTERM)
            done, _ = await asyncio.wait([self._keeping], timeout=grace_s)
            if not done:
                get_logger().warning("does not stop, killing it", child=self.name, grace_s=grace_s)
                self._kill_group()
                await asyncio.wait([self._keeping])

    def signal(self, number: int) -> None:
        """Sends a signal to the present process, if there is one."""
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def last_words(self) -> str:
        """The last trouble that its present run has logged, in one line; empty: none."""
        return last_words.explain(self._last_lines())

    def _last_lines(self) -> list[str]:
        try:
            with self.log_path.open(errors="replace") as log:
                # Behind its end: it has been emptied since, see log_files.
                if self._log_start_bytes <= self.log_path.stat().st_size:
                    log.seek(self._log_start_bytes)
                return list(deque(log, _LAST_LINES))
        except OSError:
            return []

    async def _spawn(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        launch = [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), *self.spec.argv]
        with self.log_path.open("ab") as log:
            self._log_start_bytes = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *launch,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.spec.env},
                # Ctrl-C in a terminal goes to the supervisor alone, which knows the right order.
                start_new_session=True,
            )
        self.starts += 1

    async def _keep(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            assert self._process is not None
            began_s = time.monotonic()
            code = await self._process.wait()
            # One that was told to end, or was killed, has said nothing of it: its last trouble was another.
            self.exit_code, self.ended_with = code, self.last_words() if code > 0 else ""
            self._kill_group()
            if self._stopping or (self.ends_for_good and code > 0):
                return
            if time.monotonic() - began_s > HEALTHY_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            get_logger().warning(
                "ended, starting it again",
                child=self.name,
                how=last_words.describe_exit(code),
                because=self.ended_with,
                backoff_s=backoff_s,
                log=str(self.log_path),
            )
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
            await self._spawn()

    def _kill_group(self) -> None:
        """The process and whatever it started and did not end."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
