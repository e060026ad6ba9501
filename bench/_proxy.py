"""A TCP connection between two processes that can be cut: nothing passes and nobody is told."""

from __future__ import annotations

import asyncio
import contextlib

CHUNK_BYTES = 1 << 16


class Link:
    """Listens on `port` and passes everything on to `target_port`, while it is not cut. `ends` are the names
    of the processes at its two ends. With another `target_port` new connections lead there, and the old ones
    stay where they are."""

    def __init__(self, port: int, target_port: int, ends: tuple[str, str]) -> None:
        self.port = port
        self.ends = ends
        self.target_port = target_port
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def cut(self) -> None:
        """What is sent from now on waits; who connects gets no answer."""
        self._open.clear()

    def heal(self, reset: bool) -> None:
        """What waits goes on, or (`reset`) all connections break and new ones are taken."""
        if reset:
            for writer in list(self._writers):
                writer.transport.abort()
        self._open.set()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.heal(reset=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._open.wait()
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(there_writer)
        passing = [
            asyncio.ensure_future(self._pass_on(reader, there_writer)),
            asyncio.ensure_future(self._pass_on(there_reader, writer)),
        ]
        await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        # The end of a connection is a message too: it does not pass a cut.
        with contextlib.suppress(asyncio.CancelledError):
            await self._open.wait()
        for task in passing:
            task.cancel()
        for each in (writer, there_writer):
            each.transport.abort()
            self._writers.discard(each)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
