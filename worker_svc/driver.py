"""Runs the engine in a thread of its own, under leases.

The session (asyncio, gRPC) posts what the scheduler decided; this thread applies it at the
next step boundary, steps, and hands a report back. It never waits for an answer to a
report: the step credit says how far it may run ahead of what the scheduler has stored.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from laps import telemetry
from laps.v1 import worker_pb2
from worker_svc import convert
from worker_svc.engine import Engine, EngineRequest, StepResult
from worker_svc.reports import Report, Reports, Send
from worker_svc.tracing import LeaseTrace

log = structlog.get_logger()

SWITCH_SMOOTHING = 0.05
"""The least weight of the newest return to a slot in the average: some find their KV where they left it, most
have it moved, and a few wait for a core meanwhile, so a handful of them tells little."""


@dataclass(slots=True)
class _Known:
    """A request that this worker has been given in full, and what it has emitted."""

    request: EngineRequest
    output: array[int]
    """Unsigned 32-bit token ids, from the request's first output token on."""


@dataclass(slots=True)
class _Lease:
    lease_id: int
    request_id: str
    trace: LeaseTrace


@dataclass(frozen=True, slots=True)
class SessionLost:
    """Posted when the stream to the scheduler broke: every lease is void."""


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """Posted with the welcome of a new session."""

    epoch: int
    send: Send
    """Takes reports; called from the engine's thread."""
    report_interval_s: float = 0.0


Command = SessionLost | SessionOpened | worker_pb2.LeaseUpdate


