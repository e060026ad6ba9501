"""The one place where gRPC calls are let through or refused."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from laps.errors import LapsError, Unimplemented, abort
from laps.logs import get_logger
from laps.security.access import Role
from laps.security.keys import KeyFile
from laps.security.principal import EVERYBODY, NOBODY, Principal, set_caller

if TYPE_CHECKING:
    # Generic for type checkers alone.
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    Context = Handler = Any
    Interceptor = grpc.aio.ServerInterceptor
Metadata = Iterable[tuple[str, str | bytes]]
Authenticate = Callable[[Metadata, Context | None], Principal | None]
"""Who calls. Without a context, which there is only once the request is read, None says that it takes one.
Raises Unauthenticated for credentials that are no good."""

_SERVICE_ROLES = frozenset({Role.GATEWAY, Role.WORKER, Role.OPERATOR})
_MAX_NAME_CHARS = 128

log = get_logger()


def by_nothing(metadata: Metadata, context: Context | None) -> Principal:
    """Everybody may do everything: for one machine, or a network that lets nobody else in."""
    return EVERYBODY


def by_api_key(keys: KeyFile) -> Authenticate:
    """By the metadata `authorization: Bearer KEY`."""

    def authenticate(metadata: Metadata, context: Context | None) -> Principal:
        for name, value in metadata:
            if name == "authorization":
                return keys.recognise(value if isinstance(value, str) else "")
        return NOBODY

    return authenticate


def by_certificate(trust_domain: str) -> Authenticate:
    """By the certificate that the connection was opened with: its URI `spiffe://TRUST_DOMAIN/ROLE`. Who has
    none that the authority signed opens no connection."""
    names = {f"spiffe://{trust_domain}/{role}".encode(): role for role in _SERVICE_ROLES}

    def authenticate(metadata: Metadata, context: Context | None) -> Principal | None:
        if context is None:
            return None
        shown: Mapping[str, Iterable[bytes]] = context.auth_context()
        roles = frozenset(names[uri] for uri in shown.get("peer_uri", ()) if uri in names)
        return Principal("/".join(sorted(roles)), roles) if roles else NOBODY

    return authenticate


class AccessInterceptor(Interceptor):
    """Lets a call through when the table says so, and sets the task's `caller`."""

    def __init__(
        self,
        authenticate: Authenticate,
        on_refused: Callable[[str, str], None] = lambda method, status: None,
    ) -> None:
        """`on_refused` gets the method's path and the status of each refusal."""
        self._authenticate = authenticate
        self._on_refused = on_refused
        self._guarded: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Handler | None = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None:
            # Not kept: who calls chooses the name.
            return _refusing(Unimplemented(f"there is no method {method[:_MAX_NAME_CHARS]}"))
        try:
            self._judge(method, handler_call_details.invocation_metadata or ())
        except LapsError as refusal:
            # Before the request is read: what strangers send is not even parsed.
            return _refusing(refusal, partial(self._refused, method, refusal))
        known = self._guarded.get(method)
        if known is None or known[0] is not handler:
            known = self._guarded[method] = (handler, self._guard(method, handler))
        return known[1]

    def _guard(self, method: str, handler: Handler) -> Handler:
        inner: Any = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        guarded: Any
        if inspect.isasyncgenfunction(inner):

            async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
                await self._check(method, context)
                async with aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        yield response

        elif inspect.iscoroutinefunction(inner):

            async def guarded(request: Any, context: Context) -> Any:
                await self._check(method, context)
                return await inner(request, context)

        else:
            raise TypeError(f"{method} is not served by an async function")
        return make(  # type: ignore[no-any-return]
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _check(self, method: str, context: Context) -> None:
        try:
            principal = self._judge(method, context.invocation_metadata() or (), context)
        except LapsError as refusal:
            self._refused(method, refusal, context)
            await abort(context, refusal)
        set_caller(principal)

    def _judge(self, method: str, metadata: Metadata, context: Context | None = None) -> Principal:
        principal = self._authenticate(metadata, context)
        if principal is None and context is None:
            # Judged when the context is there.
            return NOBODY
        principal = principal or NOBODY
        principal.check(method)
        return principal

    def _refused(self, method: str, refusal: LapsError, context: Context) -> None:
        self._on_refused(method, refusal.status)
        log.warning("call refused", method=method, because=refusal.reason.name, peer=context.peer())


def _refusing(error: LapsError, on_refused: Callable[[Context], None] = lambda context: None) -> Handler:
    """Takes calls of every kind, and reads nothing of them."""

    async def refuse(requests: Any, context: Context) -> None:
        on_refused(context)
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
