"""A request's life in the scheduler as spans, read off what each tick has stored.

Below the gateway's span: `commit` (the acknowledgement), then `queue` and `lease` in turn, as often as the
request was preempted, and `commit` of its end. A lease's events are its commits and why it was taken away.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from laps.telemetry import Tracing, nanoseconds
from scheduler_svc.core.records import TOKEN_BYTES, Event, Request, Tick
from scheduler_svc.core.scheduler import Scheduler

if TYPE_CHECKING:
    from opentelemetry.trace import Span

MAX_OPEN_SPANS = 100_000


class RequestTraces:
    """The open spans of one term's requests, at most one each."""

    def __init__(self, tracing: Tracing, core: Scheduler, now_s: float) -> None:
        self._tracing = tracing
        self._core = core
        self._open: dict[str, Span] = {}
        for request in core.requests.values():
            self._queue(request, now_s, recovered=True)

    def stored(self, tick: Tick, decided_s: float, stored_s: float) -> None:
        """What `tick` decided, from when on it is true."""
        commit = tick.commit
        for request in commit.submitted:
            self._commit(request, "acknowledged", decided_s, stored_s)
            self._queue(request, request.arrival_s)
        for request_id, offset, token_ids in chain.from_iterable(each.rows() for each in commit.emitted):
            if (span := self._open.get(request_id)) is not None:
                tokens = len(token_ids) // TOKEN_BYTES
                span.add_event(
                    "commit",
                    {"tokens": tokens, "offset": offset, "stored_ms": (stored_s - decided_s) * 1e3},
                    nanoseconds(stored_s),
                )
        ended = {request.request_id: request for request in commit.finished}
        for event in commit.events:
            if event.request_id:
                self._event(event, ended.get(event.request_id), decided_s)
        for request in commit.finished:
            self._end(request, decided_s)
            self._commit(request, "finished", decided_s, stored_s)

    def traceparent(self, request: Request) -> str:
        """Below which a worker's spans belong: the lease's."""
        span = self._open.get(request.request_id)
        return request.spec.traceparent if span is None else self._tracing.traceparent(span)

    def close(self, now_s: float) -> None:
        """The term is over; the next leader goes on with spans of its own."""
        for span in self._open.values():
            span.set_attribute("laps.ended_by", "term")
            span.end(nanoseconds(now_s))
        self._open.clear()

    def _event(self, event: Event, ended: Request | None, now_s: float) -> None:
        request = ended or self._core.get(event.request_id)
        if request is None:
            return
        match event.kind:
            case "leased":
                self._end(request, now_s)
                self._begin("lease", request, now_s, worker_id=event.worker_id, slot=request.slot)
            case "preempted":
                if (span := self._open.get(event.request_id)) is not None:
                    span.add_event("preempted", {"because": event.detail}, nanoseconds(now_s))
                    self._queue(request, now_s)
            case "requeued":
                self._queue(request, now_s)

    def _queue(self, request: Request, at_s: float, recovered: bool = False) -> None:
        self._end(request, at_s)
        self._begin("queue", request, at_s, recovered=recovered, level=request.level)

    def _begin(self, name: str, request: Request, at_s: float, **attributes: Any) -> None:
        if request.spec.traceparent and len(self._open) < MAX_OPEN_SPANS:
            self._open[request.request_id] = self._tracing.start(
                name,
                request.spec.traceparent,
                at_s=at_s,
                request_id=request.request_id,
                epoch=self._core.epoch,
                **attributes,
            )

    def _end(self, request: Request, at_s: float) -> None:
        if (span := self._open.pop(request.request_id, None)) is not None:
            span.set_attribute("laps.output_tokens", request.output_tokens)
            span.end(nanoseconds(at_s))

    def _commit(self, request: Request, what: str, decided_s: float, stored_s: float) -> None:
        if request.spec.traceparent:
            span = self._tracing.start(
                "commit",
                request.spec.traceparent,
                at_s=decided_s,
                request_id=request.request_id,
                stores=what,
            )
            span.end(nanoseconds(stored_s))
