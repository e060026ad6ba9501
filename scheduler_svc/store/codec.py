"""How records become the fields of hashes (`scheduler_svc.store.layout`), and back."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from scheduler_svc.core.records import TOKEN_BYTES, Request, RequestSpec, Worker, unpacked
from scheduler_svc.store.errors import RecordDamaged
from scheduler_svc.store.layout import (
    CHANGING_FIELDS,
    REQUEST_FIELDS,
    SPEC_FIELDS,
    WORKER_FIELDS,
    Field,
    number_from_text,
)

REQUEST_NAMES: tuple[str, ...] = tuple(field.name for field in REQUEST_FIELDS)
CHANGING_NAMES: tuple[str, ...] = tuple(field.name for field in CHANGING_FIELDS)
ABSENT = {field.name: field.absent for field in REQUEST_FIELDS if field.absent is not None}
CHANGING_ENCODERS: tuple[Callable[[Any], str], ...] = tuple(field.encode for field in CHANGING_FIELDS)

PRIORITY_STEP = 1e10
"""Distance in score between two priorities."""
RANK_LIMIT = 4.9e9
"""Ranks beyond it count as it, so that the ranges of two priorities cannot overlap."""


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
    return " ".join(map(str, unpacked(packed)))


def tokens_from_text(text: str | bytes) -> bytes:
    if not text:
        return b""
    # Five times as fast as int() for each of them: recovery reads every prompt.
    return np.fromstring(text, dtype="<u4", sep=" ").tobytes()


class PromptText:
    """A prompt as it is stored. A new leader reads those of a whole queue, and needs each when its request
    gets a slot: until then it stays text.

    Raises ValueError for anything but so many numbers, with a space between.
    """

    __slots__ = ("_text", "_tokens")

    def __init__(self, text: str, tokens: int) -> None:
        between = text.encode().translate(None, b"0123456789")
        if tokens < 1 or len(between) != tokens - 1 or between.strip(b" ") or "  " in f" {text} ":
            raise ValueError("not so many tokens")
        self._text = text
        self._tokens = tokens

    @property
    def tokens(self) -> int:
        return self._tokens

    def packed(self) -> bytes:
        return tokens_from_text(self._text)

    def __eq__(self, other: object) -> bool:
        return self.packed() == (other.packed() if isinstance(other, PromptText) else other)

    def __hash__(self) -> int:
        return hash(self.packed())


_FORMATS = [(struct.Struct(f"<{n}I").unpack, " ".join(["%d"] * n)) for n in range(257)]
"""By number of tokens."""


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
            number_from_text(predicted_output_tokens) if predicted_output_tokens else None,
            number_from_text(deadline_s) if deadline_s else None,
            cancel_on_disconnect == "1",
            number_from_text(disconnect_grace_s),
            digest,
            traceparent,
        ),
        number_from_text(arrival_s),
        int(arrival_seq),
        output=bytearray(output),
        log_entries=int(log_entries),
    )
    for place, name, usual, decode in _CHANGING:
        text = values[place]
        if text != usual:
            setattr(request, name, decode(text))
    return request


def readable_request_values(stored: Mapping[str, str]) -> tuple[dict[str, Any], bool]:
    """Values of all `REQUEST_FIELDS` by name, and whether all were stored and could be read: those that were
    not are as in a new request. For people, who look at a damaged record among many others."""
    values = request_values(_NEW)
    whole = True
    for f in REQUEST_FIELDS:
        text = stored.get(f.name, f.absent)
        try:
            if text is None:
                raise ValueError("missing")
            values[f.name] = f.decode(text)
        except DAMAGE:
            whole = False
    return values, whole


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
    request = Request(
        RequestSpec(
            request_id,
            PromptText(prompt, int(prompt_tokens)),
            int(max_tokens),
            params_json,
            request_class,
            int(priority),
            number_from_text(client_predicted_output_tokens) if client_predicted_output_tokens else None,
            number_from_text(deadline_s) if deadline_s else None,
            cancel_on_disconnect == "1",
            number_from_text(disconnect_grace_s),
            digest,
            traceparent,
        ),
        number_from_text(arrival_s),
        int(arrival_seq),
    )
    request.perceived_s = number_from_text(perceived_s)
    request.acceptance_estimate = number_from_text(acceptance_estimate)
    request.predicted_output_tokens = number_from_text(predicted_output_tokens)
    request.perceptible = perceptible == "1"
    request.level = int(level)
    request.rank = number_from_text(rank)
    return request
