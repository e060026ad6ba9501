"""Computing the KV of tokens that are already known: prompts, and outputs of requests whose KV was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .clock import PhaseClock
from .costs import StepCosts
from .forward import Runner
from .rows import DRAFT, TARGET, Row

# Up to so many unseen tokens are fed by the first drafting pass itself; more are prefilled before it.
DRAFT_LAG_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Prefilled:
    tokens: int = 0
    seconds: float = 0.0


class Prefiller:
    """Prefills within a budget of tokens per step, first come first served, so that long prompts do not stall
    others.
    """

    def __init__(self, runners: Sequence[Runner], costs: StepCosts, device: torch.device) -> None:
        self._runners = runners
        self._costs = costs
        self._device = device
        self._clock = PhaseClock(device)

    def target(self, rows: Sequence[Row], budget_tokens: int) -> Prefilled:
        """Brings the target's KV to all tokens but the last of each row, as far as the budget goes."""
        done = self._run(TARGET, rows, budget_tokens)
        if done.tokens:
            self._costs.observe_prefill(done.tokens, done.seconds)
        return done

    def draft(self, rows: Sequence[Row], budget_tokens: int) -> Prefilled:
        """Brings the draft's KV so far that the first drafting pass can feed the rest; rows may still lag
        afterwards.
        """
        done = self._run(DRAFT, [row for row in rows if draft_lags(row)], budget_tokens)
        if done.tokens:
            self._costs.observe_draft_prefill(done.tokens, done.seconds)
        return done

    def _run(self, model: int, rows: Sequence[Row], budget_tokens: int) -> Prefilled:
        total = 0
        began = None
        for row in rows:
            start = row.kv_tokens[model]
            count = min(len(row.tokens) - 1 - start, budget_tokens - total)
            if count <= 0:
                continue
            began = began if began is not None else self._clock.mark()
            fed = torch.tensor([row.tokens[start : start + count]], device=self._device)
            self._runners[model].forward(fed, row.slot, [start], 1)
            row.kv_tokens[model] = start + count
            total += count
        if began is None:
            return Prefilled()
        return Prefilled(total, self._clock.seconds(began, self._clock.mark()))


def draft_lags(row: Row) -> bool:
    """Whether the draft's KV lies too far behind for the row to draft."""
    return len(row.tokens) - row.kv_tokens[DRAFT] > DRAFT_LAG_TOKENS
