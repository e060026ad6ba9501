"""Computing the KV of tokens that are already known: prompts, and outputs of requests whose KV was lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .clock import BusyClock, PhaseClock
from .costs import PrefillCost, StepCosts
from .forward import Runner
from .rows import DRAFT, TARGET, Row
from .slots import LEAST_SHARED_TOKENS, common_prefix
from .transfers import upload

# Up to so many unseen tokens are fed by the first drafting pass itself; more are prefilled before it.
DRAFT_LAG_TOKENS = 8
# Prompts get on by so many tokens a step even where that stalls others more than is wished.
_LEAST_TOKENS = 16


@dataclass(slots=True)
class Prefilled:
    """What was prefilled. seconds: measured on a CPU; on a GPU, where only a wait could tell, expected until
    `settle`. busy_s: without what the thread waited for a core or for the interpreter's lock.
    """

    tokens: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0
    measure: Callable[[], tuple[float, float]] | None = None

    def settle(self) -> None:
        """Measures what is not measured yet. Where the step has waited for the device anyway, no wait."""
        if self.measure is not None:
            (self.seconds, self.busy_s), self.measure = self.measure(), None


@dataclass(slots=True)
class _Pass:
    """Chunks that are computed together: counts[i] tokens of rows[i] from starts[i] on, padded to the
    widest.
    """

    rows: list[Row]
    starts: list[int]
    counts: list[int]

    @property
    def width(self) -> int:
        return max(self.counts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """As `PrefillCost.observe` takes it."""
        return self.width, max(self.starts), len(self.rows)

    def with_chunk(self, row: Row, start: int, count: int) -> _Pass:
        return _Pass([*self.rows, row], [*self.starts, start], [*self.counts, count])


class Prefiller:
    """Prefills within a budget of tokens and of seconds per step, first come first served, so that long
    prompts do not stall others.

    Chunks of several rows go through the model in one pass where their padding costs less than another pass:
    on a GPU, where a pass over few tokens takes as long as the weights take to be read.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        costs: StepCosts,
        clock: BusyClock,
        share: Callable[[Row], int] | None,
    ) -> None:
        """share: copies to a row what KV others have of its tokens; returns the tokens gained. None: nothing
        is shared.
        """
        self._runners = runners
        self._costs = costs
        self._device = clock.device
        self._clock = PhaseClock(clock)
        self._share = share

    def target(self, rows: Sequence[Row], budget_tokens: int, limit_s: float = math.inf) -> Prefilled:
        """Brings the target's KV to all tokens but the last of each row, as far as the budgets go."""
        return self._run(TARGET, rows, budget_tokens, limit_s, self._costs.prefill)

    def draft(self, rows: Sequence[Row], budget_tokens: int, limit_s: float = math.inf) -> Prefilled:
        """Brings the draft's KV so far that the first drafting pass can feed the rest; rows may still lag
        afterwards.
        """
        lagging = [row for row in rows if draft_lags(row)]
        return self._run(DRAFT, lagging, budget_tokens, limit_s, self._costs.draft_prefill)

    def _run(
        self, model: int, rows: Sequence[Row], budget_tokens: int, limit_s: float, cost: PrefillCost
    ) -> Prefilled:
        rows = [row for row in rows if len(row.tokens) - 1 > row.kv_tokens[model]]
        if not rows:
            return Prefilled()
        # A pass that has to be run is used: for as many tokens as take as long again as a pass takes anyway.
        limit_s = max(limit_s, 2.0 * cost.pass_s)
        passes = _Passes(cost, self._runners[model].cache.limit_tokens, budget_tokens)
        fed: list[_Pass] = []
        marks: list[tuple[Any, Any]] = []

        def feed() -> None:
            for batch in passes.take():
                marks.append(self._feed(model, batch))
                fed.append(batch)

        total = 0
        for row in rows:
            if model == TARGET and self._share is not None:
                self._share(row)
                if passes.computes_prefix_of(row):
                    feed()
                    self._share(row)
            start = row.kv_tokens[model]
            left = min(len(row.tokens) - 1 - start, budget_tokens - total)
            if left <= 0:
                continue
            count = passes.add(row, start, left, limit_s)
            if count <= 0:
                break
            total += count
        feed()
        if not fed:
            return Prefilled()

        def measure() -> tuple[float, float]:
            seconds = sum(self._clock.seconds(began, ended) for began, ended in marks)
            busy_s = sum(self._clock.busy_s(began, ended) for began, ended in marks)
            cost.observe([batch.shape for batch in fed], busy_s)
            return seconds, busy_s

        prefilled = Prefilled(total, passes.expected_s, passes.expected_s, measure)
        if not self._clock.waits:
            prefilled.settle()
        return prefilled

    def _feed(self, model: int, batch: _Pass) -> tuple[Any, Any]:
        """Runs a pass; returns the marks of its beginning and its end."""
        runner, width = self._runners[model], batch.width
        # In the order of their slots: rows that lie side by side are read where they are.
        chunks = sorted(zip(batch.rows, batch.starts, batch.counts, strict=True), key=lambda c: c[0].slot)
        tokens = [row.tokens[start : start + count] + [0] * (width - count) for row, start, count in chunks]
        began = self._clock.mark()
        runner.forward(
            upload(tokens, self._device),
            [row.slot for row, _, _ in chunks],
            [start for _, start, _ in chunks],
            1,
        )
        ended = self._clock.mark()
        for row, start, count in chunks:
            row.kv_tokens[model] = start + count
            if count < width:
                # Nobody has budgeted for the padding.
                runner.cache.trim(row.slot, start + count)
        return began, ended


