"""The services as processes of the simulation: schedulers, workers, gateways. Each is the product's own code
between simulated connections; a crash loses all of it, and a restart begins with what the store has.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from gateway.inference import InferenceService
from gateway.metrics import Metrics
from gateway.rpc import service_handler
from gateway.scheduler_link import SchedulerLink
from laps.history import HistoryPoint
from laps.security.principal import Quota
from laps.settings import Settings
from laps.v1 import inference_pb2, scheduler_pb2, worker_pb2
from scheduler_svc.scheduler_service import SchedulerService
from scheduler_svc.store.errors import StoreError
from scheduler_svc.term import Terms
from scheduler_svc.worker_service import WorkerService
from simulator.faults.clock import Process
from simulator.faults.handlers import Serve, streaming, unary, writing
from simulator.faults.liar import Liar
from simulator.faults.model import CONTEXT_TOKENS, END_TOKEN, VOCABULARY, FakeEngine
from worker_svc.driver import Command, EngineDriver, SessionLost
from worker_svc.reports import Report
from worker_svc.session import RefusedByScheduler, WorkerLink

if TYPE_CHECKING:
    from simulator.faults.world import World

POOL = "p"
SCHEDULER, GATEWAY = "scheduler", "gateway"
"""Addresses."""
HEARTBEAT_INTERVAL_S = 0.25


class Node:
    """A process that is started again after it has crashed."""

    kind = ""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.process = Process(name)
        self.serves: dict[str, Serve] = {}

    def start(self) -> None:
        """A new process of this name, with nothing but what is durable."""
        old = self.process
        self.process = Process(self.name)
        self.process.wall_offset_s = old.wall_offset_s
        self.serves = {}
        self.process.context.copy().run(self._begin)

    def _begin(self) -> None:
        raise NotImplementedError

    @property
    def seen(self) -> HistoryPoint:
        """The furthest that it has seen the stored history."""
        raise NotImplementedError

    async def stop(self) -> None:
        """In order, as on SIGTERM."""
        raise NotImplementedError

    def run(self, coro: Any, what: str) -> asyncio.Task[Any]:
        """A task that must not end with an exception of any other kind than it is known to end with."""

        async def guarded() -> None:
            try:
                await coro
            except Exception as error:
                self.world.history.violation = (
                    self.world.history.violation or f"{self.name}: {what} ended with {error!r}"
                )
                raise

        return self.world.loop.spawn(self.process, guarded(), f"{self.name} {what}")


class SchedulerNode(Node):
    kind = "scheduler"

    def _begin(self) -> None:
        world, knobs = self.world, self.world.knobs
        self.alarm = ""
        self.store = world.parts.store(world.server, POOL)
        self.terms = Terms(
            pool=POOL,
            store=self.store,
            policy=knobs.policy,
            core_settings=knobs.core,
            holder=self.name,
            address=self.name,
            tick_interval_s=knobs.tick_interval_s,
            leader_ttl_s=knobs.leader_ttl_s,
            gateway_grace_s=knobs.gateway_grace_s,
            on_alarm=lambda alarm: world.alarmed(self, alarm),
        )
        service = SchedulerService(self.terms)
        sessions = WorkerService(self.terms, HEARTBEAT_INTERVAL_S)
        self.serves = {
            "/laps.v1.SchedulerService/SubmitMany": streaming(service.SubmitMany),
            "/laps.v1.SchedulerService/Deliver": streaming(service.Deliver),
            "/laps.v1.WorkerService/Session": streaming(sessions.Session),
        }
        for name in ("Submit", "CancelRequest", "ReadRequest", "DescribePool"):
            self.serves[f"/laps.v1.SchedulerService/{name}"] = unary(getattr(service, name))
        self.leading = self.run(self.terms.run(), "leadership")

    async def stop(self) -> None:
        self.leading.cancel()
        await asyncio.gather(self.leading, return_exceptions=True)
        with contextlib.suppress(StoreError):
            await self.store.resign()
        self.world.crash(self)

    @property
    def seen(self) -> HistoryPoint:
        return self.store.seen


class TurnedDriver(EngineDriver):
    """The worker's driver without a thread: its turns are awaited, and a step takes virtual time."""

    def prepare(self) -> None:
        self._posted = asyncio.Event()
        self._detaching: asyncio.Future[bool] | None = None
        self._emptying: list[asyncio.Future[bool]] = []
        self.liar: Liar | None = None

    def emptied(self) -> asyncio.Future[bool]:
        """In place of `wait_idle`, which blocks a thread."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._emptying.append(done)
        return done

    def post(self, command: Command) -> None:
        super().post(command)
        self._posted.set()

    def wait_detached(self, timeout_s: float) -> Any:
        # In place of a blocked thread; the loop's `run_in_executor` knows what to do with a future.
        self._detaching = asyncio.get_running_loop().create_future()
        if self._detached.is_set():
            self._detaching.set_result(True)
        return self._detaching

    async def turn_forever(self) -> None:
        while True:
            self._take_posted()
            self._end_expired_leases()
            while not self._leases and self._emptying:
                self._emptying.pop().set_result(True)
            if self._leases and self._may_step():
                assert self._reports is not None
                self._reports.send_due()
                await asyncio.sleep(self.engine.next_step_s())  # type: ignore[attr-defined]
                self._do_step()
            elif self._has_news():
                self._tell_news()
            else:
                self._posted.clear()
                try:
                    async with asyncio.timeout(0.5):
                        await self._posted.wait()
                except TimeoutError:
                    pass

    def _report(self, report: Report) -> None:
        super()._report(report)
        if self.liar is not None and self._reports is not None:
            false = self.liar.lie(report)
            if false is not None:
                self._reports.add(false)

    def _take_posted(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            assert command is not None
            self._apply(command)
            if isinstance(command, SessionLost) and self._detaching and not self._detaching.done():
                self._detaching.set_result(True)

    @property
    def held_leases(self) -> int:
        return len(self._leases)


class WorkerNode(Node):
    kind = "worker"

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"worker-{number}")
        self.number = number

    def _begin(self) -> None:
        knobs = self.world.knobs
        self.engine = FakeEngine(knobs.slots, knobs.spare_slots, knobs.host_rows, f"{knobs.seed} {self.name}")
        self.driver = TurnedDriver(self.engine, self._broken)  # type: ignore[arg-type]
        self.driver.prepare()
        if self.number < knobs.liars:
            self.driver.liar = Liar(self.world, self.name)
        self.link = WorkerLink(SCHEDULER, self.driver, self._hello, report_interval_s=knobs.report_interval_s)
        self.run(self.driver.turn_forever(), "engine")
        self.run(self._linked(), "session")

    async def _linked(self) -> None:
        try:
            await self.link.run()
        except RefusedByScheduler:
            if self.driver.liar is None:
                raise
            # The process ends, and is started again.
            self.world.loop.at(None, self.world.loop.now_s + 0.001, self.world.crash, self)
            self.world.loop.at(None, self.world.loop.now_s + 0.5, self.world.restart, self)

    async def stop(self) -> None:
        self.link.drain()
        await self.driver.emptied()
        self.world.crash(self)

    @property
    def seen(self) -> HistoryPoint:
        return self.link.seen

    def _broken(self, error: BaseException) -> None:
        self.world.history.violated(f"{self.name}: the engine failed: {error!r}")

    def _hello(self) -> worker_pb2.WorkerHello:
        return worker_pb2.WorkerHello(
            worker_id=self.name,
            pool=POOL,
            slots=self.world.knobs.slots,
            model_fingerprint="f",
            vocabulary_size=VOCABULARY,
            context_tokens=CONTEXT_TOKENS,
            costs=worker_pb2.StepCosts(draft_token_s=0.002, verify_s=0.02),
        )


class LetterTokenizer:
    """One letter a token, one token that ends the output."""

    limits = SimpleNamespace(
        vocabulary_size=VOCABULARY, context_tokens=CONTEXT_TOKENS, eos_token_ids=frozenset({END_TOKEN})
    )
    vocabulary_size = VOCABULARY
    context_tokens = 0

    def decoder(self, before: Sequence[int] = ()) -> LetterDecoder:
        return LetterDecoder()


class LetterDecoder:
    pending = False

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)

    def push_whole(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        return ""


class WatchedLink(SchedulerLink):
    """The gateway's link; tells the history what it was acknowledged."""

    on_stored: Callable[[str], None]

    async def submit(
        self, spec: scheduler_pb2.RequestSpec, quota: Quota | None = None
    ) -> scheduler_pb2.SubmitResponse:
        answer = await super().submit(spec, quota)
        self.on_stored(spec.request_id)
        return answer


