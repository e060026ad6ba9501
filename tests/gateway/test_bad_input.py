"""Every bad input is refused with the fitting status, and its details name the field."""

from __future__ import annotations

import math
from typing import Any

import grpc
import grpc.aio
import pytest
from gateway_calls import collect, failure, generate_request
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.wire import find_fault
from laps.errors import AlreadyExists, LapsError, Reason, ResourceExhausted, from_rpc_error
from laps.v1 import generation_pb2, inference_pb2, queue_pb2

CONTEXT = 64
GENERATE = "/laps.v1.InferenceService/Generate"


def _sampling(**values: Any) -> dict[str, Any]:
    return {"sampling": generation_pb2.SamplingParams(**values)}


def _stopping(**values: Any) -> dict[str, Any]:
    return {"stopping": generation_pb2.StoppingParams(**values)}


def _prompt(**values: Any) -> dict[str, Any]:
    return {"text": None, **values}


def _ids(*ids: int) -> dict[str, Any]:
    return _prompt(token_ids=generation_pb2.TokenIds(ids=ids))


def _messages(*turns: tuple[str, str]) -> dict[str, Any]:
    messages = [generation_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    return _prompt(messages=generation_pb2.ChatMessages(messages=messages))


FIELD = Reason.FIELD_INVALID
BAD: list[tuple[str, dict[str, Any], str, Reason, str]] = [
    # what, fields of the request, field named in the details, reason, words in the message
    ("no prompt", _prompt(), "prompt", Reason.PROMPT_EMPTY, "one of text, token_ids, messages"),
    ("empty text", {"text": ""}, "text", Reason.PROMPT_EMPTY, "empty"),
    ("empty ids", _ids(), "token_ids.ids", Reason.PROMPT_EMPTY, "empty"),
    ("empty messages", _messages(), "messages.messages", Reason.PROMPT_EMPTY, "empty"),
    ("no role", _messages(("", "x")), "messages.messages[0].role", FIELD, "1 to 64"),
    ("refused role", _messages(("bad", "x")), "messages", FIELD, "no such role"),
    ("many messages", _messages(*[("user", "x")] * 1025), "messages.messages", FIELD, "1024"),
    ("long text", {"text": "\u00e4 " * CONTEXT}, "text", Reason.PROMPT_TOO_LONG, "at most 63"),
    ("very long text", {"text": "\u00e4 " * 9000}, "text", Reason.PROMPT_TOO_LONG, "at most 63"),
    ("long ids", _ids(*[5] * CONTEXT), "token_ids.ids", Reason.PROMPT_TOO_LONG, "has 64 tokens; at most 63"),
    (
        "long chat",
        _messages(("user", "\u00e4 " * 5000)),
        "messages.messages",
        Reason.PROMPT_TOO_LONG,
        "at most 63",
    ),
    ("unknown token", _ids(1, 2, 99_999), "token_ids.ids[2]", Reason.TOKEN_UNKNOWN, "99999 is not in"),
    ("temperature < 0", _sampling(temperature=-0.1), "sampling.temperature", FIELD, "at least 0"),
    ("temperature NaN", _sampling(temperature=math.nan), "sampling.temperature", FIELD, "finite"),
    ("temperature inf", _sampling(temperature=math.inf), "sampling.temperature", FIELD, "finite"),
    ("temperature big", _sampling(temperature=101), "sampling.temperature", FIELD, "at most 100"),
    ("top_p 0", _sampling(top_p=0), "sampling.top_p", FIELD, "above 0"),
    ("top_p > 1", _sampling(top_p=1.5), "sampling.top_p", FIELD, "at most 1"),
    ("top_p NaN", _sampling(top_p=math.nan), "sampling.top_p", FIELD, "finite"),
    ("top_k < 0", _sampling(top_k=-1), "sampling.top_k", FIELD, "-1"),
    ("min_p > 1", _sampling(min_p=1.01), "sampling.min_p", FIELD, "at most 1"),
    ("min_p < 0", _sampling(min_p=-1), "sampling.min_p", FIELD, "at least 0"),
    ("penalty 0", _sampling(repetition_penalty=0), "sampling.repetition_penalty", FIELD, "at least 0.01"),
    ("penalty 1e-3", _sampling(repetition_penalty=1e-3), "sampling.repetition_penalty", FIELD, "at most 100"),
    ("penalty -inf", _sampling(repetition_penalty=-math.inf), "sampling.repetition_penalty", FIELD, "finite"),
    ("frequency > 2", _sampling(frequency_penalty=2.1), "sampling.frequency_penalty", FIELD, "at most 2"),
    ("frequency NaN", _sampling(frequency_penalty=math.nan), "sampling.frequency_penalty", FIELD, "finite"),
    ("presence < -2", _sampling(presence_penalty=-2.1), "sampling.presence_penalty", FIELD, "at least -2"),
    ("bias > 100", _sampling(logit_bias={3: 100.1}), "sampling.logit_bias[3]", FIELD, "at most 100"),
    ("bias inf", _sampling(logit_bias={3: math.inf}), "sampling.logit_bias[3]", FIELD, "finite"),
    (
        "bias of an unknown token",
        _sampling(logit_bias={99_999: 1.0}),
        "sampling.logit_bias[99999]",
        Reason.TOKEN_UNKNOWN,
        "99999 is not in",
    ),
    (
        "too many biases",
        _sampling(logit_bias=dict.fromkeys(range(301), 1.0)),
        "sampling.logit_bias",
        FIELD,
        "at most 300",
    ),
    ("logprobs < 0", _sampling(logprobs=-1), "sampling.logprobs", FIELD, "between 0 and 20"),
    ("logprobs 21", _sampling(logprobs=21), "sampling.logprobs", FIELD, "between 0 and 20"),
    ("max_tokens 0", _stopping(max_tokens=0), "stopping.max_tokens", FIELD, "at least 1"),
    ("max_tokens < 0", _stopping(max_tokens=-5), "stopping.max_tokens", FIELD, "at least 1"),
    (
        "max_tokens beyond",
        _stopping(max_tokens=CONTEXT),
        "stopping.max_tokens",
        Reason.PROMPT_TOO_LONG,
        "of the context's 64",
    ),
    ("min_tokens < 0", _stopping(min_tokens=-1), "stopping.min_tokens", FIELD, "at least 0"),
    ("min > max", _stopping(min_tokens=3, max_tokens=2), "stopping.min_tokens", FIELD, "3 is more than"),
    ("min > context", _stopping(min_tokens=CONTEXT), "stopping.min_tokens", FIELD, "64 is more than"),
    ("empty stop", _stopping(stop=["a", ""]), "stopping.stop[1]", FIELD, "1 to 256"),
    ("long stop", _stopping(stop=["a" * 257]), "stopping.stop[0]", FIELD, "1 to 256"),
    ("many stops", _stopping(stop=["a"] * 17), "stopping.stop", FIELD, "at most 16"),
    (
        "unknown stop token",
        _stopping(stop_token_ids=[99_999]),
        "stopping.stop_token_ids[0]",
        Reason.TOKEN_UNKNOWN,
        "vocabulary",
    ),
    ("many stop tokens", _stopping(stop_token_ids=[1] * 257), "stopping.stop_token_ids", FIELD, "256"),
    ("request_id chars", {"request_id": "a b"}, "request_id", FIELD, "[A-Za-z0-9._-]"),
    ("request_id length", {"request_id": "a" * 129}, "request_id", FIELD, "at most 128"),
    ("request_id line", {"request_id": "a\n"}, "request_id", FIELD, "[A-Za-z0-9._-]"),
    ("request_class chars", {"request_class": "\u00e4"}, "request_class", FIELD, "[A-Za-z0-9._-]"),
    ("request_class length", {"request_class": "a" * 65}, "request_class", FIELD, "at most 64"),
    ("priority high", {"priority": 101}, "priority", FIELD, "between -100 and 100"),
    ("priority low", {"priority": -101}, "priority", FIELD, "between -100 and 100"),
    ("prediction 0", {"predicted_output_tokens": 0}, "predicted_output_tokens", FIELD, "between 1"),
    ("timeout 0", {"timeout": Duration()}, "timeout", FIELD, "more than 0"),
    ("timeout < 0", {"timeout": Duration(seconds=-1)}, "timeout", FIELD, "more than 0"),
    ("timeout mixed", {"timeout": Duration(seconds=1, nanos=-1)}, "timeout", FIELD, "valid duration"),
]


@pytest.mark.parametrize(
    ("fields", "field", "reason", "words"), [row[1:] for row in BAD], ids=[r[0] for r in BAD]
)
async def test_refused_by_field(
    start_gateway: Any, fields: dict[str, Any], field: str, reason: Reason, words: str
) -> None:
    harness = await start_gateway(context_tokens=CONTEXT, wait=False)
    error = await failure(
        harness.inference.Generate(inference_pb2.GenerateRequest(**{"text": "a", **fields}))
    )
    assert error.status == "INVALID_ARGUMENT"
    assert error.violations[0].field == field
    assert error.reason is reason
    assert words in error.message
    assert words in error.violations[0].description
    assert not harness.scheduler.requests


async def test_all_fields_are_named_at_once(harness: Any) -> None:
    request = generate_request("", **_sampling(temperature=-1, top_p=2), priority=1000)
    error = await failure(harness.inference.Generate(request))
    fields = [violation.field for violation in error.violations]
    assert fields == ["priority", "sampling.temperature", "sampling.top_p", "text"]


async def test_limits_are_numbers_in_the_details(start_gateway: Any) -> None:
    harness = await start_gateway(context_tokens=CONTEXT)
    error = await failure(harness.inference.Generate(generate_request("\u00e4" * CONTEXT)))
    assert error.metadata["limit_tokens"] == "63"
    error = await failure(harness.inference.Generate(inference_pb2.GenerateRequest(**_ids(77_777))))
    assert int(error.metadata["vocabulary_size"]) < 77_777


async def test_workers_limits_count_too(harness: Any) -> None:
    """The model's own context is larger than what the workers have memory for."""
    harness.scheduler.pool.context_tokens = 10
    harness.scheduler.pool.vocabulary_size = 100
    while harness.gateway.link.pool.context_tokens != 10:
        await harness.gateway.link._describe()
    error = await failure(harness.inference.Generate(generate_request("a", max_tokens=10)))
    assert "context's 10" in error.message
    error = await failure(harness.inference.Generate(inference_pb2.GenerateRequest(**_ids(100))))
    assert error.reason is Reason.TOKEN_UNKNOWN


async def test_an_unknown_model_is_told_what_there_is(harness: Any) -> None:
    error = await failure(harness.inference.Generate(generate_request(model="gpt-17")))
    assert error.status == "NOT_FOUND"
    assert error.reason is Reason.MODEL_UNKNOWN
    assert error.metadata["models"] == "tiny"
    assert error.resource_name == "gpt-17"


async def test_an_id_is_not_used_twice(harness: Any) -> None:
    harness.scheduler.auto_tokens = 5
    await collect(harness.inference.Generate(generate_request("one", request_id="same")))
    error = await failure(harness.inference.Generate(generate_request("two", request_id="same")))
    assert isinstance(error, AlreadyExists)
    assert error.reason is Reason.REQUEST_ID_REUSED


async def test_the_schedulers_refusal_passes_with_its_details(harness: Any) -> None:
    harness.scheduler.refuse = ResourceExhausted(
        "the queue is full", retry_after_s=3.0, quota_subject="pool", metadata={"limit": 7}
    )
    error = await failure(harness.inference.Generate(generate_request()))
    assert error.status == "RESOURCE_EXHAUSTED"
    assert error.reason is Reason.QUEUE_FULL
    assert (error.retry_after_s, error.quota_subject, error.metadata) == (3.0, "pool", {"limit": "7"})


async def test_a_deadline_that_has_passed(harness: Any) -> None:
    # Whether the call reaches the gateway at all is up to gRPC's clock, which is coarser than this;
    # that nothing is admitted after a deadline is tested in test_admission.
    error = await failure(harness.inference.Generate(generate_request(), timeout=1e-9))
    assert error.status == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Resume", inference_pb2.ResumeRequest(), "request_id"),
        ("Resume", inference_pb2.ResumeRequest(request_id="a/b"), "request_id"),
        ("Cancel", inference_pb2.CancelRequest(), "request_id"),
        ("GetRequest", inference_pb2.GetRequestRequest(request_id="x" * 200), "request_id"),
    ],
)
async def test_other_calls_name_their_field(harness: Any, method: str, request_: Any, field: str) -> None:
    error = await failure(getattr(harness.inference, method)(request_))
    assert error.status == "INVALID_ARGUMENT"
    assert error.violations[0].field == field