class _Passes:
    """Chunks of one step, put together to passes as they come."""

    def __init__(self, cost: PrefillCost, limit_tokens: int, budget_tokens: int) -> None:
        """limit_tokens: positions of a slot. budget_tokens: of a pass with its padding."""
        self._cost = cost
        self._limit_tokens = limit_tokens
        self._budget_tokens = budget_tokens
        self._passes: list[_Pass] = []
        self._begun = False
        self.expected_s = 0.0

    def add(self, row: Row, start: int, tokens: int, limit_s: float) -> int:
        """Plans as many of a row's tokens as the limit for all chunks leaves; returns how many."""
        spare_s = limit_s - self.expected_s
        least = 0 if self._begun else _LEAST_TOKENS
        alone = tokens if spare_s == math.inf else max(self._cost.affordable_tokens(spare_s, start), least)
        # In the pass of another it may be more.
        widths = [batch.width for batch in self._passes]
        for count in sorted({min(tokens, most) for most in (tokens, alone, *widths)}, reverse=True):
            added_s, joined = self._cheapest(row, start, count)
            if count <= alone or added_s <= spare_s:
                break
        if count <= 0:
            return 0
        if joined is None:
            self._passes.append(_Pass([row], [start], [count]))
        else:
            self._passes[joined] = self._passes[joined].with_chunk(row, start, count)
        self._begun = True
        self.expected_s += added_s
        return count

    def computes_prefix_of(self, row: Row) -> bool:
        """Whether a pass that is planned would leave KV that the row could take, instead of computing it."""
        wanted = row.tokens[:-1]
        return any(
            common_prefix(other.tokens[: start + count], wanted)
            >= row.kv_tokens[TARGET] + LEAST_SHARED_TOKENS
            for batch in self._passes
            for other, start, count in zip(batch.rows, batch.starts, batch.counts, strict=True)
        )

    def take(self) -> list[_Pass]:
        """The passes so far; what comes later does not join them."""
        passes, self._passes = self._passes, []
        return passes

    def _cheapest(self, row: Row, start: int, count: int) -> tuple[float, int | None]:
        """Seconds that a chunk adds, and the pass that it had best join: None for one of its own."""
        best_s, joined = self._cost.seconds(count, start), None
        for index, batch in enumerate(self._passes):
            width, reach_start, rows = batch.with_chunk(row, start, count).shape
            # Padding, too, is written.
            if width * rows > self._budget_tokens or reach_start + width > self._limit_tokens:
                continue
            added_s = self._cost.seconds(width, reach_start, rows) - self._cost.seconds(*batch.shape)
            if added_s < best_s:
                best_s, joined = added_s, index
        return best_s, joined


def draft_lags(row: Row) -> bool:
    """Whether the draft's KV lies too far behind for the row to draft."""
    return len(row.tokens) - row.kv_tokens[DRAFT] > DRAFT_LAG_TOKENS
