"""Who drafts for each request and how many tokens: what makes the batch's expected tokens per second largest.

A draft yields, beside the target's own token, as many tokens in expectation as the chances that each of its
positions is reached add up to. A batch is padded to its longest draft, and the draft model runs over all rows
if it runs for one, so a step's cost depends on two lengths alone: the longest draft of the draft model, and
the longest of any drafter. These two are chosen for the step; within them each row takes the drafter that
promises it more, and requests with a lower limit of their own keep it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .acceptance import expected_tokens
from .costs import StepCosts

_MARGIN = 1.02
_PROBE_STEPS = 48


class Drafter(enum.StrEnum):
    """Where a row's drafted tokens come from in a step."""

    NONE = "none"
    DRAFT = "draft"
    LOOKUP = "lookup"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a row could have drafted: at most `draft_tokens` by the draft model, or `found_tokens` by lookup.

    draft_survival, found_survival: by length from 1, the chance that so many tokens are all accepted.
    """

    draft_tokens: int
    draft_survival: Sequence[float] = ()
    found_tokens: int = 0
    found_survival: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Who drafts for a row in this step, and how many tokens."""

    drafter: Drafter
    length: int


NO_DRAFT = RowPlan(Drafter.NONE, 0)


class DraftChooser:
    """Chooses drafter and length of each row for a step from acceptance estimates and measured costs."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._steps = 0

    @staticmethod
    def catch_up_steps(offer: Offer, left_tokens: int) -> float:
        """Over how many steps the price of bringing a row's draft KV up to date is spread: until the choice
        may be another one, and not beyond the row's last token.
        """
        step_tokens = expected_tokens(offer.draft_survival, offer.draft_tokens)
        return max(1.0, min(_PROBE_STEPS, left_tokens / step_tokens))

    def choose(self, offers: Sequence[Offer], catch_up_s: float, reach_tokens: int = 0) -> list[RowPlan]:
        """catch_up_s: seconds that bringing the draft's KV up to date adds to a step with the draft model.
        reach_tokens: longest KV of the batch.

        The longest drafts while costs are unknown. Speculation must promise a gain of some percent, for
        estimates are noisy.
        """
        drafted_limit = max((offer.draft_tokens for offer in offers), default=0)
        limit = max((offer.found_tokens for offer in offers), default=0)
        limit = max(limit, drafted_limit)
        if limit == 0 or not self._costs.calibrated:
            return longest(offers)
        drafting = _expected([o.draft_survival[: o.draft_tokens] for o in offers], drafted_limit)
        looking_up = _expected([o.found_survival[: o.found_tokens] for o in offers], limit)
        # tokens[d, w]: with at most d tokens of the draft model, and a batch padded to w drafted tokens.
        tokens = np.maximum(drafting[:, :, None], looking_up[:, None, :]).sum(0)
        seconds = self._costs.steps_s(len(offers), drafted_limit, limit, reach_tokens)
        seconds[1:] += catch_up_s
        rates = np.triu(tokens / seconds)
        best = int(rates.argmax())
        if rates.flat[best] <= rates[0, 0] * _MARGIN:
            best = 0
        drafted, width = divmod(best, limit + 1)
        drafted = self._tried(drafted, drafted_limit)
        width = max(width, drafted)
        return [
            _row_plan(offer, drafted, width, looking_up[row, width] >= drafting[row, drafted])
            for row, offer in enumerate(offers)
        ]

    def _tried(self, best: int, longest: int) -> int:
        """The draft model's best length, but now and then the next longer or shorter one: what is never tried
        is never learned. (Lookups are judged at every step, used or not.)
        """
        self._steps += 1
        if longest == 0 or self._steps % _PROBE_STEPS:
            return best
        longer = (self._steps // _PROBE_STEPS) % 2 == 1 or best == 0
        return min(best + 1, longest) if longer else best - 1


def longest(offers: Sequence[Offer]) -> list[RowPlan]:
    """As many tokens as allowed for every row, looked up where anything was found."""
    return [_row_plan(o, o.draft_tokens, o.found_tokens, o.found_tokens > 0) for o in offers]


def _row_plan(offer: Offer, drafted: int, width: int, prefers_lookup: bool) -> RowPlan:
    if prefers_lookup and min(offer.found_tokens, width):
        return RowPlan(Drafter.LOOKUP, min(offer.found_tokens, width))
    if min(offer.draft_tokens, drafted):
        return RowPlan(Drafter.DRAFT, min(offer.draft_tokens, drafted))
    return NO_DRAFT


def _expected(survival: Sequence[Sequence[float]], longest: int) -> npt.NDArray[np.float64]:
    """Expected tokens [rows, 1 + longest] by length, for rows that may draft as far as their chances go."""
    chances = np.zeros((len(survival), longest + 1))
    chances[:, 0] = 1.0
    for row, values in enumerate(survival):
        chances[row, 1 : len(values) + 1] = values
    return chances.cumsum(1)
