"""What a server raises is what its client gets: through a real gRPC server."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest

from laps import channels
from laps.errors import (
    AlreadyExists,
    InvalidArgument,
    LapsError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    abort,
    from_rpc_error,
    request_unknown,
)
from laps.reasons import Reason
from laps.v1 import inference_pb2, inference_pb2_grpc
from tests.servers import listening


async def through_a_server(error: LapsError) -> LapsError:
    class Servicer(inference_pb2_grpc.InferenceServiceServicer):
        async def ListModels(self, request: Any, context: Any) -> Any:
            await abort(context, error)

    server = channels.new_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Servicer(), server)
    async with listening(server) as port, channels.open_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            await stub.ListModels(inference_pb2.ListModelsRequest())
        return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("sampling.top_p", "must be in (0, 1]"),
        InvalidArgument("text", "600 tokens", reason=Reason.PROMPT_TOO_LONG, limit_tokens=512),
        request_unknown("r1"),
        AlreadyExists("there is another"),
        ResourceExhausted("10 of 10 requests", retry_after_s=1.5, quota_subject="pool:default"),
        Unavailable("no leader", reason=Reason.NOT_LEADER, retry_after_s=0.25, metadata={"pool": "default"}),
        LapsError("a defect: ünïcode\nand lines", reason=Reason.INTERNAL),
    ],
    ids=lambda error: error.reason.name,
)
async def test_round_trip(error: LapsError) -> None:
    back = await through_a_server(error)
    assert isinstance(back, type(error))
    for name in (
        "message", "reason", "status", "metadata", "retry_after_s", "violations", "resource_type",
        "resource_name", "quota_subject", "from_transport",
    ):  # fmt: skip
        assert getattr(back, name) == getattr(error, name), name


async def test_the_field_comes_back() -> None:
    back = await through_a_server(InvalidArgument("stopping.max_tokens", "0 is too few"))
    assert isinstance(back, InvalidArgument)
    assert back.field == "stopping.max_tokens"
    assert str(back) == "stopping.max_tokens: 0 is too few"


async def test_huge_details_still_arrive() -> None:
    back = await through_a_server(NotFound("漢" * 5000, metadata={"key": "v" * 5000}))
    assert isinstance(back, NotFound)
    assert back.reason is Reason.REQUEST_UNKNOWN


async def test_an_unreachable_server_is_an_error_of_the_transport() -> None:
    async with channels.open_channel("127.0.0.1:1") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            await stub.ListModels(inference_pb2.ListModelsRequest())
    error = from_rpc_error(caught.value)
    assert isinstance(error, Unavailable)
    assert error.from_transport


def test_every_reason_has_a_status_and_a_sentence() -> None:
    for reason in Reason:
        assert reason.status in grpc.StatusCode.__members__
        assert reason.sentence.endswith(".")
    assert len({reason.sentence for reason in Reason}) == len(Reason)
