"""How likely drafted tokens are to be accepted, learned position by position while a request runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from .config import MAX_DRAFT_TOKENS

_DECAY = 0.95
_PRIOR_WEIGHT = 4.0
_PRIOR_ACCEPTANCE = 0.6


class AcceptanceEstimate:
    """Probability that the k-th drafted token is accepted, given that those before it were; recent steps
    count more.

    One rate for all positions would be wrong for text that is copied: a copy that holds for three tokens
    usually holds for ten. `prior` is the estimate of all requests together, from which each position starts;
    without one it starts from the position before it.
    """

    def __init__(self, prior: AcceptanceEstimate | None = None) -> None:
        self._prior = prior
        self._accepted = [0.0] * MAX_DRAFT_TOKENS
        self._tried = [0.0] * MAX_DRAFT_TOKENS
        self._chances: list[float] | None = None

    def observe(self, drafted: int, accepted: int) -> None:
        """Learns from a step in which the first `accepted` of `drafted` tokens were accepted."""
        if drafted == 0:
            return
        # Tokens behind the first rejection were not tried.
        for position in range(min(accepted + 1, drafted)):
            self._tried[position] = _DECAY * self._tried[position] + 1.0
            self._accepted[position] = _DECAY * self._accepted[position] + (position < accepted)
        self._chances = None
        if self._prior is not None:
            self._prior.observe(drafted, accepted)

    @property
    def chances(self) -> Sequence[float]:
        """By position: the chance to be accepted after an accepted one, MAX_DRAFT_TOKENS of them."""
        if self._chances is None:
            self._chances = self._learned()
        return self._chances

    @property
    def survival(self) -> Sequence[float]:
        """By length: the chance that so many drafted tokens are all accepted, from 1 token on."""
        return list(accumulate(self.chances, mul))

    def _learned(self) -> list[float]:
        known = self._prior.chances if self._prior is not None else None
        chances: list[float] = []
        for position, (accepted, tried) in enumerate(zip(self._accepted, self._tried, strict=True)):
            start = chances[-1] if chances else _PRIOR_ACCEPTANCE
            if known is not None:
                # What a request does better than all others at one position, it is believed half at the next.
                lead = chances[-1] - known[position - 1] if chances else 0.0
                start = min(max(known[position] + 0.5 * lead, 0.0), 1.0)
            chances.append((accepted + _PRIOR_WEIGHT * start) / (tried + _PRIOR_WEIGHT))
        return chances


def expected_tokens(survival: Sequence[float], drafted: int) -> float:
    """Tokens that one verification of `drafted` tokens emits in expectation, at least 1: the sum of the
    chances that each is reached. With one rate a for all positions this is (1 - a^(n+1)) / (1 - a)
    (Leviathan et al., 2023, eq. 1).
    """
    return 1.0 + sum(survival[:drafted])
