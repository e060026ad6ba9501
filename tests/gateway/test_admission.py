"""What the scheduler is asked for, given what the client asked for."""

from __future__ import annotations

import time
from typing import Any

import pytest
from gateway_calls import generate_request
from google.protobuf.duration_pb2 import Duration

from gateway.admission import admit, deadline, digest
from gateway.tokenizer import Tokenizer
from gateway.validation import Bounds
from laps.errors import DeadlineExceeded
from laps.v1 import generation_pb2, inference_pb2, scheduler_pb2
from worker_svc.engine.config import SamplingConfig

BOUNDS = Bounds("tiny", vocabulary_size=300, context_tokens=100, default_max_tokens=40)


async def submit(tokenizer: Tokenizer, request: Any) -> scheduler_pb2.RequestSpec:
    return await admit(request, BOUNDS, tokenizer, pool="p", disconnect_grace_s=7.0, call_time_left_s=None)


@pytest.mark.parametrize("penalty", [0.01, 100.0])
async def test_the_ends_of_a_range_belong_to_it(tokenizer: Tokenizer, penalty: float) -> None:
    """A request carries float32, in which 0.01 is a little less; the worker must take what came through."""
    request = inference_pb2.GenerateRequest(text="a")
    request.sampling.repetition_penalty = penalty
    spec = await submit(tokenizer, request)
    SamplingConfig(repetition_penalty=spec.sampling.repetition_penalty)


async def test_every_default_is_filled_in(tokenizer: Tokenizer) -> None:
    spec = await submit(tokenizer, generate_request("a"))
    assert len(spec.request_id) == 32
    assert spec.pool == "p"
    sampling = spec.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 1, 0, 0)
    assert sampling.HasField("temperature")
    assert sampling.repetition_penalty == 1
    assert not sampling.HasField("seed")
    assert not sampling.HasField("logprobs")
    assert spec.stopping.max_tokens == 40
    assert spec.stopping.min_tokens == 0
    assert spec.deadline_s == 0
    assert not spec.HasField("predicted_output_tokens")


async def test_what_is_given_stays(tokenizer: Tokenizer) -> None:
    request = generate_request("a", priority=-3, request_class="chat", predicted_output_tokens=9)
    request.sampling.CopyFrom(
        generation_pb2.SamplingParams(temperature=0.5, top_p=0.25, top_k=7, seed=2**64 - 1, logprobs=2)
    )
    request.stopping.CopyFrom(
        generation_pb2.StoppingParams(
            max_tokens=3, min_tokens=2, stop=["b", "a", "b"], stop_token_ids=[4, 4], ignore_eos=True
        )
    )
    spec = await submit(tokenizer, request)
    assert (spec.priority, spec.request_class, spec.predicted_output_tokens) == (-3, "chat", 9)
    assert (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.seed) == (0.5, 0.25, 2**64 - 1)
    assert spec.sampling.repetition_penalty == 1
    assert list(spec.stopping.stop) == ["b", "a"]
    assert list(spec.stopping.stop_token_ids) == [4]
    assert spec.stopping.ignore_eos


async def test_the_default_output_fits_the_context(tokenizer: Tokenizer) -> None:
    ids = generation_pb2.TokenIds(ids=[5] * 90)
    spec = await submit(tokenizer, inference_pb2.GenerateRequest(token_ids=ids))
    assert spec.stopping.max_tokens == 10
    request = generate_request("a", min_tokens=60)
    assert (await submit(tokenizer, request)).stopping.max_tokens == 60


@pytest.mark.parametrize(
    ("timeout_s", "left_s", "expected_s"), [(None, None, 0), (5, None, 5), (None, 6, 6), (5, 6, 5), (6, 5, 5)]
)
def test_the_earlier_deadline_holds(timeout_s: int | None, left_s: float | None, expected_s: float) -> None:
    request = generate_request()
    if timeout_s is not None:
        request.timeout.CopyFrom(Duration(seconds=timeout_s))
    now_s = time.time()
    result = deadline(request, left_s, now_s)
    assert result == (now_s + expected_s if expected_s else 0)


@pytest.mark.parametrize("left_s", [0.0, -1.0])
def test_a_deadline_that_has_passed(left_s: float) -> None:
    with pytest.raises(DeadlineExceeded):
        deadline(generate_request(), left_s, time.time())


def test_the_digest_is_of_the_body_alone() -> None:
    body = generate_request("a", max_tokens=5)
    same = generate_request(
        "a", max_tokens=5, request_id="x", timeout=Duration(seconds=3), cancel_on_disconnect=True
    )
    assert digest(body) == digest(same)
    assert len(digest(body)) == 32
    others = [
        generate_request("b", max_tokens=5),
        generate_request("a", max_tokens=6),
        generate_request("a", max_tokens=5, priority=1),
        generate_request("a", max_tokens=5, sampling=generation_pb2.SamplingParams(temperature=0)),
    ]
    assert len({digest(request) for request in [body, *others]}) == 5
