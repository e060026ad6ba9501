"""One call between two processes: its two directions, and how each side holds it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from simulator.faults.clock import Process

if TYPE_CHECKING:
    from simulator.faults.network import Network

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class Abort(Exception):
    """What `context.abort` raises in a handler."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        super().__init__(details)
        self.code, self.details, self.trailing = code, details, trailing


def rpc_error(code: grpc.StatusCode, details: str, trailing: Any = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details, None)


class Pipe:
    """One direction of a call."""

    def __init__(self, call: Exchange, reader: Process) -> None:
        self.call = call
        self.reader = reader
        self.items: deque[Any] = deque()
        self.under_way = 0
        self.cut = False
        self.end: BaseException | None = None
        self.ended = False
        self._last_s = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._senders: deque[asyncio.Future[None]] = deque()

    def send(self, kind: str, item: Any) -> None:
        """Puts something on its way: an item, or the end of the stream."""
        if self.cut:
            return
        network = self.call.network
        self._last_s = max(self._last_s, network.loop.now_s + network.latency_s(self.call))
        self.under_way += 1
        network.loop.at(self.reader, self._last_s, self._arrive, kind, item)

    async def send_in_window(self, item: Any) -> None:
        while (
            self.under_way + len(self.items) >= self.call.network.window_messages
            and not self.cut
            and not self.ended
        ):
            room = self.call.network.loop.create_future()
            self._senders.append(room)
            await room
        self.send("item", item)

    def _arrive(self, kind: str, item: Any) -> None:
        self.under_way -= 1
        if self.cut or self.ended:
            return
        if kind == "item":
            self.items.append(item)
            self.wake()
        else:
            self.finish(item)

    def finish(self, error: BaseException | None) -> None:
        if not self.ended:
            self.ended, self.end = True, error
            self.wake()
            self._room()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _room(self) -> None:
        while self._senders:
            sender = self._senders.popleft()
            if not sender.done():
                sender.set_result(None)

    async def read(self) -> Any:
        """The next item, EOF, or raises how the stream ended."""
        while True:
            if self.items:
                item = self.items.popleft()
                self._room()
                return item
            if self.ended:
                if self.end is not None:
                    raise self.end
                return EOF
            self._waiter = self.call.network.loop.create_future()
            await self._waiter


class Exchange:
    """One call between two processes."""

    def __init__(self, network: Network, client: Process, server: Process, path: str) -> None:
        self.network = network
        self.client, self.server, self.path = client, server, path
        self.up = Pipe(self, server)
        self.down = Pipe(self, client)
        self.handler: asyncio.Task[Any] | None = None
        self.over = False

    def close(self) -> None:
        self.over = True
        self.network.exchanges.pop(self, None)

    def break_for_server(self) -> None:
        """The transport is gone: gRPC cancels the handler."""
        self.up.finish(asyncio.CancelledError())
        self.down.cut = True
        self.down._room()
        if self.handler is not None:
            self.handler.cancel()
        self.close()


class ServerContext:
    """What a handler sees of its call."""

    def __init__(self, exchange: Exchange, deadline_s: float | None) -> None:
        self._exchange = exchange
        self._deadline_s = deadline_s

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        raise Abort(code, details, trailing_metadata)

    async def read(self) -> Any:
        return await self._exchange.up.read()

    async def write(self, message: Any) -> None:
        # gRPC packs it at once: its sender may change it afterwards.
        packed = type(message)()
        packed.CopyFrom(message)
        await self._exchange.down.send_in_window(packed)

    async def send_initial_metadata(self, metadata: Any) -> None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> float | None:
        return (
            None
            if self._deadline_s is None
            else max(0.0, self._deadline_s - self._exchange.network.loop.now_s)
        )


class ClientCall:
    """A stream as the client holds it; the part of grpc.aio's call that our clients use."""

    def __init__(self, exchange: Exchange, deadline_s: float | None) -> None:
        self._exchange = exchange
        if deadline_s is not None:
            exchange.network.loop.at(exchange.client, deadline_s, self._expire)

    async def write(self, message: Any) -> None:
        if self._exchange.down.ended:
            raise asyncio.InvalidStateError("RPC already finished.")
        await self._exchange.up.send_in_window(message)

    async def read(self) -> Any:
        return await self._exchange.down.read()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not EOF:
            yield message

    def cancel(self) -> bool:
        return self._stop(asyncio.CancelledError())

    def _expire(self) -> None:
        self._stop(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _stop(self, error: BaseException) -> bool:
        exchange = self._exchange
        if exchange.over or exchange.down.ended:
            return False
        exchange.down.finish(error)
        exchange.network.tell_server(exchange)
        return True
