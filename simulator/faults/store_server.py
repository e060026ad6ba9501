"""A store's server that can be late, fail, fail after it has done its work, and come back older; and the
product's `Store` connected to it.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from redis import exceptions

from laps.history import HistoryPoint
from scheduler_svc.store.connection import OnReply, Unawaited
from scheduler_svc.store.errors import StoreError, StoreUnavailable, from_reply
from scheduler_svc.store.store import ServerInfo, Store
from simulator.faults import store_reading
from simulator.faults.clock import EPOCH_S, VirtualLoop
from simulator.faults.history import History
from simulator.faults.store_model import ALL_CHECKS, Keys, Refusal, StoreModel


class StoreServer:
    """The server and the way to it."""

    def __init__(
        self, loop: VirtualLoop, history: History, seed: int, checks: frozenset[str] = ALL_CHECKS
    ) -> None:
        self.loop = loop
        self.clock_offset_s = 0.0
        self.model = StoreModel(self.now_ms, checks)
        self.down_until_s = 0.0
        self.full_until_s = 0.0
        """Until then it refuses to write."""
        self.hangs = False
        """While down: no answer at all, rather than a refused connection."""
        self.terms = 0
        """Names them. Not a part of what is stored, so no older store gives one out again."""
        self.starts = 0
        """Counts them: what was under way to the server of before does not reach this one."""
        self.mean_latency_s = 0.001
        self.lost_share = 0.0
        """Of the calls, those that never reach the server."""
        self.fails_after_share = 0.0
        """Of the calls, those that are carried out and whose answer is lost."""
        self.late_share = 0.0
        """Of the calls, those that take seconds, sometimes longer than the caller waits."""
        self.detour_share = 0.0
        """Of the calls that change something, those that are made again in another place."""
        self.rng = random.Random(f"{seed} store")
        self.detours = random.Random(f"{seed} detours")
        self._history = history

    def now_ms(self) -> int:
        return int((EPOCH_S + self.loop.now_s + self.clock_offset_s) * 1e3)

    def down(self, for_s: float, hangs: bool) -> None:
        self.down_until_s = max(self.down_until_s, self.loop.now_s + for_s)
        self.hangs = hangs

    def copy(self) -> Keys:
        return copy.deepcopy(self.model.keys)

    def come_back_as(self, older: Keys) -> None:
        self.model.keys = older
        self.starts += 1

    @property
    def answers(self) -> bool:
        return self.loop.now_s >= self.down_until_s

    def execute(self, function: str, args: tuple[Any, ...]) -> Any:
        """Carries a call out, now."""
        if self.loop.now_s < self.full_until_s:
            raise Refusal("OOM command not allowed when used memory > 'maxmemory'")
        try:
            reply = self.model.call(function, *args)
        except Refusal as refusal:
            if str(refusal).startswith("STALE_EPOCH"):
                self._history.counts.stale_writes_refused += 1
            raise
        if function == "laps_commit":
            if reply[1]:
                self._history.committed(int(args[0]), int(args[2]), args[5], args[6])
            else:
                self._history.counts.commits_repeated += 1
        elif function == "laps_lead" and reply[0]:
            self._history.led(reply[1], str(args[0]))
        elif function in ("laps_stop", "laps_resume"):
            self._history.epoch = int(self.model.keys.leader["epoch"])
        return reply


class _Line:
    """A connection: what is sent by it arrives in its order, and is answered in its order."""

    def __init__(self) -> None:
        self.arrives_s = 0.0
        """When what was sent last arrives."""
        self.lost = False
        self.last: asyncio.Future[None] | None = None
        """Of the call that was sent last: done when nobody waits for its answer any more."""


class Caller:
    """Stands in for `connection.Caller`: when the connection is lost, with it are all that have no answer."""

    def __init__(self, server: StoreServer, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._line = _Line()
        self._unawaited = Unawaited()

    def send(self, function: str, *args: Any, on_reply: OnReply) -> None:
        self._unawaited.begin(partial(self.call, function, *args), on_reply)

    def drop(self) -> None:
        self._unawaited.cancel()

    async def call(self, function: str, *args: Any) -> Any:
        server = self._server
        if server.detour_share and server.detours.random() < server.detour_share:
            await self._detour()
        return await self._once(lambda: server.execute(function, args))

    async def _detour(self) -> None:
        """The call is refused as a whole, for the functions or the pool are elsewhere, and made again there.
        What was sent behind it comes before it then, or is lost with the connection."""
        await self._once(lambda: None)
        if self._server.detours.random() < 0.5:
            self._line.lost = True
            self._line = _Line()
        await asyncio.sleep(self._server.detours.expovariate(0.2 / self._server.mean_latency_s))

    async def _once(self, work: Callable[[], Any]) -> Any:
        line = self._line
        over: asyncio.Future[None] = self._server.loop.create_future()
        before, line.last = line.last, over
        reply, refusal = None, None
        try:
            try:
                reply = await _through(self._server, self._timeout_s, work, line)
            except StoreError as error:
                refusal = error
            except BaseException:
                line.lost = True
                raise
            if before is not None:
                await asyncio.shield(before)
            if line.lost:
                raise StoreUnavailable("the connection was lost by this call or one before it")
        finally:
            over.set_result(None)
            if line.lost and self._line is line:
                self._line = _Line()
        if refusal is not None:
            raise refusal
        return reply


class Reader:
    """Stands in for `connection.Reader`."""

    def __init__(self, server: StoreServer, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s

    async def ask(self, function: str, *args: Any, raw: bool = False) -> Any:
        keys = lambda: store_reading.ask(self._server.model.keys, function, *args)  # noqa: E731
        return await _through(self._server, self._timeout_s, keys, _Line())


async def _through(server: StoreServer, timeout_s: float, work: Any, line: _Line) -> Any:
    """To the server and back. Raises StoreUnavailable where nothing can be said about what was done."""
    loop, rng = server.loop, server.rng
    answer: asyncio.Future[Any] = loop.create_future()
    lost, fails_after, late = (
        rng.random() < share for share in (server.lost_share, server.fails_after_share, server.late_share)
    )
    there_s, back_s = (rng.expovariate(1.0 / server.mean_latency_s) for _ in range(2))
    if late:
        # May arrive when its sender has given it up and has asked again.
        there_s += rng.uniform(0.1, 2.0 * timeout_s)
    starts = server.starts
    broken = exceptions.ConnectionError("Connection reset by peer")

    def settle(result: Any, error: BaseException | None) -> None:
        if not answer.done():
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

    def arrive() -> None:
        if not server.answers:
            if not server.hangs:
                loop.at(None, loop.now_s + back_s, settle, None, broken)
            return
        if lost or server.starts != starts:
            loop.at(None, loop.now_s + back_s, settle, None, broken)
            return
        error: BaseException | None = None
        result = None
        try:
            result = work()
        except Refusal as refusal:
            error = from_reply(str(refusal))
        if fails_after:
            result, error = None, broken
        loop.at(None, loop.now_s + back_s, settle, result, error)

    line.arrives_s = max(line.arrives_s, loop.now_s + there_s)
    loop.at(None, line.arrives_s, arrive)
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except StoreError:
        raise
    except (TimeoutError, exceptions.RedisError) as error:
        line.lost = True
        raise StoreUnavailable(f"the store does not answer: {error}") from error


class SimulatedStore(Store):
    """The product's store; only its connections are others."""

    def __init__(self, server: StoreServer, pool: str, timeout_s: float = 5.0) -> None:
        self.pool = pool
        self._url = "simulated"
        self._timeout_s = timeout_s
        self.reader = Reader(server, timeout_s)  # type: ignore[assignment]
        self._commits = Caller(server, timeout_s)  # type: ignore[assignment]
        self._terms = Caller(server, timeout_s)  # type: ignore[assignment]
        self._holder = ""
        self._ttl_s = 0.0
        self._packer = None
        self._server = server
        self.seen = HistoryPoint()

    def _new_term(self) -> str:
        self._server.terms += 1
        return f"term-{self._server.terms}"

    async def connect(self) -> ServerInfo:
        await self.reader.ask("laps_read", "", 0, 0, 0)
        return ServerInfo("simulated", [])

    async def load_functions(self) -> None:
        return None

    async def close(self) -> None:
        return None
