"""What every call has in common: parsing, errors as statuses with details, one access line, metrics.

Handlers raise LapsError and never touch a status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from gateway.metrics import Metrics
from gateway.streams import Limit
from gateway.wire import find_fault
from laps.errors import Internal, InvalidArgument, LapsError, Reason, ResourceExhausted, abort, from_rpc_error
from laps.logs import get_logger

log = get_logger()

MAX_UNARY_CALLS = 1000
"""Unary calls at a time: while the scheduler is away they wait for it."""
RETRY_AFTER_S = 1.0


class Call:
    """One call in progress. `fields` go into its access line."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
        self.context = context
        self.method = method
        self.began_s = time.monotonic()
        self.fields: dict[str, Any] = {}

    async def write(self, message: Message) -> None:
        """Sends one message of a stream; waits while the client's window is full."""
        await self.context.write(message)

    def time_left_s(self) -> float | None:
        """What the call's own deadline leaves; None: it has none."""
        return self.context.time_remaining()

    def deadline_s(self) -> float:
        """The call's own deadline in seconds since the epoch; 0: it has none."""
        left_s = self.time_left_s()
        return 0.0 if left_s is None else time.time() + left_s


Handler = Callable[[Any, Call], Awaitable[Any]]
"""Takes the request; returns the response, or (streams) writes responses to the call."""


class _Malformed:
    """Stands for a request that could not be parsed, so that the handler's side can say why."""

    def __init__(self, data: bytes, expected: Descriptor) -> None:
        self.field, self.reason = find_fault(data, expected)


def service_handler(
    service: ServiceDescriptor, methods: Mapping[str, Handler], metrics: Metrics
) -> grpc.GenericRpcHandler[Any, Any]:
    """Serves a service of the contract; `methods` must have all of its methods."""
    unary_calls = Limit(MAX_UNARY_CALLS, _calls_full)

    def bounded(method: MethodDescriptor) -> Handler:
        handler = methods[method.name]
        if method.server_streaming:
            # Streams have a limit of their own.
            return handler

        async def handle(request: Any, call: Call) -> Any:
            with unary_calls:
                return await handler(request, call)

        return handle

    handlers = {method.name: _method_handler(method, bounded(method), metrics) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _method_handler(
    method: MethodDescriptor, handler: Handler, metrics: Metrics
) -> grpc.RpcMethodHandler[Any, Any]:
    name = f"{method.containing_service.name}.{method.name}"
    request_type = GetMessageClass(method.input_type)

    def parse(data: bytes) -> Message | _Malformed:
        # An exception here would reach the client as INTERNAL, and say nothing.
        try:
            return request_type.FromString(data)
        except DecodeError:
            return _Malformed(data, method.input_type)

    async def serve(request: Message | _Malformed, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        call = Call(context, name)
        problem: LapsError
        with _accounted(call, metrics) as outcome:
            try:
                if isinstance(request, _Malformed):
                    raise InvalidArgument(request.field, request.reason)
                return await handler(request, call)
            except Exception as error:
                problem = _as_laps_error(error, call)
                outcome(problem.status)
        # Outside, because this waits for a client that reads nothing.
        return await abort(context, problem)

    make = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(serve, request_deserializer=parse, response_serializer=_serialize)


def _calls_full(most: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"the gateway has {most} calls in progress, as many as it may; come back later",
        reason=Reason.STREAMS_FULL,
        retry_after_s=RETRY_AFTER_S,
        quota_subject="calls",
        metadata={"limit": most},
    )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


@contextmanager
def _accounted(call: Call, metrics: Metrics) -> Iterator[Callable[[str], None]]:
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


def _as_laps_error(error: Exception, call: Call) -> LapsError:
    if isinstance(error, LapsError):
        return error
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error)
    log.error("call failed", method=call.method, exc_info=error, **call.fields)
    return Internal("the gateway has a defect; its log has the details")
