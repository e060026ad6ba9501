"""The one home of field names: how records become hashes, and back.

All values are text that a person can read: decimal numbers as short as they can be told
apart, `1` and `0` for yes and no, nothing for "none". Instants are seconds since the Unix epoch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from scheduler_svc.core.records import (
    TOKEN_BYTES,
    FinishReason,
    Request,
    RequestSpec,
    RequestState,
    StepCosts,
    Worker,
)
from scheduler_svc.store.errors import RecordDamaged

PRIORITY_STEP = 1e10
"""Distance in score between two priorities."""
RANK_LIMIT = 4.9e9
"""Ranks beyond it count as it, so that the ranges of two priorities cannot overlap."""


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    meaning: str
    encode: Callable[[Any], str]
    decode: Callable[[str], Any]
    absent: str | None = None
    """What its absence means, in a record of a version that did not have it yet; None: damage."""


def _flag(value: bool) -> str:
    return "1" if value else "0"


def _maybe_int(value: int | None) -> str:
    return "" if value is None else str(value)


def _number(value: float) -> str:
    return repr(float(value))  # float(): a NumPy scalar's repr is no number


def _maybe_float(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _numbers(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _text(name: str, meaning: str) -> Field:
    return Field(name, meaning, str, str)


def _readable(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError("not a number")
    return value


def _int(name: str, meaning: str) -> Field:
    return Field(name, meaning, str, int)


def _float(name: str, meaning: str) -> Field:
    return Field(name, meaning, _number, _readable)


def _bool(name: str, meaning: str) -> Field:
    return Field(name, meaning, _flag, "1".__eq__)


def _int_or_none(name: str, meaning: str) -> Field:
    return Field(name, meaning, _maybe_int, lambda text: int(text) if text else None)


def _float_or_none(name: str, meaning: str) -> Field:
    return Field(name, meaning, _maybe_float, lambda text: _readable(text) if text else None)


_STATES = {state.value: state for state in RequestState}
"""A look-up costs a tenth of `RequestState(text)`."""

LEADING_FIELDS = (
    Field("state", "queued, running, preempted or finished", str, _STATES.__getitem__),
    _int("log_entries", "entries of its token log"),
    _int("output_tokens", "tokens in its log; a running request may have more in the journal"),
    _text("queue", "level whose queue it waits in, empty: none; written by the commit function"),
    _int("priority", "higher runs before lower"),
    _int("arrival_seq", "order of acceptance"),
    _float("perceived_s", "estimated seconds of service still needed"),
)
"""First, because the commit function reads them at every step and a small hash is searched from its front."""

CHANGING_FIELDS = (
    LEADING_FIELDS[0],
    LEADING_FIELDS[6],
    _int("steps", "verification passes"),
    _int("drafted_tokens", "tokens drafted for it"),
    _int("accepted_tokens", "drafted tokens that the target accepted"),
    Field(
        "acceptance_histogram",
        "entry a, from 0, counts the steps in which a drafted tokens were accepted",
        _numbers,
        lambda text: [int(n) for n in text.split(",")] if text else [],
    ),
    _float("attained_s", "seconds of decoding had"),
    _float_or_none("last_token_s", "instant of its last token"),
    _float("acceptance_estimate", "expected share of drafted tokens that the target accepts"),
    _float("predicted_output_tokens", "expected length of its output"),
    _bool("perceptible", "whether the remaining time can be estimated"),
    _int("level", "queue level, 0 is the highest"),
    _float("rank", "order inside the level, lower runs earlier"),
    _text("worker_id", "where it runs, or where its KV cache was last seen"),
    _int("slot", "slot on that worker"),
    _int("lease_id", "its lease, 0: none"),
    _bool("releasing", "preempted, but the worker has not let go yet"),
    _bool("kv_resident", "whether that worker is believed to hold its KV cache"),
    _int("preemptions", "how often it lost its slot"),
    _text("preempted_because", "why, the last time"),
    _float_or_none("first_scheduled_s", "instant of its first slot"),
    _float_or_none("first_token_s", "instant of its first token"),
    _int("cached_tokens", "prompt tokens whose KV cache was reused"),
    _float_or_none("finished_s", "instant of its end"),
    Field(
        "finish_reason",
        "stop, length, cancelled, deadline or error",
        lambda value: "" if value is None else value.value,
        lambda text: FinishReason(text) if text else None,
    ),
    _text("matched_stop", "the stop string that ended it"),
    _int_or_none("matched_stop_token_id", "the stop token that ended it"),
    _text("error", "why it failed"),
    dataclasses.replace(
        _float_or_none("leased_s", "instant of the slot that it holds, or held last"), absent=""
    ),
)
"""What a tick may change. Each is an attribute of `Request`."""

SPEC_FIELDS = (
    _float("arrival_s", "instant of acceptance"),
    _text("request_class", "the client's class of requests"),
    _int("prompt_tokens", "length of the prompt"),
    _int("max_tokens", "output tokens at most"),
    _float_or_none("client_predicted_output_tokens", "the client's estimate of the output length"),
    _float_or_none("deadline_s", "instant at which it ends in any case"),
    _bool("cancel_on_disconnect", "whether a lost stream cancels it"),
    _float("disconnect_grace_s", "how long after the loss"),
    _text("digest", "digest of the client's request; the same id with another one is refused"),
    # Written since 0.2: a request that is older has none.
    dataclasses.replace(
        _text("traceparent", "W3C trace context that its spans belong to; empty: none"), absent=""
    ),
)
"""Written once."""

REQUEST_FIELDS = LEADING_FIELDS + tuple(f for f in CHANGING_FIELDS if f not in LEADING_FIELDS) + SPEC_FIELDS
"""`request:REQUEST`, in the order in which a new hash is written."""

REQUEST_NAMES: tuple[str, ...] = tuple(field.name for field in REQUEST_FIELDS)
CHANGING_NAMES: tuple[str, ...] = tuple(field.name for field in CHANGING_FIELDS)
ABSENT = {field.name: field.absent for field in REQUEST_FIELDS if field.absent is not None}
CHANGING_ENCODERS: tuple[Callable[[Any], str], ...] = tuple(field.encode for field in CHANGING_FIELDS)

WORKER_FIELDS = (
    _text("device", "for example cpu or cuda:0"),
    _int("slots", "requests that it runs at once"),
    _bool("draining", "refuses new leases"),
    _float("last_seen_s", "instant of its last message"),
    _int("steps", "steps reported"),
    _float("draft_token_s", "measured seconds of one drafted token"),
    _float("verify_s", "measured seconds of one verification"),
    _float("prefill_token_s", "measured seconds of one prompt token"),
    _float("switch_s", "measured seconds of one request's return to a slot"),
    _int("kv_used_tokens", "tokens in its KV cache"),
    _int("kv_capacity_tokens", "tokens that its KV cache holds"),
    _text("target", "target model"),
    _text("draft", "draft model"),
    _text("model_fingerprint", "digest of both models"),
    _int("vocabulary_size", "token ids lie below it"),
    _int("context_tokens", "prompt and output at most"),
)
"""`worker:WORKER`."""

META_FIELDS = (
    _int("schema", "version of this layout"),
    _int("timeline", "grows when an operator accepts a store that has lost something, from 1"),
    _int("commit_seq", "number of the last commit; never falls in a timeline"),
    _text("commit_digest", "its digest"),
    _int("committed_ms", "its instant on the leader's clock, in ms"),
    _text("policy", "name of the policy in force"),
    _text("level_thresholds_s", "JSON list: attained seconds at which a request leaves level i downwards"),
    _int("levels", "levels that have ever been used"),
    _int("backlog_us", "sum of perceived_s over all live requests, in microseconds"),
)
"""`meta`."""

LEADER_FIELDS = (
    _int("epoch", "grows with every new leadership; every write checks it"),
    _text("holder", "who leads; empty: nobody"),
    _text("address", "where to reach it"),
    _int("expires_ms", "until when, on the store's clock, in ms"),
)
"""`leader`."""

STOPPED_FIELDS = (
    _text("by", "the scheduler that raised the alarm"),
    _text("reason", "what it saw; begins with the code of a refusal"),
    _int("at_ms", "when, on the store's clock, in ms"),
    _int("seen_timeline", "of the furthest point of the history that is known to have been stored"),
    _int("seen_epoch", "its epoch"),
    _int("seen_commit_seq", "its last commit"),
    _int("stored_timeline", "of the point where the store was found"),
    _int("stored_epoch", "its epoch"),
    _int("stored_commit_seq", "its last commit"),
)
"""`stopped`."""


def queue_score(priority: int, rank: float, arrival_seq: int) -> float:
    """Score of a waiting request; the commit function computes the same.

    Priority first, then rank, then arrival. Arrival counts in units of the last place of the
    number, so it decides only between ranks that are equal (to about 1 in 4e15 per arrival
    between them).
    """
    base = max(-RANK_LIMIT, min(RANK_LIMIT, rank)) - priority * PRIORITY_STEP
    _, exponent = math.frexp(max(abs(base), 1.0))
    return base + math.ldexp(arrival_seq, exponent - 53)


def tokens_to_text(packed: bytes) -> str:
    """Packed token ids as decimal text, separated by spaces."""
    tokens = len(packed) // TOKEN_BYTES
    if tokens < len(_FORMATS):
        # Twice to three times as fast: it runs for every record that is written.
        unpack, text = _FORMATS[tokens]
        return text % unpack(packed)
    return " ".join(map(str, _unpacked(packed)))


def tokens_from_text(text: str | bytes) -> bytes:
    if not text:
        return b""
    # Five times as fast as int() for each of them: recovery reads every prompt.
    return np.fromstring(text, dtype="<u4", sep=" ").tobytes()


_FORMATS = [(struct.Struct(f"<{n}I").unpack, " ".join(["%d"] * n)) for n in range(257)]
"""By number of tokens."""
_SWAP = array("I", [1]).tobytes() != b"\x01\0\0\0"


def _unpacked(packed: bytes) -> array[int]:
    tokens = array("I", packed)
    if _SWAP:
        tokens.byteswap()
    return tokens


def changing_values(r: Request) -> tuple[Any, ...]:
    """Values of `CHANGING_FIELDS`. Spelt out, because this runs for every request of every tick."""
    return (
        r.state,
        r.perceived_s,
        r.steps,
        r.drafted_tokens,
        r.accepted_tokens,
        tuple(r.acceptance_histogram),
        r.attained_s,
        r.last_token_s,
        r.acceptance_estimate,
        r.predicted_output_tokens,
        r.perceptible,
        r.level,
        r.rank,
        r.worker_id,
        r.slot,
        r.lease_id,
        r.releasing,
        r.kv_resident,
        r.preemptions,
        r.preempted_because,
        r.first_scheduled_s,
        r.first_token_s,
        r.cached_tokens,
        r.finished_s,
        r.finish_reason,
        r.matched_stop,
        r.matched_stop_token_id,
        r.error,
        r.leased_s,
    )


def request_values(request: Request) -> dict[str, Any]:
    """Values of `REQUEST_FIELDS` by name. Where it waits (`queue`) is not known to a request."""
    spec = request.spec
    return dict(zip(CHANGING_NAMES, changing_values(request), strict=True)) | {
        "log_entries": request.log_entries,
        "output_tokens": request.output_tokens,
        "queue": "",
        "priority": spec.priority,
        "arrival_seq": request.arrival_seq,
        "arrival_s": request.arrival_s,
        "request_class": spec.request_class,
        "prompt_tokens": spec.prompt_tokens,
        "max_tokens": spec.max_tokens,
        "client_predicted_output_tokens": spec.predicted_output_tokens,
        "deadline_s": spec.deadline_s,
        "cancel_on_disconnect": spec.cancel_on_disconnect,
        "disconnect_grace_s": spec.disconnect_grace_s,
        "digest": spec.digest,
        "traceparent": spec.traceparent,
    }


def new_request_fields(request: Request) -> list[str]:
    """Names and values, alternating, of a request that is new to the store. Its log is empty there."""
    values = request_values(request) | {"log_entries": 0, "output_tokens": 0}
    return [text for f in REQUEST_FIELDS for text in (f.name, f.encode(values[f.name]))]


def worker_fields(worker: Worker) -> list[str]:
    """Names and values, alternating."""
    costs = worker.costs
    values = {
        "draft_token_s": costs.draft_token_s,
        "verify_s": costs.verify_s,
        "prefill_token_s": costs.prefill_token_s,
        "switch_s": costs.switch_s,
    }
    texts = []
    for f in WORKER_FIELDS:
        texts.append(f.name)
        texts.append(f.encode(values[f.name] if f.name in values else getattr(worker, f.name)))
    return texts


def decode_fields(fields: Sequence[Field], stored: Mapping[str, str]) -> dict[str, Any]:
    """Typed values by name. Fields that are not stored are missing."""
    return {f.name: f.decode(stored[f.name]) for f in fields if f.name in stored}


DAMAGE = (ValueError, KeyError, TypeError, OverflowError)
"""What decoding raises where something else is stored than was written."""


def damaged(request_id: str, error: Exception) -> RecordDamaged:
    # Not the error's words: they may hold a part of the prompt.
    what = f"no {error.args[0]}" if isinstance(error, KeyError) else type(error).__name__
    return RecordDamaged(f"the record of request {request_id} cannot be read: {what}")


@contextmanager
def damage(request_id: str) -> Iterator[None]:
    """Raises RecordDamaged for what cannot be decoded inside the block."""
    try:
        yield
    except DAMAGE as error:
        raise damaged(request_id, error) from error


@lru_cache(maxsize=256)
def params_from_text(text: str) -> str:
    """The parameters, as they were stored. Raises ValueError for what is no JSON object.

    Most requests of a pool have the same few: of those that have, one text is kept.
    """
    if not isinstance(json.loads(text), dict):
        raise ValueError("its parameters are no JSON object")
    return text


_NEW = Request(RequestSpec("", b"", 1), 0.0)
_PLACES = {name: place for place, name in enumerate(REQUEST_NAMES)}
_CHANGING = tuple(
    (_PLACES[f.name], f.name, f.encode(getattr(_NEW, f.name)), f.decode) for f in CHANGING_FIELDS
)
"""Place in `REQUEST_FIELDS`, name, the text of what a new `Request` has anyway, and decoder."""
_written_once = itemgetter(*(_PLACES[f.name] for f in SPEC_FIELDS))
_counts = itemgetter(*(_PLACES[name] for name in ("log_entries", "priority", "arrival_seq")))


def request_from_fields(
    request_id: str,
    stored: Mapping[str, str],
    *,
    prompt: bytes = b"",
    params_json: str = "{}",
    output: bytes = b"",
) -> Request:
    """The request as it was stored. Without `prompt` its spec has none. Raises what `damage` translates."""
    values = [stored[name] if name in stored else ABSENT[name] for name in REQUEST_NAMES]
    return request_from_values(request_id, values, prompt, params_json, output)


def request_from_values(
    request_id: str, values: Sequence[str], prompt: bytes, params_json: str, output: bytes
) -> Request:
    """The same of the values of all `REQUEST_FIELDS`, in their order. Spelt out, because a new leader does it
    for every request that waits."""
    (
        arrival_s,
        request_class,
        _prompt_tokens,
        max_tokens,
        predicted_output_tokens,
        deadline_s,
        cancel_on_disconnect,
        disconnect_grace_s,
        digest,
        traceparent,
    ) = _written_once(values)
    log_entries, priority, arrival_seq = _counts(values)
    request = Request(
        RequestSpec(
            request_id,
            prompt,
            int(max_tokens),
            params_json,
            request_class,
            int(priority),
            _readable(predicted_output_tokens) if predicted_output_tokens else None,
            _readable(deadline_s) if deadline_s else None,
            cancel_on_disconnect == "1",
            _readable(disconnect_grace_s),
            digest,
            traceparent,
        ),
        _readable(arrival_s),
        int(arrival_seq),
        output=bytearray(output),
        log_entries=int(log_entries),
    )
    for place, name, usual, decode in _CHANGING:
        text = values[place]
        if text != usual:
            setattr(request, name, decode(text))
    return request


WAITING_NAMES = (
    "priority",
    "arrival_seq",
    "perceived_s",
    "acceptance_estimate",
    "predicted_output_tokens",
    "perceptible",
    "level",
    "rank",
    *(field.name for field in SPEC_FIELDS),
)
"""What has to be read of a request that is queued and has never run: the rest is as in every new one."""


def waiting_request(
    request_id: str,
    priority: str,
    arrival_seq: str,
    perceived_s: str,
    acceptance_estimate: str,
    predicted_output_tokens: str,
    perceptible: str,
    level: str,
    rank: str,
    arrival_s: str,
    request_class: str,
    prompt_tokens: str,
    max_tokens: str,
    client_predicted_output_tokens: str,
    deadline_s: str,
    cancel_on_disconnect: str,
    disconnect_grace_s: str,
    digest: str,
    traceparent: str,
    prompt: str,
    params_json: str,
) -> Request:
    """A queued request that has never run, of the values of `WAITING_NAMES` in their order. Spelt out,
    because a new leader does it for everything that waits. Raises what `damage` translates."""
    prompt_ids = tokens_from_text(prompt)
    if len(prompt_ids) != TOKEN_BYTES * int(prompt_tokens):
        raise ValueError("its prompt has another length")
    request = Request(
        RequestSpec(
            request_id,
            prompt_ids,
            int(max_tokens),
            params_json,
            request_class,
            int(priority),
            _readable(client_predicted_output_tokens) if client_predicted_output_tokens else None,
            _readable(deadline_s) if deadline_s else None,
            cancel_on_disconnect == "1",
            _readable(disconnect_grace_s),
            digest,
            traceparent,
        ),
        _readable(arrival_s),
        int(arrival_seq),
    )
    request.perceived_s = _readable(perceived_s)
    request.acceptance_estimate = _readable(acceptance_estimate)
    request.predicted_output_tokens = _readable(predicted_output_tokens)
    request.perceptible = perceptible == "1"
    request.level = int(level)
    request.rank = _readable(rank)
    return request


def worker_from_fields(worker_id: str, stored: Mapping[str, str]) -> Worker:
    values = decode_fields(WORKER_FIELDS, stored)
    costs = StepCosts(
        *(values.pop(name) for name in ("draft_token_s", "verify_s", "prefill_token_s", "switch_s"))
    )
    return Worker(worker_id=worker_id, costs=costs, **values)
