"""A call in progress, by gRPC or by HTTP: what both have in common, one access line, metrics.

Handlers raise LapsError and never touch a status.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import Message

from gateway.metrics import Metrics
from laps import telemetry
from laps.errors import Internal, LapsError, Reason, Unavailable, from_rpc_error
from laps.logs import bind_context, get_logger
from laps.security.principal import Principal, caller
from laps.telemetry import Tracing, given_context

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SHUTDOWN_RETRY_AFTER_S = 1.0

log = get_logger()


class Call(ABC):
    """One call in progress. `fields` go into its access line."""

    def __init__(self, method: str, metadata: Iterable[tuple[str, Any]] = ()) -> None:
        self.method = method
        self.traceparent, self.tracestate = given_context(metadata)
        """The trace that the call belongs to: the client's, below which ours goes on. Empty: none."""
        self.began_s = time.monotonic()
        self.caller: Principal = caller()
        self.fields: dict[str, Any] = {}
        self.output_tokens = 0
        """Sent so far."""
        if self.caller.tenant:
            self.fields["tenant"] = self.caller.tenant

    @abstractmethod
    async def accepted(self, request_id: str, before: Sequence[int]) -> None:
        """Tells the client, before any token, that its request is stored. `before`: the prompt's last tokens,
        as many as it takes to decode the output."""

    @abstractmethod
    async def write(self, message: Message) -> None:
        """Sends one message of a stream; waits while the client does not read. The message is the caller's
        again, to be changed, when this returns."""

    @abstractmethod
    def time_left_s(self) -> float | None:
        """What the call's own deadline leaves; None: it has none."""

    def deadline_s(self) -> float:
        """The call's own deadline in seconds since the epoch; 0: it has none."""
        left_s = self.time_left_s()
        return 0.0 if left_s is None else time.time() + left_s


Handler = Callable[[Any, Call], Awaitable[Any]]
"""Takes the request; returns the response, or (streams) writes responses to the call."""


@contextmanager
def accounted(call: Call, metrics: Metrics) -> Iterator[Callable[[str], None]]:
    """Logs and counts the call. What it gives takes the status of one that failed."""
    code = "OK"

    def outcome(status: str) -> None:
        nonlocal code
        code = status

    tracing, span = telemetry.tracing(), None
    if tracing is not None:
        span = tracing.start(call.method, call.traceparent, state=call.tracestate, kind="server")
        call.traceparent = tracing.traceparent(span)
    with bind_context(trace_id=telemetry.trace_id(call.traceparent)):
        try:
            yield outcome
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        finally:
            took_s = time.monotonic() - call.began_s
            if call.output_tokens:
                call.fields["output_tokens"] = call.output_tokens
            metrics.calls.labels(call.method, code).inc()
            metrics.call_seconds.labels(call.method).observe(took_s)
            log.info("call", method=call.method, code=code, duration_ms=round(took_s * 1e3, 1), **call.fields)
            if tracing is not None and span is not None:
                _end(tracing, span, code, call.fields)


def _end(tracing: Tracing, span: Span, code: str, fields: Mapping[str, Any]) -> None:
    span.set_attribute("rpc.grpc.status", code)
    span.set_attributes({f"laps.{name}": value for name, value in fields.items()})
    if code != "OK":
        tracing.failed(span, code)
    span.end()


def shutting_down() -> Unavailable:
    """For calls that would last, once the gateway is being stopped."""
    return Unavailable(
        "the gateway is being stopped; resume through another one",
        reason=Reason.SHUTTING_DOWN,
        retry_after_s=SHUTDOWN_RETRY_AFTER_S,
    )


def as_laps_error(error: Exception, call: Call) -> LapsError:
    """The error as its client may see it; a defect goes into the log and no further."""
    if isinstance(error, LapsError):
        return call.caller.shown_error(error)
    if isinstance(error, grpc.RpcError):
        return call.caller.shown_error(from_rpc_error(error))
    log.error("call failed", method=call.method, exc_info=error, **call.fields)
    return Internal("the gateway has a defect; its log has the details")