class GatewayNode(Node):
    kind = "gateway"

    def _begin(self) -> None:
        world, knobs = self.world, self.world.knobs
        settings = Settings(
            pool=POOL,
            disconnect_grace_s=knobs.disconnect_grace_s,
            max_streams=knobs.max_streams,
            default_max_tokens=64,
        )
        self.link = WatchedLink(
            SCHEDULER,
            self.name,
            max_message_bytes=1 << 22,
            stream_buffer_tokens=knobs.stream_buffer_tokens,
        )
        self.link.on_stored = world.history.acknowledged
        tokenizer: Any = LetterTokenizer()
        metrics = Metrics()
        self.inference = InferenceService(settings, tokenizer, self.link, metrics)
        descriptor = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
        handlers = service_handler(descriptor, self.inference.methods(), metrics)
        for method in descriptor.methods:
            path = f"/{descriptor.full_name}/{method.name}"
            details: Any = SimpleNamespace(method=path, invocation_metadata=())
            handler: Any = handlers.service(details)
            serve = handler.unary_stream or handler.unary_unary
            self.serves[path] = writing(serve) if method.server_streaming else unary(serve)
        self.run(self._linked(), "link")

    async def _linked(self) -> None:
        await (await self.link.start())

    async def stop(self) -> None:
        self.inference.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.inference.streams.wait_idle(), 0.5)
        self.inference.drop_streams()
        await asyncio.sleep(0.1)
        await self.link.close()
        self.world.crash(self)

    @property
    def seen(self) -> HistoryPoint:
        return self.link.seen

    @property
    def followed(self) -> int:
        return self.link.live_requests
