"""The table of access is whole, and what does not stand in it is refused."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import laps.v1
from laps import channels
from laps.errors import Reason, from_rpc_error
from laps.security import access
from laps.security.access import METHODS, Role
from laps.security.interceptor import AccessInterceptor
from laps.security.principal import NOBODY, Principal, caller
from tests.servers import listening

CLIENT = Principal("a client", frozenset({Role.CLIENT}), "acme")
A_WORKER = Principal("a worker", frozenset({Role.WORKER}))


def methods_of_the_contract() -> set[str]:
    for module in pkgutil.iter_modules(laps.v1.__path__, "laps.v1."):
        importlib.import_module(module.name)
    pool = descriptor_pool.Default()  # type: ignore[no-untyped-call]
    files = [pool.FindFileByName(f"laps/v1/{name}.proto") for name in PROTOS]
    files += [health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR]
    return {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


PROTOS = sorted(
    module.name.removesuffix("_pb2")
    for module in pkgutil.iter_modules(laps.v1.__path__)
    if module.name.endswith("_pb2")
)


def test_every_method_of_every_service_stands_in_the_table() -> None:
    assert len(PROTOS) >= 5
    missing = methods_of_the_contract() - set(METHODS)
    assert not missing, f"say in laps/security/access.py who may call {sorted(missing)}"


def test_nothing_else_stands_in_the_table() -> None:
    extra = set(METHODS) - methods_of_the_contract()
    # Newer than the module that describes it.
    assert extra <= {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"}


def test_only_probes_need_no_credentials() -> None:
    open_to_all = {method for method, roles in METHODS.items() if Role.ANYONE in roles}
    assert {method.split("/")[1] for method in open_to_all} == {"grpc.health.v1.Health"}


def test_no_service_may_do_what_another_is_for() -> None:
    for method, roles in METHODS.items():
        if "SchedulerService" in method:
            assert roles == {Role.GATEWAY}
        if "WorkerService" in method:
            assert roles == {Role.WORKER}


class Server:
    """Serves one method of each kind, unprotected in itself, behind the interceptor."""

    def __init__(self, principal: Principal, *, by_context: bool = False) -> None:
        self.principal = principal
        self.by_context = by_context
        self.parsed: list[bytes] = []
        self.refused: list[tuple[str, str]] = []
        self.callers: list[str] = []

    def authenticate(self, metadata: Any, context: Any) -> Principal | None:
        return None if self.by_context and context is None else self.principal

    def parse(self, request: bytes) -> bytes:
        self.parsed.append(request)
        return request

    async def unary(self, request: bytes, context: Any) -> bytes:
        self.callers.append(caller().name)
        return request

    async def written(self, request: bytes, context: Any) -> None:
        self.callers.append(caller().name)
        await context.write(request)

    async def generated(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.callers.append(caller().name)
        async for request in requests:
            yield request

    def new_server(self) -> grpc.aio.Server:
        interceptor = AccessInterceptor(
            self.authenticate, lambda method, status: self.refused.append((method, status))
        )
        server = channels.new_server(interceptors=[interceptor])
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "laps.v1.InferenceService",
                    {
                        "Generate": grpc.unary_stream_rpc_method_handler(self.written),
                        "Cancel": grpc.unary_unary_rpc_method_handler(self.unary, self.parse),
                        "Resume": grpc.stream_stream_rpc_method_handler(self.generated),
                        "Forgotten": grpc.unary_unary_rpc_method_handler(self.unary),
                    },
                ),
            )
        )
        return server


@asynccontextmanager
async def channel_to(served: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with (
        listening(served.new_server()) as port,
        channels.open_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


async def answer(channel: grpc.aio.Channel, method: str) -> bytes:
    path = f"/laps.v1.InferenceService/{method}"
    if method == "Generate":
        return await channel.unary_stream(path)(b"x").read()  # type: ignore[no-any-return]
    if method == "Resume":
        return await channel.stream_stream(path)(iter([b"x"])).read()  # type: ignore[no-any-return]
    return await channel.unary_unary(path)(b"x")  # type: ignore[no-any-return]


async def refusal(channel: grpc.aio.Channel, method: str) -> grpc.aio.AioRpcError:
    path = f"/laps.v1.InferenceService/{method}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        # Nothing is written: of a stream that ends while its client writes, the client may say INTERNAL
        # by itself, and not what the server said.
        await (channel.stream_stream(path)().read() if method == "Resume" else answer(channel, method))
    return caught.value


async def test_whose_metadata_say_no_is_refused_before_anything_is_read() -> None:
    served = Server(NOBODY)
    async with channel_to(served) as channel, asyncio.timeout(60):
        assert (await refusal(channel, "Cancel")).code() is grpc.StatusCode.UNAUTHENTICATED
        # Headers alone, and then nothing more.
        call = channel.stream_unary("/laps.v1.InferenceService/Cancel")()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not served.parsed


@pytest.mark.parametrize("by_context", [False, True], ids=["metadata", "certificate"])
async def test_who_may_call_gets_through_and_is_known(by_context: bool) -> None:
    served = Server(CLIENT, by_context=by_context)
    async with channel_to(served) as channel:
        for method in ("Generate", "Cancel", "Resume"):
            assert await answer(channel, method) == b"x"
    assert served.callers == ["a client"] * 3
    assert not served.refused


@pytest.mark.parametrize("by_context", [False, True], ids=["metadata", "certificate"])
@pytest.mark.parametrize(
    ("principal", "status"),
    [(NOBODY, "UNAUTHENTICATED"), (A_WORKER, "PERMISSION_DENIED")],
)
async def test_who_may_not_is_refused_and_counted(
    principal: Principal, status: str, by_context: bool
) -> None:
    served = Server(principal, by_context=by_context)
    async with channel_to(served) as channel:
        for method in ("Generate", "Cancel", "Resume"):
            assert from_rpc_error(await refusal(channel, method)).reason.name == status
    assert served.callers == []
    assert [status for _, status in served.refused] == [status] * 3


@pytest.mark.parametrize("role", list(Role))
async def test_a_method_that_the_table_does_not_have_is_refused_to_all(role: Role) -> None:
    served = Server(Principal("x", frozenset({role})))
    async with channel_to(served) as channel:
        assert (await refusal(channel, "Forgotten")).code() is grpc.StatusCode.PERMISSION_DENIED
        assert (await refusal(channel, "NotEvenServed")).code() is grpc.StatusCode.UNIMPLEMENTED
    assert served.callers == []


def test_routes_of_the_http_port_stand_in_the_table_too() -> None:
    assert access.roles_of("/v1/nothing") == frozenset()


@pytest.mark.parametrize("method", ["/laps.v1.InferenceService/Nothing", "/nowhere.Service/" + "x" * 1000])
async def test_a_method_that_is_not_there_is_told_with_details(method: str) -> None:
    async with channel_to(Server(NOBODY)) as channel:
        calls: list[Any] = [
            channel.unary_unary(method)(b"x"),
            channel.unary_stream(method)(b"x").read(),
            # As in `refusal`.
            channel.stream_unary(method)(),
            channel.stream_stream(method)().read(),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = from_rpc_error(caught.value)
            assert (error.status, error.reason) == ("UNIMPLEMENTED", Reason.UNIMPLEMENTED)
            assert error.message == f"there is no method {method[:128]}"
            assert not error.from_transport
