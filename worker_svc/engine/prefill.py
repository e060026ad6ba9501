"""Computing the KV of tokens that are already known: prompts, and outputs of requests whose KV was lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .clock import BusyClock, PhaseClock
from .costs import PrefillCost, StepCosts
from .forward import Runner
from .rows import DRAFT, TARGET, Row
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


class Prefiller:
    """Prefills within a budget of tokens and of seconds per step, first come first served, so that long
    prompts do not stall others.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        costs: StepCosts,
        clock: BusyClock,
        share: Callable[[Row], int],
    ) -> None:
        """share: copies to a row what KV others have of its tokens; returns the tokens gained."""
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
        chunks: list[tuple[int, int]] = []
        marks = []
        total, expected_s = 0, 0.0
        for row in rows:
            if model == TARGET and row.prefill_tokens > 0:
                self._share(row)
            start = row.kv_tokens[model]
            left = min(len(row.tokens) - 1 - start, budget_tokens - total)
            if left <= 0:
                continue
            count = min(left, _affordable_tokens(cost, limit_s - expected_s, start, first=not chunks))
            if count <= 0:
                break
            began = self._clock.mark()
            fed = upload([row.tokens[start : start + count]], self._device)
            self._runners[model].forward(fed, row.slot, [start], 1)
            marks.append((began, self._clock.mark()))
            row.kv_tokens[model] = start + count
            chunks.append((count, start))
            total += count
            expected_s += cost.seconds(count, start)
        if not chunks:
            return Prefilled()

        def measure() -> tuple[float, float]:
            seconds = sum(self._clock.seconds(began, ended) for began, ended in marks)
            busy_s = sum(self._clock.busy_s(began, ended) for began, ended in marks)
            cost.observe(chunks, busy_s)
            return seconds, busy_s

        prefilled = Prefilled(total, expected_s, expected_s, measure)
        if not self._clock.waits:
            prefilled.settle()
        return prefilled


def draft_lags(row: Row) -> bool:
    """Whether the draft's KV lies too far behind for the row to draft."""
    return len(row.tokens) - row.kv_tokens[DRAFT] > DRAFT_LAG_TOKENS


def _affordable_tokens(cost: PrefillCost, seconds: float, start: int, first: bool) -> int:
    if seconds == math.inf:
        return 1 << 30
    return max(cost.affordable_tokens(seconds, start), _LEAST_TOKENS if first else 0)
