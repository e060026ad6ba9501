"""What a request may ask for. Everything is refused here by its field's name, before anything is stored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from laps.errors import FieldViolation, InvalidArgument, NotFound, Reason
from laps.limits import INT32_MAX, MAX_LOGPROBS, MAX_PRIORITY, MAX_REQUEST_ID_CHARS
from laps.security.principal import TENANT_NAME, TENANT_SEPARATOR
from laps.v1 import generation_pb2, inference_pb2

MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY = float.fromhex("0x1.47ae14p-7")
"""0.01, as requests carry it. Near zero it would divide scores beyond what they can be."""
MAX_REPETITION_PENALTY = 100.0
MAX_ADDED_PENALTY = 2.0
"""Of frequency and presence, either way."""
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 300
"""The scheduler reads each of them, some microseconds long."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_MESSAGES = 1024
MAX_ROLE_CHARS = 64
MAX_REQUEST_CLASS_CHARS = 64

_NAME_CHARS = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the model and the settings allow."""

    model_name: str
    vocabulary_size: int
    context_tokens: int
    default_max_tokens: int


class _Violations:
    """Collects what is wrong, so that a client learns all of it at once."""

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []
        self.reason = Reason.FIELD_INVALID
        self.metadata: dict[str, int] = {}

    def add(self, field: str, description: str, reason: Reason | None = None, **metadata: int) -> None:
        if not self.found and reason is not None:
            self.reason = reason
            self.metadata = metadata
        self.found.append(FieldViolation(field, description))

    def whole(self, field: str, value: int, low: int, high: int) -> None:
        if not low <= value <= high:
            self.add(field, f"must be between {low} and {high}, not {value}")

    def number(self, field: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
        if not math.isfinite(value):
            self.add(field, f"must be a finite number, not {value}")
        elif not low <= value <= high or (open_low and value == low):
            bound = "above" if open_low else "at least"
            self.add(field, f"must be {bound} {low:g} and at most {high:g}, not {value:g}")

    def raise_first(self) -> None:
        """Raises InvalidArgument: its message tells the first one, its details all."""
        if self.found:
            first = self.found[0]
            error = InvalidArgument(first.field, first.description, reason=self.reason, **self.metadata)
            error.violations = tuple(self.found)
            raise error


def check_request_id(request_id: str, *, in_pool: bool = False) -> None:
    """For calls on a request that exists: the id must be given. `in_pool`: it may be TENANT:ID."""
    violations = _Violations()
    if in_pool:
        tenant, _, own_id = request_id.rpartition(TENANT_SEPARATOR)
        request_id = own_id if TENANT_NAME.fullmatch(tenant) else request_id
    if not request_id:
        violations.add("request_id", "must be given")
    else:
        _check_name(violations, "request_id", request_id, MAX_REQUEST_ID_CHARS)
    violations.raise_first()


def check_model(model: str, bounds: Bounds) -> None:
    """Raises NotFound with the models that there are. An empty name means the only one."""
    if model and model != bounds.model_name:
        raise NotFound(
            f"there is no model {model[:MAX_REQUEST_ID_CHARS]!r} here; there is {bounds.model_name!r}",
            reason=Reason.MODEL_UNKNOWN,
            metadata={"models": bounds.model_name},
            resource_type="model",
            resource_name=model[:MAX_REQUEST_ID_CHARS],
        )


def check_before_tokenizing(request: inference_pb2.GenerateRequest, bounds: Bounds) -> None:
    """Everything that can be judged without the prompt's length in tokens."""
    check_model(request.model, bounds)
    violations = _Violations()
    if request.request_id:
        _check_name(violations, "request_id", request.request_id, MAX_REQUEST_ID_CHARS)
    if request.request_class:
        _check_name(violations, "request_class", request.request_class, MAX_REQUEST_CLASS_CHARS)
    violations.whole("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    if request.HasField("predicted_output_tokens"):
        violations.whole("predicted_output_tokens", request.predicted_output_tokens, 1, INT32_MAX)
    if request.HasField("timeout"):
        _check_timeout(violations, request.timeout)
    _check_sampling(violations, request.sampling, bounds)
    _check_stopping(violations, request.stopping, bounds)
    _check_prompt(violations, request, bounds)
    violations.raise_first()


def check_prompt_length(field: str, prompt_tokens: int, bounds: Bounds) -> None:
    """A prompt must leave room for one output token."""
    if prompt_tokens == 0:
        raise InvalidArgument(field, "the prompt has no tokens", reason=Reason.PROMPT_EMPTY)
    limit = bounds.context_tokens - 1
    if prompt_tokens > limit:
        raise prompt_too_long(field, f"the prompt has {prompt_tokens} tokens", limit)


def prompt_too_long(field: str, finding: str, limit_tokens: int) -> InvalidArgument:
    message = f"{finding}; at most {limit_tokens} fit the model's context beside one output token"
    return InvalidArgument(field, message, reason=Reason.PROMPT_TOO_LONG, limit_tokens=limit_tokens)


def resolve_max_tokens(stopping: generation_pb2.StoppingParams, prompt_tokens: int, bounds: Bounds) -> int:
    """The output's bound in tokens. Raises InvalidArgument where the context is too small for it."""
    room = bounds.context_tokens - prompt_tokens
    if not stopping.HasField("max_tokens"):
        # min_tokens says that the client wants more than the default.
        wanted = max(bounds.default_max_tokens, stopping.min_tokens)
        max_tokens = min(wanted, room)
    else:
        max_tokens = stopping.max_tokens
    if max_tokens > room:
        raise InvalidArgument(
            "stopping.max_tokens",
            f"{max_tokens} do not fit: the prompt's {prompt_tokens} tokens leave {room} of the context's "
            f"{bounds.context_tokens}",
            reason=Reason.PROMPT_TOO_LONG,
            limit_tokens=room,
        )
    if stopping.min_tokens > max_tokens:
        raise InvalidArgument(
            "stopping.min_tokens",
            f"{stopping.min_tokens} is more than the {max_tokens} tokens that the output may have",
        )
    return max_tokens


def _check_name(violations: _Violations, field: str, value: str, max_chars: int) -> None:
    if len(value) > max_chars:
        violations.add(field, f"must have at most {max_chars} characters, not {len(value)}")
    elif not _NAME_CHARS.fullmatch(value):
        violations.add(field, "may consist of [A-Za-z0-9._-] only")


def _check_timeout(violations: _Violations, timeout: Duration) -> None:
    seconds, nanos = timeout.seconds, timeout.nanos
    if abs(nanos) >= 1_000_000_000 or abs(seconds) > 315_576_000_000 or seconds * nanos < 0:
        violations.add("timeout", "is not a valid duration")
    elif seconds * 1_000_000_000 + nanos <= 0:
        violations.add("timeout", f"must be more than 0 s, not {seconds + nanos / 1e9:g} s")


def _check_sampling(violations: _Violations, sampling: generation_pb2.SamplingParams, bounds: Bounds) -> None:
    if sampling.HasField("temperature"):
        violations.number("sampling.temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    if sampling.HasField("top_p"):
        violations.number("sampling.top_p", sampling.top_p, 0.0, 1.0, open_low=True)
    if sampling.HasField("top_k"):
        violations.whole("sampling.top_k", sampling.top_k, 0, INT32_MAX)
    if sampling.HasField("min_p"):
        violations.number("sampling.min_p", sampling.min_p, 0.0, 1.0)
    if sampling.HasField("repetition_penalty"):
        violations.number(
            "sampling.repetition_penalty",
            sampling.repetition_penalty,
            MIN_REPETITION_PENALTY,
            MAX_REPETITION_PENALTY,
        )
    for name in ("frequency_penalty", "presence_penalty"):
        violations.number(f"sampling.{name}", getattr(sampling, name), -MAX_ADDED_PENALTY, MAX_ADDED_PENALTY)
    _check_biases(violations, sampling.logit_bias, bounds)
    if sampling.HasField("logprobs"):
        violations.whole("sampling.logprobs", sampling.logprobs, 0, MAX_LOGPROBS)


def _check_biases(violations: _Violations, biases: Mapping[int, float], bounds: Bounds) -> None:
    if len(biases) > MAX_BIASED_TOKENS:
        problem = f"must be at most {MAX_BIASED_TOKENS} tokens, not {len(biases)}"
        violations.add("sampling.logit_bias", problem)
        return
    for token_id, bias in biases.items():
        field = f"sampling.logit_bias[{token_id}]"
        if not _check_token_id(violations, field, token_id, bounds):
            return
        violations.number(field, bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)


def _check_stopping(violations: _Violations, stopping: generation_pb2.StoppingParams, bounds: Bounds) -> None:
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        violations.add("stopping.max_tokens", f"must be at least 1, not {stopping.max_tokens}")
    if stopping.HasField("min_tokens"):
        if stopping.min_tokens < 0:
            violations.add("stopping.min_tokens", f"must be at least 0, not {stopping.min_tokens}")
        elif stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens:
            difference = f"{stopping.min_tokens} is more than max_tokens, {stopping.max_tokens}"
            violations.add("stopping.min_tokens", difference)
    if len(stopping.stop) > MAX_STOP_STRINGS:
        violations.add(
            "stopping.stop", f"must be at most {MAX_STOP_STRINGS} strings, not {len(stopping.stop)}"
        )
    else:
        for index, text in enumerate(stopping.stop):
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                field = f"stopping.stop[{index}]"
                violations.add(field, f"must have 1 to {MAX_STOP_CHARS} characters, not {len(text)}")
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        count = len(stopping.stop_token_ids)
        violations.add("stopping.stop_token_ids", f"must be at most {MAX_STOP_TOKEN_IDS} ids, not {count}")
    else:
        _check_token_ids(violations, "stopping.stop_token_ids", stopping.stop_token_ids, bounds)


def _check_prompt(violations: _Violations, request: inference_pb2.GenerateRequest, bounds: Bounds) -> None:
    match request.WhichOneof("prompt"):
        case None:
            problem = "must be given: one of text, token_ids, messages"
            violations.add("prompt", problem, Reason.PROMPT_EMPTY)
        case "text":
            if not request.text:
                violations.add("text", "the prompt must not be empty", Reason.PROMPT_EMPTY)
        case "token_ids":
            ids = request.token_ids.ids
            if not ids:
                violations.add("token_ids.ids", "the prompt must not be empty", Reason.PROMPT_EMPTY)
            elif len(ids) >= bounds.context_tokens:
                limit = bounds.context_tokens - 1
                error = prompt_too_long("token_ids.ids", f"the prompt has {len(ids)} tokens", limit)
                problem = error.violations[0].description
                violations.add("token_ids.ids", problem, Reason.PROMPT_TOO_LONG, limit_tokens=limit)
            else:
                _check_token_ids(violations, "token_ids.ids", ids, bounds)
        case "messages":
            _check_messages(violations, request.messages.messages)


def _check_messages(violations: _Violations, messages: Iterable[generation_pb2.ChatMessage]) -> None:
    turns = list(messages)
    if not turns:
        violations.add("messages.messages", "the prompt must not be empty", Reason.PROMPT_EMPTY)
    elif len(turns) > MAX_MESSAGES:
        violations.add("messages.messages", f"must be at most {MAX_MESSAGES}, not {len(turns)}")
    else:
        for index, turn in enumerate(turns):
            if not 1 <= len(turn.role) <= MAX_ROLE_CHARS:
                field = f"messages.messages[{index}].role"
                violations.add(field, f"must have 1 to {MAX_ROLE_CHARS} characters, not {len(turn.role)}")


def _check_token_ids(violations: _Violations, field: str, ids: Iterable[int], bounds: Bounds) -> None:
    size = bounds.vocabulary_size
    for index, token_id in enumerate(ids):
        if token_id >= size:
            _check_token_id(violations, f"{field}[{index}]", token_id, bounds)
            return


def _check_token_id(violations: _Violations, field: str, token_id: int, bounds: Bounds) -> bool:
    size = bounds.vocabulary_size
    if token_id >= size:
        problem = f"{token_id} is not in the vocabulary of {size} tokens"
        violations.add(field, problem, Reason.TOKEN_UNKNOWN, vocabulary_size=size)
    return token_id < size
