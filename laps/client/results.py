"""What the client returns: plain frozen dataclasses whose fields are named as in the protos.

Enum values are lower-case words without their prefix: "running", "stop". `dataclasses.asdict` gives JSON
types. Names say units: `_s` seconds, `_ms` milliseconds. Instants (`arrival_s`, `finished_s`, `last_seen_s`
and the like) are seconds since the Unix epoch, 0 where there is none.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """A token that was among the most probable at a position, and its natural logarithm of probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Of one output token: natural logarithms of the target's probabilities before temperature and filters.
    `top` has as many of the most probable tokens as were asked for, best first."""

    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """New output. `offset` counts the output tokens before it; `text` may lag behind `token_ids`."""

    request_id: str
    offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. `cached_tokens` are those of the prompt whose KV cache was reused."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """As the server measured it, from acceptance on: to the first slot, to the first stored token, to the
    end. `mean_itl_ms` is the mean time between tokens after the first."""

    queue_time_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    mean_itl_ms: float = 0.0
    total_time_ms: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Speculation:
    """Of `num_steps` passes of the target. `mean_acceptance_length`: tokens emitted a step, in the mean;
    `draft_acceptance_rate`: accepted over drafted, from 0 to 1. Entry a of `acceptance_histogram`, from 0,
    counts the steps in which a drafted tokens were accepted."""

    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    mean_acceptance_length: float = 0.0
    draft_acceptance_rate: float = 0.0
    acceptance_histogram: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. `finish_reason` is stop, length, cancelled, deadline or error."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    matched_stop: str = ""
    matched_stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage = Usage()
    timing: Timing = Timing()
    speculation: Speculation = Speculation()
    error: str = ""
    resumptions: int = 0
    """How often the stream broke and was taken up again."""


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that the scheduler believes about a request; see RequestInfo in the protos."""

    request_id: str
    pool: str
    state: str
    finish_reason: str
    request_class: str
    priority: int
    arrival_s: float
    deadline_s: float
    prompt_tokens: int
    max_tokens: int
    output_tokens: int
    level: int
    rank: float
    perceptible: bool
    acceptance_estimate: float
    predicted_output_tokens: float
    perceived_service_s: float
    attained_service_s: float
    num_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int
    preemptions: int
    preempted_because: str
    worker_id: str
    slot: int
    first_scheduled_s: float
    first_token_s: float
    finished_s: float
    error: str
    leased_s: float = 0.0
    acceptance_histogram: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestDetail:
    """`completion` is set once the request has ended; output only where it was asked for."""

    request: Request
    token_ids: tuple[int, ...] = ()
    text: str = ""
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class QueueLevel:
    """Level 0 is the highest. `threshold_s`: seconds of service at which the next level begins, 0 for the
    last. `head`: as many of the waiting as were asked for, in the order in which they will run."""

    level: int
    threshold_s: float
    waiting: int
    head: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class PoolQueues:
    """`leader` is the scheduler's address, `epoch` its term, `commit_seq` the last commit; `backlog_s` the
    estimated seconds of service that all live requests still need."""

    pool: str
    policy: str
    epoch: int
    commit_seq: int
    leader: str
    waiting: int
    running: int
    backlog_s: float
    levels: tuple[QueueLevel, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """`request_id` is empty where the slot is free."""

    slot: int
    request_id: str
    lease_expires_s: float


@dataclass(frozen=True, slots=True)
class Worker:
    """`draft_ms`, `verify_ms` and `switch_ms` are measured times: of one drafted token, one verification, one
    request's return to a slot. A `draining` worker refuses new leases."""

    worker_id: str
    pool: str
    device: str
    slots: tuple[Slot, ...]
    last_seen_s: float
    draining: bool
    draft_ms: float
    verify_ms: float
    switch_ms: float
    num_steps: int
    kv_used_tokens: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True)
class Model:
    """`draft` is empty where there is none; `context_tokens` are prompt and output together; `workers` and
    `slots` are those in session at present."""

    name: str
    pool: str
    target: str
    draft: str
    vocabulary_size: int
    context_tokens: int
    workers: int
    slots: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole picture at one moment (`time_s` since the Unix epoch)."""

    time_s: float
    pools: tuple[PoolQueues, ...]
    workers: tuple[Worker, ...]
    running: tuple[Request, ...]


def from_proto(cls: type[T], message: Message, **given: Any) -> T:
    """A dataclass from the message's fields of the same names; `given` values go before them."""
    descriptor = message.DESCRIPTOR.fields_by_name
    values = dict(given)
    for name, item in _fields(cls):
        if name in values or name not in descriptor:
            continue
        field = descriptor[name]
        value = getattr(message, name)
        if field.enum_type is not None:
            values[name] = enum_word(field.enum_type, value)
        elif item is not None and field.is_repeated:
            values[name] = tuple(from_proto(item, each) for each in value)
        elif item is not None:
            values[name] = from_proto(item, value)
        elif field.is_repeated:
            values[name] = tuple(value)
        elif field.has_presence and not message.HasField(name):
            values[name] = None
        else:
            values[name] = value
    return cls(**values)


def enum_word(enum_type: Any, number: int) -> str:
    """FINISH_REASON_STOP -> "stop"; unspecified -> ""."""
    known = enum_type.values_by_number.get(number)
    if known is None:
        return str(number)
    zero: str = enum_type.values_by_number[0].name
    word: str = known.name[len(zero.removesuffix("UNSPECIFIED")) :].lower()
    return "" if number == 0 else word


_FIELDS: dict[type[Any], tuple[tuple[str, type[Any] | None], ...]] = {}


def _fields(cls: type[Any]) -> tuple[tuple[str, type[Any] | None], ...]:
    """Field names, each with the dataclass inside its type, if there is one."""
    if cls not in _FIELDS:
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        _FIELDS[cls] = tuple((name, _dataclass_inside(hints[name])) for name in names)
    return _FIELDS[cls]


def _dataclass_inside(hint: Any) -> type[Any] | None:
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None
