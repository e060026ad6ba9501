"""A call in progress, by gRPC or by HTTP: what both have in common, one access line, metrics.

Handlers raise LapsError and never touch a status.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from gateway.metrics import Metrics
from laps.errors import Internal, LapsError, from_rpc_error
from laps.logs import get_logger
from laps.security.principal import Principal, caller

log = get_logger()


class Call(ABC):
    """One call in progress. `fields` go into its access line."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.began_s = time.monotonic()
        self.caller: Principal = caller()
        self.fields: dict[str, Any] = {}
        if self.caller.tenant:
            self.fields["tenant"] = self.caller.tenant

    @abstractmethod
    async def accepted(self, request_id: str) -> None:
        """Tells the client, before any token, that its request is stored."""

    @abstractmethod
    async def write(self, message: Message) -> None:
        """Sends one message of a stream; waits while the client does not read."""

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

    try:
        yield outcome
    except asyncio.CancelledError:
        code = "CANCELLED"
        raise
    finally:
        took_s = time.monotonic() - call.began_s
        metrics.calls.labels(call.method, code).inc()
        metrics.call_seconds.labels(call.method).observe(took_s)
        log.info("call", method=call.method, code=code, duration_ms=round(took_s * 1e3, 1), **call.fields)


def as_laps_error(error: Exception, call: Call) -> LapsError:
    """The error as its client may see it; a defect goes into the log and no further."""
    if isinstance(error, LapsError):
        return call.caller.shown_error(error)
    if isinstance(error, grpc.RpcError):
        return call.caller.shown_error(from_rpc_error(error))
    log.error("call failed", method=call.method, exc_info=error, **call.fields)
    return Internal("the gateway has a defect; its log has the details")
