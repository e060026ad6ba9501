"""What one step gives back: parallel columns, one row per request that progressed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .adaptive import Drafter


class FinishReason(enum.StrEnum):
    """Why a request left the engine by itself."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log, raw target distribution before temperature and filters) of one emitted
    token.

    alternatives: the most probable (token id, log-probability) pairs at this position, best first.
    """

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class KvUsage:
    """KV held by requests: tokens and bytes in slots (target and draft), and bytes in host memory. Beside it
    kept_tokens, which finished requests have left for others to share, and allocated_bytes, the memory of all
    slots together.
    """

    tokens: int = 0
    bytes: int = 0
    host_bytes: int = 0
    allocated_bytes: int = 0
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """One iteration of all running requests.

    Rows are the requests that emitted tokens; requests still in prefill have no row. `token_ids` is one flat
    int32 array in row order, row i owning `emitted_counts[i]` of it; `offsets[i]` is the number of output
    tokens that request i had before the step. `accepted_counts[i]` of `drafted_counts[i]` drafted tokens are
    among those emitted; `drafters[i]` proposed them. `matched_stop` is the stop string or the token id that
    ended a request with STOP.
    `cached_tokens[i]` is given where request i emits its first tokens, and took the KV of so many tokens of
    its prompt from others. `logprobs[i]` has one entry per emitted token where the request asked for it.
    Times are seconds; `switch_s` is the time spent on bringing `switched` requests back into the batch and on
    moving KV for them, without their prefill; requests that had neither output nor KV before do not count.
    `expected_s` is what `step_s` should have been by the costs measured before; None where no request was
    ready to decode.
    """

    request_ids: tuple[str, ...] = ()
    offsets: tuple[int, ...] = ()
    emitted_counts: tuple[int, ...] = ()
    token_ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    drafted_counts: tuple[int, ...] = ()
    accepted_counts: tuple[int, ...] = ()
    drafters: tuple[Drafter, ...] = ()
    finish: tuple[FinishReason | None, ...] = ()
    matched_stop: tuple[str | int | None, ...] = ()
    logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] = ()
    cached_tokens: dict[int, int] = field(default_factory=dict)
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    step_s: float = 0.0
    switched: int = 0
    switch_s: float = 0.0
    expected_s: float | None = None
    kv: KvUsage = field(default_factory=KvUsage)

    def tokens_of(self, row: int) -> list[int]:
        """Token ids that row `row` emitted."""
        start = sum(self.emitted_counts[:row])
        return [int(token) for token in self.token_ids[start : start + self.emitted_counts[row]]]


class StepColumns:
    """Collects the rows of a StepResult."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, int, int, int, Drafter, FinishReason | None, str | int | None]] = []
        self._token_ids: list[int] = []
        self._logprobs: list[tuple[TokenLogprob, ...] | None] = []
        self._cached_tokens: dict[int, int] = {}

    def add(
        self,
        request_id: str,
        offset: int,
        token_ids: list[int],
        drafted: int,
        accepted: int,
        drafter: Drafter,
        finish: FinishReason | None,
        matched_stop: str | int | None,
        logprobs: list[TokenLogprob] | None,
        cached_tokens: int = 0,
    ) -> None:
        """One row; `logprobs` has at least one entry for each of `token_ids`, or is None."""
        if cached_tokens and offset == 0:
            self._cached_tokens[len(self._rows)] = cached_tokens
        self._rows.append(
            (request_id, offset, len(token_ids), drafted, accepted, drafter, finish, matched_stop)
        )
        self._token_ids.extend(token_ids)
        self._logprobs.append(tuple(logprobs[: len(token_ids)]) if logprobs is not None else None)

    def result(self, **phases: Any) -> StepResult:
        """The step's result; `phases` are the fields that are not columns."""
        ids, offsets, emitted, drafted, accepted, drafters, finish, matched = zip(*self._rows, strict=True)
        return StepResult(
            request_ids=ids,
            offsets=offsets,
            emitted_counts=emitted,
            token_ids=np.array(self._token_ids, dtype=np.int32),
            drafted_counts=drafted,
            accepted_counts=accepted,
            drafters=drafters,
            finish=finish,
            matched_stop=matched,
            logprobs=tuple(self._logprobs),
            cached_tokens=self._cached_tokens,
            **phases,
        )