async def test_queue_calls_are_bounded(harness: Any) -> None:
    error = await failure(harness.queue.ListRequests(queue_pb2.ListRequestsRequest(page_size=1001)))
    assert error.violations[0].field == "page_size"
    error = await failure(harness.queue.ListQueues(queue_pb2.ListQueuesRequest(head_limit=1001)))
    assert error.violations[0].field == "head_limit"
    error = await failure(harness.queue.Watch(queue_pb2.WatchRequest(head_limit=1001)))
    assert error.violations[0].field == "head_limit"
    hasty = queue_pb2.WatchRequest(interval=Duration(nanos=1000))
    error = await failure(harness.queue.Watch(hasty))
    assert error.violations[0].field == "interval"


@pytest.mark.parametrize("method", ["Resume", "Cancel", "GetRequest"])
async def test_unknown_requests(harness: Any, method: str) -> None:
    kinds = {
        "Resume": inference_pb2.ResumeRequest,
        "Cancel": inference_pb2.CancelRequest,
        "GetRequest": inference_pb2.GetRequestRequest,
    }
    error = await failure(getattr(harness.inference, method)(kinds[method](request_id="nobody")))
    assert error.status == "NOT_FOUND"
    assert error.resource_name == "nobody"


# --- Bytes that are no message ----------------------------------------------------------------


