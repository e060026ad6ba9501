"""From a client's request to the scheduler's: prompt in tokens, defaults, deadline, digest."""

from __future__ import annotations

import hashlib
import sys
import time
import uuid
from array import array

from gateway.tokenizer import Tokenizer
from gateway.validation import (
    Bounds,
    check_before_tokenizing,
    check_prompt_length,
    prompt_too_long,
    resolve_max_tokens,
)
from laps.errors import DeadlineExceeded
from laps.v1 import generation_pb2, inference_pb2, scheduler_pb2


async def admit(
    request: inference_pb2.GenerateRequest,
    bounds: Bounds,
    tokenizer: Tokenizer,
    *,
    pool: str,
    disconnect_grace_s: float,
    call_time_left_s: float | None,
) -> scheduler_pb2.RequestSpec:
    """The spec to submit. Raises a LapsError that names the field.

    `call_time_left_s` is what the call's own deadline leaves; None: it has none.
    """
    check_before_tokenizing(request, bounds)
    deadline_s = deadline(request, call_time_left_s, time.time())
    prompt = await _prompt_tokens(request, bounds, tokenizer)
    stopping = _stopping(request.stopping, resolve_max_tokens(request.stopping, len(prompt), bounds))
    cancels, grace_s = disconnect_rule(request, disconnect_grace_s)
    spec = scheduler_pb2.RequestSpec(
        request_id=request.request_id or uuid.uuid4().hex,
        pool=pool,
        prompt_token_ids=pack(prompt),
        sampling=_sampling(request.sampling),
        stopping=stopping,
        priority=request.priority,
        cancel_on_disconnect=cancels,
        disconnect_grace_s=grace_s,
        deadline_s=deadline_s,
        request_class=request.request_class,
        digest=digest(request),
    )
    if request.HasField("predicted_output_tokens"):
        spec.predicted_output_tokens = request.predicted_output_tokens
    return spec


def digest(request: inference_pb2.GenerateRequest) -> bytes:
    """Identifies what was asked for: the same for every attempt to submit one request."""
    body = inference_pb2.GenerateRequest()
    body.CopyFrom(request)
    # A retry comes with what is left of its time and with an id; neither changes the output.
    for field in ("request_id", "timeout", "cancel_on_disconnect"):
        body.ClearField(field)
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def deadline(request: inference_pb2.GenerateRequest, call_time_left_s: float | None, now_s: float) -> float:
    """Seconds since the epoch at which the request must end; 0: never. Raises DeadlineExceeded."""
    left_s = [] if call_time_left_s is None else [call_time_left_s]
    if request.HasField("timeout"):
        left_s.append(request.timeout.seconds + request.timeout.nanos / 1e9)
    if not left_s:
        return 0.0
    if min(left_s) <= 0:
        raise DeadlineExceeded("the deadline has passed already")
    return now_s + min(left_s)


def disconnect_rule(request: inference_pb2.GenerateRequest, grace_s: float) -> tuple[bool, float]:
    """Whether a lost stream ends the request, and after how many seconds."""
    if request.HasField("cancel_on_disconnect"):
        return request.cancel_on_disconnect, 0.0 if request.cancel_on_disconnect else grace_s
    # Nobody can come back to an id that the client did not choose.
    return True, grace_s if request.request_id else 0.0


async def _prompt_tokens(
    request: inference_pb2.GenerateRequest, bounds: Bounds, tokenizer: Tokenizer
) -> array[int]:
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        prompt, field = array("I", request.token_ids.ids), "token_ids.ids"
    elif kind == "messages":
        turns = [(turn.role, turn.content) for turn in request.messages.messages]
        _refuse_hopeless("messages.messages", sum(tokenizer.least_tokens(text) for _, text in turns), bounds)
        prompt, field = await tokenizer.encode_chat(turns), "messages.messages"
    else:
        _refuse_hopeless("text", tokenizer.least_tokens(request.text), bounds)
        prompt, field = await tokenizer.encode(request.text), "text"
    check_prompt_length(field, len(prompt), bounds)
    return prompt


def _refuse_hopeless(field: str, least_tokens: int, bounds: Bounds) -> None:
    # Tokenizing megabytes only to count them would cost seconds.
    limit = bounds.context_tokens - 1
    if least_tokens > limit:
        raise prompt_too_long(field, f"the prompt has at least {least_tokens} tokens", limit)


def _sampling(given: generation_pb2.SamplingParams) -> generation_pb2.SamplingParams:
    filled = generation_pb2.SamplingParams(
        temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
    )
    filled.MergeFrom(given)
    return filled


def _stopping(given: generation_pb2.StoppingParams, max_tokens: int) -> generation_pb2.StoppingParams:
    return generation_pb2.StoppingParams(
        max_tokens=max_tokens,
        min_tokens=given.min_tokens,
        stop=dict.fromkeys(given.stop),
        stop_token_ids=dict.fromkeys(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
    )


def pack(token_ids: array[int]) -> bytes:
    """Little-endian unsigned 32-bit integers."""
    if sys.byteorder == "big":
        token_ids = array("I", token_ids)
        token_ids.byteswap()
    return token_ids.tobytes()


def unpack(packed: bytes) -> array[int]:
    """The inverse of `pack`. Raises ValueError for a length that is not a multiple of four."""
    token_ids = array("I")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids
