"""A simulated wire with the promises of gRPC, and no others.

A stream's messages arrive in order and each at most once; late, at any distance, or not at all because the
stream broke. What was under way when it broke is lost from some message on, never in the middle. A unary
call that fails may have been carried out. Between two streams nothing is ordered. Who is silent
because it is frozen, and who because the way to it is cut, cannot be told apart.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import grpc

from simulator.faults.clock import Process, VirtualLoop, current_process
from simulator.faults.handlers import Serve
from simulator.faults.wire import UNAVAILABLE, Abort, ClientCall, Exchange, ServerContext, rpc_error


class Channel:
    """A client's way to whoever serves an address when a call is made."""

    def __init__(self, network: Network, address: str) -> None:
        self._network, self._address = network, address

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        return None

    def unary_unary(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        async def call(request: Any, timeout: float | None = None, metadata: Any = None) -> Any:
            loop = self._network.loop
            deadline_s = None if timeout is None else loop.now_s + timeout
            stream = self._network.open(self._address, path, deadline_s)
            stream._exchange.up.send("item", request)
            try:
                return await stream.read()
            finally:
                stream.cancel()

        return call

    def unary_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None = None, metadata: Any = None) -> ClientCall:
            loop = self._network.loop
            deadline_s = None if timeout is None else loop.now_s + timeout
            stream = self._network.open(self._address, path, deadline_s)
            stream._exchange.up.send("item", request)
            return stream

        return call

    def stream_stream(self, path: str, *_: Any, **__: Any) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> ClientCall:
            return self._network.open(self._address, path, None)

        return call


class Network:
    """All calls that are open, and what is wrong with the ways between processes."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.loop = loop
        self.exchanges: dict[Exchange, None] = {}
        self.closed = False
        self.mean_latency_s = 0.001
        self.slow_share = 0.0
        """Of the messages, those that take a hundred times as long."""
        self.window_messages = 64
        """Messages of a stream that were sent and not read yet; whoever sends more waits."""
        self.resolve: Callable[[str, random.Random], tuple[Process, Serve] | None] = lambda address, rng: None
        self._seed = seed
        self._links: dict[tuple[str, str], random.Random] = {}
        self._cuts: dict[tuple[str, str], float] = {}
        """Pairs of processes between which nothing passes, and until when."""

    def rng(self, a: str, b: str) -> random.Random:
        """Chance of its own for every link: what happens on one does not change what happens on another."""
        found = self._links.get((a, b))
        if found is None:
            found = self._links[a, b] = random.Random(f"{self._seed} {a} {b}")
        return found

    def latency_s(self, call: Exchange) -> float:
        rng = self.rng(call.client.name, call.server.name)
        latency_s = rng.expovariate(1.0 / self.mean_latency_s) + 0.00005
        if self.slow_share and rng.random() < self.slow_share:
            latency_s *= 100.0
        until_s = self._cuts.get(_pair(call.client, call.server), 0.0)
        # What is sent into a cut is sent again by TCP once the way is open.
        return max(latency_s, until_s - self.loop.now_s + latency_s)

    # --- Calls --------------------------------------------------------------------------------

    def open(self, address: str, path: str, deadline_s: float | None) -> ClientCall:
        client = current_process()
        assert client is not None
        found = None if self.closed else self.resolve(address, self.rng(client.name, address))
        nobody = Process("nobody")
        server, serve = found if found is not None else (nobody, None)
        exchange = Exchange(self, client, server, path)
        call = ClientCall(exchange, deadline_s)
        if serve is None or not server.alive:
            exchange.up.cut = True
            exchange.over = True
            refused = rpc_error(UNAVAILABLE, f"failed to connect to {address}")
            self.loop.at(client, self.loop.now_s + 0.001, exchange.down.finish, refused)
            return call
        self.exchanges[exchange] = None
        self.loop.at(
            server, self.loop.now_s + self.latency_s(exchange), self._begin, exchange, serve, deadline_s
        )
        return call

    def _begin(self, exchange: Exchange, serve: Serve, deadline_s: float | None) -> None:
        if exchange.over:
            return
        context = ServerContext(exchange, deadline_s)
        exchange.handler = self.loop.spawn(
            exchange.server, self._handle(exchange, serve, context), f"{exchange.server.name} {exchange.path}"
        )

    async def _handle(self, exchange: Exchange, serve: Serve, context: ServerContext) -> None:
        error: BaseException | None = None
        try:
            await serve(exchange, context)
        except Abort as abort:
            error = rpc_error(abort.code, abort.details, abort.trailing)
        except asyncio.CancelledError:
            error = rpc_error(grpc.StatusCode.CANCELLED, "the handler was cancelled")
        except Exception as unexpected:
            self.loop.errors.append(f"{exchange.server.name}: {exchange.path} raised {unexpected!r}")
            error = rpc_error(grpc.StatusCode.UNKNOWN, repr(unexpected))
        exchange.down.send("end", error)
        exchange.close()

    def tell_server(self, exchange: Exchange) -> None:
        """The client has left the call."""
        exchange.up.cut = True
        if not exchange.over:
            late_s = self.latency_s(exchange)
            self.loop.at(exchange.server, self.loop.now_s + late_s, self._left, exchange)

    @staticmethod
    def _left(exchange: Exchange) -> None:
        if not exchange.over:
            exchange.break_for_server()

    # --- Faults -------------------------------------------------------------------------------

    def between(self, a: Process, b: Process | None = None) -> list[Exchange]:
        return [
            e
            for e in self.exchanges
            if (e.client is a and b in (None, e.server)) or (e.server is a and b in (None, e.client))
        ]

    def break_links(self, a: Process, b: Process | None, late_s: Callable[[], float]) -> int:
        """Every call between two processes breaks (b None: all calls of a); each side hears of it at its own
        time. Returns how many."""
        broken = self.between(a, b)
        for exchange in broken:
            self.loop.at(exchange.client, self.loop.now_s + late_s(), self._break_client, exchange)
            self.loop.at(exchange.server, self.loop.now_s + late_s(), self._left_late, exchange)
            # What was sent after the break does not arrive.
            exchange.up.cut = exchange.down.cut = True
        return len(broken)

    def _break_client(self, exchange: Exchange) -> None:
        exchange.down.finish(rpc_error(UNAVAILABLE, "Socket closed"))
        exchange.up._room()
        exchange.close()

    def _left_late(self, exchange: Exchange) -> None:
        exchange.up.finish(asyncio.CancelledError())
        exchange.down._room()
        if exchange.handler is not None:
            exchange.handler.cancel()
        exchange.close()

    def heal(self) -> None:
        self._cuts.clear()
        self.slow_share = 0.0

    def cut(self, a: Process, b: Process, until_s: float) -> None:
        """Nothing passes between two processes until then; nobody is told."""
        self._cuts[_pair(a, b)] = until_s


def _pair(a: Process, b: Process) -> tuple[str, str]:
    return (a.name, b.name) if a.name < b.name else (b.name, a.name)
