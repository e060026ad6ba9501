"""Planning a step: which rows draft, by which drafter and how much, and what must be computed before."""

from __future__ import annotations

from collections.abc import Sequence

from .adaptive import NO_DRAFT, DraftChooser, Drafter, Offer, RowPlan, longest
from .config import EngineConfig
from .costs import StepCosts
from .prefill import Prefilled, Prefiller, draft_lags
from .rows import DRAFT, Row


class Planner:
    """Asks what each row could draft, lets the chooser decide, and brings the draft's KV up to date."""

    def __init__(self, prefiller: Prefiller, costs: StepCosts, config: EngineConfig, has_draft: bool) -> None:
        self._prefiller = prefiller
        self._costs = costs
        self._config = config
        self._has_draft = has_draft
        self._chooser = DraftChooser(costs)

    def plan(self, batch: Sequence[Row], catch_up_limit_s: float) -> tuple[list[RowPlan], Prefilled]:
        """A plan for each row, and what was prefilled for it in about `catch_up_limit_s` at most."""
        offers = [self._offer(row) for row in batch]
        if self._config.adaptive:
            reach_tokens = max(len(row.tokens) for row in batch)
            plans = self._chooser.choose(offers, self._catch_up_s(batch, offers), reach_tokens)
        else:
            plans = longest(offers)
        wanting = [row for row, plan in zip(batch, plans, strict=True) if plan.drafter is Drafter.DRAFT]
        if not wanting:
            return plans, Prefilled()
        caught_up = self._prefiller.draft(wanting, self._config.prefill_tokens, catch_up_limit_s)
        for index, row in enumerate(batch):
            if plans[index].drafter is Drafter.DRAFT and draft_lags(row):
                plans[index] = NO_DRAFT
        return plans, caught_up

    def _offer(self, row: Row) -> Offer:
        # The last emitted token is always the target's own.
        room = row.stopper.limit_tokens - row.output_tokens - 1
        drafted = min(row.draft_limit_tokens, room) if self._has_draft else 0
        found = 0
        survival: Sequence[float] = ()
        if row.lookup is not None and row.draft_limit_tokens:
            found, survival = row.lookup.propose(row.tokens, min(self._config.lookup_tokens, room))
        return Offer(drafted, row.acceptance.survival, found, survival)

    def _catch_up_s(self, batch: Sequence[Row], offers: Sequence[Offer]) -> float:
        """Of one step, in seconds."""
        if not self._has_draft:
            return 0.0
        return sum(
            self._costs.draft_prefill.seconds(len(row.tokens) - row.kv_tokens[DRAFT])
            / self._chooser.catch_up_steps(offer, row.stopper.limit_tokens - row.output_tokens)
            for row, offer in zip(batch, offers, strict=True)
            if draft_lags(row)
        )