async def raw_failure(harness: Any, data: bytes, method: str = GENERATE) -> LapsError:
    """Sends bytes as they are."""
    call = harness.channel.unary_stream(method)(data)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return from_rpc_error(caught.value)


def _bytes_field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2, len(payload)]) + payload


MALFORMED: list[tuple[str, bytes, str, str]] = [
    ("text", _bytes_field(3, b"ab\xff"), "text", "UTF-8 at byte 2"),
    ("request_id", _bytes_field(1, b"\xc3\x28"), "request_id", "UTF-8"),
    ("surrogate", _bytes_field(3, b"\xed\xa0\x80"), "text", "UTF-8"),
    (
        "content",
        _bytes_field(5, _bytes_field(1, _bytes_field(1, b"user") + _bytes_field(2, b"\x80"))),
        "messages.messages.content",
        "UTF-8",
    ),
    ("stop", _bytes_field(7, _bytes_field(3, b"\xfe")), "stopping.stop", "UTF-8"),
    ("cut short", bytes([3 << 3 | 2, 50]) + b"abc", "text", "cut short"),
    ("cut number", bytes([8 << 3, 0x80]), "priority", "cut short"),
    ("long number", bytes([8 << 3, *[0x80] * 11, 1]), "priority", "ten bytes"),
    ("bad wire type", bytes([3 << 3 | 7, 1]), "text", "wire type"),
    ("noise", b"\xff" * 20, "", "ten bytes"),
]