@dataclass
class EngineDriver:
    """The thread, and what it knows of leases. Only the methods marked thread-safe may be
    called from elsewhere."""

    engine: Engine
    on_failure: Callable[[BaseException], None]
    """Called once, from the engine's thread, if the engine breaks."""
    _commands: queue.SimpleQueue[Command | None] = field(default_factory=queue.SimpleQueue)
    _known: dict[str, _Known] = field(default_factory=dict)
    _leases: dict[str, _Lease] = field(default_factory=dict)
    """By request: those in a slot now."""
    _reports: Reports | None = None
    """None: not in session."""
    _epoch: int = 0
    _step: int = 0
    _last_step_allowed: int = 0
    _leases_end_s: float = 0.0
    _released: list[int] = field(default_factory=list)
    _missing: list[int] = field(default_factory=list)
    _errors: list[tuple[int, str]] = field(default_factory=list)
    _finished: dict[str, int] = field(default_factory=dict)
    """Requests whose end is reported and not acknowledged yet, with the step that reported it. Their KV
    stays: a leader that dies before it has stored the end is followed by one that grants them again."""
    _resident: dict[str, tuple[int, int]] = field(default_factory=dict)
    _detached: threading.Event = field(default_factory=threading.Event)
    _idle: threading.Event = field(default_factory=threading.Event)
    _switch_s: float = 0.0
    """Seconds of one request's return to a slot: the mean of the first ones, then a moving average."""
    _switches: int = 0
    last_progress_s: float = field(default_factory=time.monotonic)
    """Monotonic instant of the last turn of the loop: a worker whose engine hangs shows here."""

    def __post_init__(self) -> None:
        self._detached.set()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- Thread-safe -------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Command) -> None:
        self._commands.put(command)

    def stop(self, timeout_s: float) -> None:
        self._commands.put(None)
        self._thread.join(timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no slot holds a request."""
        return self._idle.wait(timeout_s)

    def resident(self) -> list[worker_pb2.ResidentRequest]:
        """Requests whose KV cache is held, as of the moment when the session was lost."""
        return [
            worker_pb2.ResidentRequest(request_id=request_id, output_tokens=tokens, output_crc32=crc32)
            for request_id, (tokens, crc32) in list(self._resident.items())
        ]

    def wait_detached(self, timeout_s: float) -> bool:
        """Waits until the thread has noticed that the session is gone."""
        return self._detached.wait(timeout_s)

    # --- The thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._leases and self._may_step():
                    self._do_step()
                elif self._has_news():
                    self._tell_news()
                self.last_progress_s = time.monotonic()
        except BaseException as error:
            log.exception("engine failed")
            self.on_failure(error)

    def _take_commands(self) -> bool:
        """Applies what was posted; waits for more while there is nothing to do. False: stop."""
        while True:
            if self._leases:
                self._idle.clear()
            else:
                self._idle.set()
            idle = not (self._leases and self._may_step()) and not self._has_news()
            try:
                # A bounded wait: leases end by themselves, and progress is to be seen.
                command = self._commands.get(timeout=0.5) if idle else self._commands.get_nowait()
            except queue.Empty:
                self._end_expired_leases()
                self.last_progress_s = time.monotonic()
                if idle:
                    continue
                return True
            if command is None:
                return False
            self._apply(command)

    def _may_step(self) -> bool:
        return self._step < self._last_step_allowed and time.monotonic() < self._leases_end_s

    def _has_news(self) -> bool:
        return self._reports is not None and bool(
            self._released or self._missing or self._errors or self._reports
        )

    def _tell_news(self) -> None:
        """Without a step."""
        if self._released or self._missing or self._errors:
            self._report(self._next_report())
        if self._reports is not None:
            self._reports.flush()

    def _end_expired_leases(self) -> None:
        """The scheduler has been silent for longer than the leases last: others may run these."""
        if self._leases and time.monotonic() >= self._leases_end_s:
            log.warning("leases expired", leases=len(self._leases))
            for request_id in list(self._leases):
                self._released.append(self._leases[request_id].lease_id)
                self._leave_slot(request_id)

    def _apply(self, command: Command) -> None:
        match command:
            case SessionLost():
                self._reports = None
                for request_id in list(self._leases):
                    self._leave_slot(request_id)
                self._released, self._missing, self._errors = [], [], []
                # Whether their end is stored the next leader knows: it grants them, or says that they ended.
                self._finished = {}
                self._resident = dict(self._find_resident())
                self._detached.set()
            case SessionOpened(epoch=epoch, send=send, report_interval_s=interval_s):
                self._detached.clear()
                self._epoch, self._reports = epoch, Reports(send, interval_s)
                self._step = self._last_step_allowed = 0
            case _:
                self._apply_leases(command)

    def _apply_leases(self, update: worker_pb2.LeaseUpdate) -> None:
        if update.epoch != self._epoch or self._reports is None:
            return  # of a session that is over
        self._last_step_allowed = update.acknowledged_step + update.step_credit
        self._leases_end_s = time.monotonic() + update.lease_duration_s
        for request_id in [n for n, step in self._finished.items() if step <= update.acknowledged_step]:
            self._forget(request_id)
        for revoke in update.revokes:
            lease = self._leases.get(revoke.request_id)
            if lease is not None and revoke.lease_id in (0, lease.lease_id):
                known_order = revoke.HasField("run_order")
                self._leave_slot(
                    revoke.request_id, convert.run_order(revoke.run_order) if known_order else None
                )
            if revoke.reason == worker_pb2.REVOKE_REASON_ENDED:
                self._forget(revoke.request_id)
            if revoke.lease_id:
                self._released.append(revoke.lease_id)
        if update.grants:
            self._reports.flush()  # The next step may have a prompt in it, and be long.
        for grant in update.grants:
            self._begin(grant)

    def _begin(self, grant: worker_pb2.LeaseGrant) -> None:
        request_id = grant.request_id
        if grant.has_context:
            output = convert.unpack_tokens(grant.output_token_ids)
            self._known[request_id] = _Known(convert.engine_request(grant), output)
        elif not self._matches(grant):
            self._missing.append(grant.lease_id)
            return
        known = self._known[request_id]
        # This engine may be ahead of what was stored, beyond the end even: the stored part is what counts.
        self._finished.pop(request_id, None)
        del known.output[grant.output_tokens :]
        try:
            order = convert.run_order(grant.run_order)
            self.engine.add(convert.resumed(known.request, known.output, grant.draft_tokens, order))
        except Exception as error:  # a bad request must not take the others along
            log.exception("request refused by the engine", request_id=request_id)
            self._errors.append((grant.lease_id, f"{type(error).__name__}: {error}"))
            self._forget(request_id)
            return
        trace = LeaseTrace(grant)
        self._leases[request_id] = _Lease(grant.lease_id, request_id, trace)
        log.info(
            "lease begins",
            request_id=request_id,
            slot=grant.slot,
            output_tokens=grant.output_tokens,
            kv_kept=not grant.has_context,
            **trace.field,
        )

    def _matches(self, grant: worker_pb2.LeaseGrant) -> bool:
        """Whether what is held here began as the stored output did."""
        known = self._known.get(grant.request_id)
        if known is None or len(known.output) < grant.output_tokens:
            return False
        return zlib.crc32(known.output[: grant.output_tokens].tobytes()) == grant.output_crc32

    def _leave_slot(self, request_id: str, run_order: tuple[float, ...] | None = None) -> None:
        trace = self._leases.pop(request_id).trace
        log.info("lease ends", request_id=request_id, because="taken back", **trace.field)
        trace.end("taken back")
        self.engine.preempt(request_id, run_order)

    def _forget(self, request_id: str) -> None:
        self.engine.drop(request_id)
        self._known.pop(request_id, None)
        self._finished.pop(request_id, None)

    def _find_resident(self) -> Iterable[tuple[str, tuple[int, int]]]:
        for request_id, known in self._known.items():
            if self.engine.holds(request_id):
                yield request_id, (len(known.output), zlib.crc32(known.output.tobytes()))

    def _do_step(self) -> None:
        assert self._reports is not None
        result = self.engine.step(self._reports.send_due)
        if result.switched:
            measured_s = result.switch_s / result.switched
            self._switches += 1
            weight = max(SWITCH_SMOOTHING, 1.0 / self._switches)
            self._switch_s += weight * (measured_s - self._switch_s)
        if not result.request_ids and not self._has_news():
            return  # a chunk of prefill: nothing to tell yet
        leases = [self._leases[request_id].lease_id for request_id in result.request_ids]
        tokens, begin = result.token_ids.tolist(), 0
        for request_id, count in zip(result.request_ids, result.emitted_counts, strict=True):
            self._known[request_id].output.extend(tokens[begin : begin + count])
            begin += count
        if telemetry.tracing() is not None:
            self._trace(result)
        for request_id, finish in zip(result.request_ids, result.finish, strict=True):
            if finish is not None:
                trace = self._leases.pop(request_id).trace
                log.info("lease ends", request_id=request_id, because=finish.value, **trace.field)
                trace.end(finish.value)
                self._finished[request_id] = self._step + 1
        report = self._next_report()
        report.result, report.lease_ids = result, leases
        report.costs = convert.Costs.measured(
            self.engine.costs, self.engine.config.draft_tokens, self._switch_s
        )
        report.kv_capacity_tokens = self.engine.kv_capacity_tokens
        self._report(report)

    def _trace(self, result: StepResult) -> None:
        counts = zip(result.emitted_counts, result.drafted_counts, result.accepted_counts, strict=True)
        for request_id, (emitted, drafted, accepted) in zip(result.request_ids, counts, strict=True):
            self._leases[request_id].trace.step(int(emitted), int(drafted), int(accepted))

    def _next_report(self) -> Report:
        """With the news that there are beside a step's."""
        self._step += 1
        report = Report(
            self._epoch,
            self._step,
            released_lease_ids=self._released,
            missing_lease_ids=self._missing,
            errors=self._errors,
            evicted_request_ids=self._take_evicted(),
        )
        self._released, self._missing, self._errors = [], [], []
        return report

    def _report(self, report: Report) -> None:
        assert self._reports is not None
        self._reports.add(report)

    def _take_evicted(self) -> list[str]:
        """Requests whose KV cache the engine has given up under pressure."""
        evicted = [
            request_id
            for request_id in self._known
            if request_id not in self._leases and not self.engine.holds(request_id)
        ]
        for request_id in evicted:
            self._forget(request_id)
        return evicted
