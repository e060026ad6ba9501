"""From a caller's arguments to a GenerateRequest. What cannot be sent is refused here by name."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from laps.errors import InvalidArgument
from laps.v1 import inference_pb2 as pb

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or the messages of a chat ({"role": ..., "content": ...})."""


_MAX_TIMEOUT_S = 315_576_000_000
"""What a google.protobuf.Duration holds: ten thousand years."""
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`. What is left out takes the model's default."""

    model: str
    max_tokens: int
    min_tokens: int
    temperature: float
    """0, the default, is greedy."""
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    """By token id: added to its score, in [-100, 100]."""
    seed: int
    """The output then depends on model, prompt, parameters and seed alone."""
    logprobs: int
    """0: of the chosen token; k: of the k likeliest too."""
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    priority: int
    """In [-100, 100]; higher runs first."""
    timeout_s: float
    """The request ends as "deadline" after this time."""
    cancel_on_disconnect: bool
    request_class: str
    predicted_output_tokens: int
    request_id: str
    """Idempotency key; the client makes one where none is given."""


_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "logprobs",
)
_STOPPING = ("max_tokens", "min_tokens", "ignore_eos")
_TOP = ("model", "priority", "cancel_on_disconnect", "request_class", "predicted_output_tokens", "request_id")


def build_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """Raises InvalidArgument, naming the field, for what no message can hold; the rest the server judges."""
    given = {name: value for name, value in cast("dict[str, Any]", options).items() if value is not None}
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    for name in _SAMPLING:
        _set(request.sampling, name, given.pop(name, None), "sampling.")
    _update(request.sampling.logit_bias, given.pop("logit_bias", {}), "sampling.logit_bias")
    for name in _STOPPING:
        _set(request.stopping, name, given.pop(name, None), "stopping.")
    for name in _TOP:
        _set(request, name, given.pop(name, None))
    stop = given.pop("stop", ())
    _extend(request.stopping.stop, [stop] if isinstance(stop, str) else stop, "stopping.stop")
    _extend(request.stopping.stop_token_ids, given.pop("stop_token_ids", ()), "stopping.stop_token_ids")
    if (timeout_s := given.pop("timeout_s", None)) is not None:
        try:
            request.timeout.FromNanoseconds(int(timeout_s * 1e9))
        except (ValueError, OverflowError):
            raise InvalidArgument(
                "timeout", f"{timeout_s} cannot be sent: it must be seconds, {_MAX_TIMEOUT_S} at most"
            ) from None
    if given:
        raise TypeError(f"generate() has no argument {next(iter(given))!r}")
    if not request.request_id:
        request.request_id = uuid.uuid4().hex
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _set(request, "text", prompt)
        return
    if not isinstance(prompt, Sequence):
        raise InvalidArgument("prompt", f"must be text, token ids or messages, not {type(prompt).__name__}")
    if prompt and isinstance(prompt[0], Mapping):
        for index, message in enumerate(cast("Sequence[Mapping[str, str]]", prompt)):
            added = request.messages.messages.add()
            for key, value in message.items():
                _set(added, key, value, f"messages[{index}].")
        return
    # Also for no ids at all: the server says what is wrong with that.
    request.token_ids.SetInParent()
    _extend(request.token_ids.ids, cast("Sequence[int]", prompt), "token_ids")


def _set(message: Message, name: str, value: Any, path: str = "") -> None:
    if value is None:
        return
    try:
        setattr(message, name, value)
    except (ValueError, TypeError, AttributeError) as error:
        field = message.DESCRIPTOR.fields_by_name.get(name)
        bounds = _INTEGERS.get(field.cpp_type) if field is not None and isinstance(value, int) else None
        why = f"it must be between {bounds[0]} and {bounds[1]}" if bounds else _short(error)
        raise InvalidArgument(path + name, f"{_short(value)} cannot be sent: {why}") from None


def _extend(field: Any, values: Iterable[Any], path: str) -> None:
    try:
        field.extend(values)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(path, f"cannot be sent: {_short(error)}") from None


def _update(field: Any, values: Mapping[Any, Any], path: str) -> None:
    try:
        field.update(values)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(path, f"cannot be sent: {_short(error)}") from None


def _short(value: object) -> str:
    shown = str(value) if isinstance(value, Exception) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
