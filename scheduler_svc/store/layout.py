"""The one home of field names: what stands in each hash, what it means, and how a value is written.

All values are text that a person can read: decimal numbers as short as they can be told
apart, `1` and `0` for yes and no, nothing for "none". Instants are seconds since the Unix epoch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler_svc.core.records import FinishReason, RequestState


@dataclass(frozen=True, slots=True)
class Field:
    """Of a hash."""

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


def number_from_text(text: str) -> float:
    """Raises ValueError for what is no number, and for NaN, which nothing can be ordered by."""
    value = float(text)
    if math.isnan(value):
        raise ValueError("not a number")
    return value


def _int(name: str, meaning: str) -> Field:
    return Field(name, meaning, str, int)


def _float(name: str, meaning: str) -> Field:
    return Field(name, meaning, _number, number_from_text)


def _bool(name: str, meaning: str) -> Field:
    return Field(name, meaning, _flag, "1".__eq__)


def _int_or_none(name: str, meaning: str) -> Field:
    return Field(name, meaning, _maybe_int, lambda text: int(text) if text else None)


def _float_or_none(name: str, meaning: str) -> Field:
    return Field(name, meaning, _maybe_float, lambda text: number_from_text(text) if text else None)


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
    _text("digest_before", "the digest of the commit before it"),
    _int("committed_ms", "its instant on the leader's clock, in ms"),
    _int("journal_seq", "number of the last commit that wrote to the journal"),
    _int("journal_from", "number of the first commit whose entry in the journal is still needed"),
    _int("resumed_seq", "number of the last commit when an operator last accepted the store as it was"),
    _text("policy", "name of the policy in force"),
    _text(
        "level_thresholds_s",
        "JSON list: below how many seconds a request is at level i, of service needed or had, by the policy",
    ),
    _int("levels", "how many levels have ever been used"),
    _int("backlog_us", "sum of perceived_s over all live requests, in microseconds"),
)
"""`meta`."""

LEADER_FIELDS = (
    _int("epoch", "grows with every new leadership; every write checks it"),
    _text("holder", "who leads; empty: nobody"),
    _text("address", "where to reach it"),
    _int("expires_ms", "until when, on the store's clock, in ms"),
    _int("ttl_ms", "how long each renewal of it lasts, in ms"),
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
