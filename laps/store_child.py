"""The built-in store as a child of the stack."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import deque
from contextlib import suppress
from pathlib import Path

from laps import last_words
from laps.child import FIRST_BACKOFF_S, MAX_BACKOFF_S
from laps.errors import LocalError
from laps.logs import get_logger

_LOOK_INTERVAL_S = 0.1
_ROOM_INTERVAL_S = 0.5
_LEAST_FREE_BYTES = 1 << 20


class StoreChild:
    """A `LocalServer` with the interface of `Child`: started again, with its data, when it dies.

    The server starts in the loop's own thread and not in a helper thread, with which it would end.
    """

    name = "store"

    def __init__(self, data_dir: Path, port: int) -> None:
        # The only place where the shared package reaches for a service's: nobody else starts a store.
        from scheduler_svc.store.server import LocalServer

        self._server = LocalServer(port=port, data_dir=data_dir)
        self.starts = 0
        self._keeping: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def log_path(self) -> Path:
        return self._server.log_path

    @property
    def pid(self) -> int | None:
        return self._server.pid or None

    async def start(self) -> None:
        self._start_server()
        self._keeping = asyncio.create_task(self._keep(), name="child store")

    async def stop(self, grace_s: float) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        await asyncio.to_thread(self._server.stop)

    def signal(self, number: int) -> None:
        if self._server.pid:
            with suppress(ProcessLookupError):
                os.kill(self._server.pid, number)

    def _start_server(self) -> None:
        from scheduler_svc.store.server import ServerFailed

        try:
            self._server.start()
        except (ServerFailed, OSError) as error:
            raise LocalError(f"the built-in store does not start: {error}") from None
        self.starts += 1

    async def _keep(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            if not self._ended():
                continue
            get_logger().warning(
                "ended, starting it again", child="store", because=self._reason(), log=str(self.log_path)
            )
            # Takes note of the end.
            self._server.kill()
            await self._until_room()
            try:
                self._start_server()
                backoff_s = FIRST_BACKOFF_S
            except LocalError as error:
                get_logger().error("does not start", child="store", error=str(error), backoff_s=backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _until_room(self) -> None:
        """A store that cannot write ends at once, again and again. What is on its disk is whole meanwhile."""
        if disk_is_full(folder := self.log_path.parent):
            why = f"the disk of {folder} is full: free some space"
            get_logger().error("waits for room", child="store", error=why)
            while disk_is_full(folder):  # noqa: ASYNC110  (nothing tells when a disk has room again)
                await asyncio.sleep(_ROOM_INTERVAL_S)
            get_logger().warning("there is room again, starting it", child="store")

    def _reason(self) -> str:
        with suppress(OSError), self.log_path.open(errors="replace") as log:
            return last_words.explain(list(deque(log, 1)))
        return ""

    def _ended(self) -> bool:
        if not self._server.pid:
            return True
        try:
            # Asks without reaping: that is the server object's.
            return os.waitid(os.P_PID, self._server.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True


def disk_is_full(folder: Path) -> bool:
    """Whether hardly anything more can be written into a folder."""
    return shutil.disk_usage(folder).free < _LEAST_FREE_BYTES
