"""Calls by gRPC: parsing, errors as statuses with details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from gateway.calls import Call, Handler, accounted, as_laps_error
from gateway.metrics import Metrics
from gateway.streams import Limit
from gateway.wire import find_fault
from laps.errors import InvalidArgument, LapsError, Reason, ResourceExhausted, abort

REQUEST_ID_KEY = "laps-request-id"
"""Initial metadata of a stream: comes when the request is stored, before any token."""
MAX_UNARY_CALLS = 1000
"""Unary calls at a time: while the scheduler is away they wait for it."""
RETRY_AFTER_S = 1.0


class GrpcCall(Call):
    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
        super().__init__(method, context.invocation_metadata() or ())
        self._context = context

    async def accepted(self, request_id: str, before: Sequence[int]) -> None:
        await self._context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))

    async def write(self, message: Message) -> None:
        await self._context.write(message)

    def time_left_s(self) -> float | None:
        return self._context.time_remaining()


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
        call = GrpcCall(context, name)
        problem: LapsError
        with accounted(call, metrics) as outcome:
            try:
                if isinstance(request, _Malformed):
                    raise InvalidArgument(request.field, request.reason)
                return await handler(request, call)
            except Exception as error:
                problem = as_laps_error(error, call)
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
