"""A gateway without models: it plays a prepared output and breaks its streams where it is told to."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from laps import channels
from laps.errors import LapsError, NotFound, Unavailable, abort
from laps.v1 import inference_pb2 as pb
from laps.v1 import inference_pb2_grpc, queue_pb2, queue_pb2_grpc
from tests.servers import listening

HELD_BACK = 3
"""Characters that the fake detokenizer keeps until it knows more, as a real one does with a possible stop."""


@dataclass
class Script:
    """What the gateway plays. `breaks` are the messages after which streams one, two, ... break."""

    pieces: list[str] = field(default_factory=lambda: ["one ", "two ", "three ", "four"])
    chunk_tokens: list[int] = field(default_factory=lambda: [1])
    breaks: list[tuple[int, str]] = field(default_factory=list)
    """(messages sent before it breaks, how: "status", "silent" or "slow")."""
    flush_alone: bool = False
    """Whether the text held back comes in a chunk of its own."""
    finish_reason: int = 1
    error: LapsError | None = None
    """Every call ends with this."""


class FakeGateway(inference_pb2_grpc.InferenceServiceServicer, queue_pb2_grpc.QueueServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls: list[tuple[str, Any]] = []
        self.cancelled: list[str] = []
        self.address = ""

    def visible(self, tokens: int) -> str:
        """The text that is out after so many tokens, the end not being known."""
        text = "".join(self.script.pieces[:tokens])
        return text[: max(0, len(text) - HELD_BACK)]

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.calls.append(("Generate", request))
        async for message in self._play(request.request_id, 0, context, pb.GenerateResponse):
            yield message

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> AsyncIterator[pb.ResumeResponse]:
        self.calls.append(("Resume", request))
        async for message in self._play(request.request_id, request.offset, context, pb.ResumeResponse):
            yield message

    async def _play(self, request_id: str, offset: int, context: Any, message: Any) -> AsyncIterator[Any]:
        script, number = self.script, len(self.calls) - 1
        if script.error is not None:
            await abort(context, script.error)
        left, how = script.breaks[number] if number < len(script.breaks) else (-1, "")
        for made in self._messages(request_id, offset, number, message):
            if left == 0:
                await self._break(how, context)
                return
            left -= 1
            yield made

    def _messages(self, request_id: str, offset: int, number: int, message: Any) -> list[Any]:
        script, made = self.script, []
        total, at = len(script.pieces), offset
        whole = "".join(script.pieces)
        size = script.chunk_tokens[number % len(script.chunk_tokens)]
        while at < total:
            upto = min(at + size, total)
            last = upto == total and not script.flush_alone
            text = (whole if last else self.visible(upto))[len(self.visible(at)) :]
            chunk = _chunk(list(range(at, upto)), text)
            made.append(message(request_id=request_id, offset=at, chunk=chunk))
            at = upto
        if (script.flush_alone or offset >= total) and (rest := whole[len(self.visible(total)) :]):
            made.append(message(request_id=request_id, offset=total, chunk=_chunk([], rest)))
        complete = _complete(script.finish_reason, total)
        made.append(message(request_id=request_id, offset=total, complete=complete))
        return made

    async def _break(self, how: str, context: Any) -> None:
        from laps.errors import Reason, ResourceExhausted

        if how == "status":
            await abort(context, Unavailable("gone"))
        if how == "slow":
            await abort(
                context, ResourceExhausted("too slow", reason=Reason.CLIENT_TOO_SLOW, retry_after_s=0)
            )

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        if request.request_id == "unknown":
            await abort(context, NotFound("there is no request 'unknown'"))
        self.cancelled.append(request.request_id)
        return pb.CancelResponse(state=queue_pb2.REQUEST_STATE_FINISHED)

    async def GetRequest(self, request: pb.GetRequestRequest, context: Any) -> pb.GetRequestResponse:
        if request.request_id == "unknown":
            await abort(context, NotFound("there is no request 'unknown'"))
        answer = pb.GetRequestResponse(request=request_info(request.request_id))
        if request.include_output:
            answer.text = "".join(self.script.pieces)
            answer.output.ids.extend(range(len(self.script.pieces)))
            answer.complete.CopyFrom(_complete(1, len(self.script.pieces)))
        return answer

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        model = pb.Model(name="tiny", pool="default", target="t", draft="d", context_tokens=512, workers=2)
        return pb.ListModelsResponse(models=[model])

    async def ListQueues(self, request: Any, context: Any) -> queue_pb2.ListQueuesResponse:
        return queue_pb2.ListQueuesResponse(pools=[pool_queues()])

    async def ListRequests(self, request: Any, context: Any) -> queue_pb2.ListRequestsResponse:
        first = int(request.page_token or 0)
        last = min(first + min(request.page_size, 2), 5)
        return queue_pb2.ListRequestsResponse(
            requests=[request_info(f"r{number}") for number in range(first, last)],
            next_page_token=str(last) if last < 5 else "",
        )

    async def ListWorkers(self, request: Any, context: Any) -> queue_pb2.ListWorkersResponse:
        return queue_pb2.ListWorkersResponse(workers=[worker_info()])

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[queue_pb2.WatchResponse]:
        self.calls.append(("Watch", request))
        for number in range(2):
            yield queue_pb2.WatchResponse(
                time_s=float(number),
                pools=[pool_queues()],
                workers=[worker_info()],
                running=[request_info("r1")],
            )


def _chunk(token_ids: list[int], text: str) -> Any:
    from laps.v1 import generation_pb2

    return generation_pb2.Chunk(token_ids=token_ids, text=text)


def _complete(finish_reason: int, tokens: int) -> Any:
    from laps.v1 import generation_pb2 as generation

    return generation.Complete(
        finish_reason=finish_reason,
        usage=generation.Usage(prompt_tokens=3, completion_tokens=tokens),
        timing=generation.Timing(queue_time_ms=1.5, time_to_first_token_ms=20.0, total_time_ms=100.0),
        speculation=generation.SpeculationStats(
            num_steps=2, num_draft_tokens=8, num_accepted_tokens=4, acceptance_histogram=[0, 0, 2]
        ),
    )


def request_info(request_id: str) -> queue_pb2.RequestInfo:
    return queue_pb2.RequestInfo(
        request_id=request_id, pool="default", state=queue_pb2.REQUEST_STATE_RUNNING, arrival_s=1.0,
        prompt_tokens=3, max_tokens=10, output_tokens=4, acceptance_estimate=0.5, worker_id="w0",
        num_draft_tokens=8, num_accepted_tokens=4,
    )  # fmt: skip


def pool_queues() -> queue_pb2.PoolQueues:
    level = queue_pb2.QueueLevel(level=0, waiting=1, head=[request_info("r0")])
    return queue_pb2.PoolQueues(
        pool="default", policy="laps-sd", epoch=3, waiting=1, running=1, levels=[level]
    )


def worker_info() -> queue_pb2.WorkerInfo:
    slots = [queue_pb2.SlotInfo(slot=0, request_id="r1"), queue_pb2.SlotInfo(slot=1)]
    return queue_pb2.WorkerInfo(worker_id="w0", pool="default", device="cpu", slots=slots, verify_ms=24.0)


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[FakeGateway]:
    gateway = FakeGateway(script)
    server = channels.new_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, server)
    queue_pb2_grpc.add_QueueServiceServicer_to_server(gateway, server)
    async with listening(server) as port:
        gateway.address = f"127.0.0.1:{port}"
        yield gateway


@pytest.fixture
def serve() -> Callable[[Script], Any]:
    return serving


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but those that a test makes."""
    for name in list(os.environ):
        if name.startswith("LAPS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