@pytest.mark.parametrize(
    ("data", "field", "words"), [r[1:] for r in MALFORMED], ids=[r[0] for r in MALFORMED]
)
async def test_malformed_bytes(harness: Any, data: bytes, field: str, words: str) -> None:
    error = await raw_failure(harness, data)
    assert error.status == "INVALID_ARGUMENT"
    assert error.reason is FIELD
    assert words in error.message
    assert [violation.field for violation in error.violations] == ([field] if field else [])


GOOD = generate_request("the end", request_id="a", stop=["x"], priority=3).SerializeToString()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Noise, or a good message with some bytes changed, taken out or put in."""
    data = bytearray(draw(st.sampled_from([GOOD, b""])))
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(data)))
        data[position : position + draw(st.integers(0, 2))] = draw(st.binary(max_size=6))
    return bytes(data)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=damaged())
async def test_no_bytes_are_a_defect(harness: Any, data: bytes) -> None:
    """Whatever comes is served or refused by name; nothing is INTERNAL or UNKNOWN."""
    harness.scheduler.auto_tokens = 1000
    try:
        await harness.channel.unary_stream(GENERATE)(data).read()
    except grpc.aio.AioRpcError as caught:
        error = from_rpc_error(caught)
        assert error.status in ("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS")
        assert error.reason is not Reason.UNKNOWN


async def test_a_message_over_the_limit(start_gateway: Any) -> None:
    harness = await start_gateway(max_message_bytes=1 << 16)
    error = await failure(harness.inference.Generate(generate_request("a" * (1 << 17))))
    assert error.status == "RESOURCE_EXHAUSTED"
    # The connection and the others on it live on.
    harness.scheduler.auto_tokens = 5
    assert (await collect(harness.inference.Generate(generate_request()))).complete is not None


def test_the_fault_is_not_looked_for_for_long() -> None:
    """Megabytes of tiny fields would hold up everybody else."""
    descriptor = inference_pb2.GenerateRequest.DESCRIPTOR
    field, fault = b"\x98\x7d\x00", b"\x9f\x7d"
    assert find_fault(field * 9_000 + fault, descriptor) == ("", "has a wire type that does not exist")
    assert find_fault(field * 11_000 + fault, descriptor) == ("", "is not a laps.v1.GenerateRequest")
