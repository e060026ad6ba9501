"""Clients: the product's client transcript, with a character of its own for each."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import grpc

from laps.client.retry import RetryPolicy
from laps.client.transcript import Transcript
from laps.errors import LapsError, Reason, from_rpc_error
from laps.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from simulator.faults.clock import Process
from simulator.faults.model import logprob_of
from simulator.faults.network import Channel
from simulator.faults.nodes import GATEWAY

if TYPE_CHECKING:
    from simulator.faults.world import World

FINISH_WORDS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_CANCELLED: "cancelled",
    generation_pb2.FINISH_REASON_DEADLINE: "deadline",
    generation_pb2.FINISH_REASON_ERROR: "error",
}
PATIENT = RetryPolicy(connect_attempts=40, resume_attempts=40, max_backoff_s=2.0)


class Client:
    """One request and what its client does about it."""

    def __init__(self, world: World, number: int, rng: random.Random, twin_of: Client | None = None) -> None:
        """`twin_of`: reads that client's request as well, from an offset of its own."""
        knobs = world.knobs
        self.world = world
        self.name = f"client-{number}"
        self.process = Process(self.name)
        self.rng = rng
        self.arrival_s = rng.uniform(0.0, knobs.arrival_s)
        own_id = rng.random() < 0.7
        self.request = inference_pb2.GenerateRequest(
            request_id=f"r{number}" if own_id else "",
            token_ids=generation_pb2.TokenIds(
                ids=[knobs.mean_length_tokens, number % 200, number // 200]
                + [rng.randrange(200) for _ in range(rng.randint(0, 12))]
            ),
        )
        long = rng.random() < 0.15
        self.request.stopping.max_tokens = 600 if long else rng.randint(1, 120)
        if rng.random() < 0.2:
            self.request.priority = rng.randint(-1, 1)
        if rng.random() < 0.3:
            self.request.predicted_output_tokens = rng.randint(1, 150)
        if rng.random() < 0.15:
            self.request.timeout.FromNanoseconds(int(rng.uniform(0.05, 8.0) * 1e9))
        if rng.random() < 0.15:
            self.request.cancel_on_disconnect = rng.random() < 0.5
        self.leaves_after = rng.choice((0, 1, 5, 20)) if rng.random() < 0.2 else None
        """Tokens after which it goes away for good."""
        self.pauses_after = rng.choice((1, 5, 20)) if rng.random() < 0.2 else None
        """Tokens after which it loses its stream and comes back."""
        self.cancels_after_s = rng.uniform(0.0, 6.0) if rng.random() < 0.15 else None
        self.reads_slowly = rng.random() < 0.1
        # Who leaves should leave something behind that does not end by itself at once.
        if self.leaves_after is not None:
            self.request.token_ids.ids[0] = 4000
            self.request.stopping.max_tokens = 600
        if rng.random() < 0.2:
            self.request.sampling.logprobs = rng.choice((0, 2))
        self.has_twin = False
        self.outcome = ""
        self.request_ids: set[str] = set()
        """Under which its request was stored: one it was given for every time it had to begin anew."""
        self.transcript = Transcript(self.request, retry=PATIENT, rng=rng)
        if twin_of is not None:
            twin_of.has_twin = True
            self.arrival_s = twin_of.arrival_s + rng.choice((0.05, 0.5, 3.0)) * rng.random()
            self.cancels_after_s = None
            self.request = twin_of.request
            offset = rng.choice((0, 0, 1, 10))
            self.transcript = Transcript(
                None, request_id=self.request.request_id, offset=offset, retry=PATIENT, rng=rng
            )
        channel: Any = Channel(world.network, GATEWAY)
        self._stubs: Any = inference_pb2_grpc.InferenceServiceStub(channel)

    def start(self) -> None:
        self.world.loop.spawn(self.process, self._live(), self.name)

    async def _live(self) -> None:
        await asyncio.sleep(self.arrival_s)
        cancelling = None
        if self.cancels_after_s is not None and self.request.request_id:
            cancelling = asyncio.create_task(self._cancel(self.cancels_after_s))
        try:
            self.outcome = await self._read_all()
        except LapsError as error:
            self.outcome = f"{error.status} {error.reason.name}"
            self._judge(error)
        finally:
            if cancelling is not None:
                await cancelling
        self.world.trace(self.name, f"is done: {self.outcome} after {self.transcript.offset} tokens")

    async def _cancel(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        request = inference_pb2.CancelRequest(request_id=self.request.request_id)
        try:
            await self._stubs.Cancel(request, timeout=10.0)
            self.world.trace(self.name, "has cancelled")
        except grpc.RpcError as error:
            self.world.trace(self.name, f"could not cancel: {from_rpc_error(error).status}")

    async def _read_all(self) -> str:
        transcript = self.transcript
        paused = False
        while True:
            call = transcript.next_call()
            resumes = isinstance(call.request, inference_pb2.ResumeRequest)
            method = self._stubs.Resume if resumes else self._stubs.Generate
            self.world.history.counts.resumed += resumes
            stream = method(call.request, timeout=call.timeout_s)
            problem: LapsError | None = None
            try:
                async for response in stream:
                    self._see(response)
                    transcript.accept(response)
                    if transcript.result is not None:
                        return transcript.result.finish_reason
                    if self.leaves_after is not None and transcript.offset >= self.leaves_after:
                        return self._leave()
                    if (
                        self.pauses_after is not None
                        and transcript.offset >= self.pauses_after
                        and not paused
                    ):
                        paused = True
                        break
                    if self.reads_slowly:
                        await asyncio.sleep(self.rng.uniform(0.0, 0.5))
            except grpc.RpcError as error:
                problem = from_rpc_error(error)
            finally:
                stream.cancel()
            if problem is not None:
                self.world.trace(self.name, f"lost its stream: {problem.status} {problem.message[:60]}")
            elif self.pauses_after is not None:
                await asyncio.sleep(self.rng.choice((0.0, 0.0, 2.0)) * self.rng.random())
            await asyncio.sleep(transcript.failed(problem))

    def _leave(self) -> str:
        if not self.has_twin and self.transcript._generate is not None:
            for request_id in self.request_ids:
                self.world.history.client_gone(request_id)
        return "left"

    def _see(self, response: Any) -> None:
        history = self.world.history
        request_id = response.request_id
        self.request_ids.add(request_id)
        if response.WhichOneof("event") == "chunk":
            history.counts.chunks += 1
            tokens = response.chunk.token_ids
            history.shown(self.name, request_id, response.offset, tokens)
            if self.request.sampling.HasField("logprobs"):
                logprobs = [entry.logprob for entry in response.chunk.logprobs]
                history.require(
                    logprobs == [logprob_of(token) for token in tokens],
                    f"{self.name}: {len(tokens)} tokens of {request_id} at {response.offset} came with other "
                    f"log probabilities than theirs",
                )
        else:
            complete = response.complete
            tokens = complete.usage.completion_tokens
            history.shown_end(self.name, request_id, FINISH_WORDS[complete.finish_reason], tokens)
            history.require(
                response.offset == tokens,
                f"{self.name}: the end of {request_id} at {response.offset}, not {tokens}",
            )

    def _judge(self, error: LapsError) -> None:
        """Some errors must not come, whatever goes wrong."""
        history = self.world.history
        if history.rolled_back or self.request_ids & history.damaged:
            return  # What it had seen may be lost.
        if error.reason is Reason.QUEUE_FULL or error.status == "RESOURCE_EXHAUSTED":
            history.counts.refused += 1
            return
        if error.status == "OUT_OF_RANGE":
            history.require(self.transcript._generate is None, f"{self.name} was told {error.message}")
            return
        if error.status == "NOT_FOUND":
            if self.transcript._generate is None and not self.request_ids:
                return  # It came before the request that it wants to read.
            lives = [history.lives.get(name) for name in self.request_ids or {self.transcript.request_id}]
            history.require(
                all(life is None or life.forgotten for life in lives),
                f"{self.name} was told that its request is unknown",
            )
            return
        if error.status == "UNKNOWN" and "StoreUnavailable" in error.message:
            return
        allowed = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ALREADY_EXISTS")
        history.require(error.status in allowed, f"{self.name} was told {error.status}: {error.message}")
