"""How many tokens to draft: as many as make the batch's expected tokens per second largest, down to none.

With acceptance a per drafted token, a draft of n tokens yields (1 - a^(n+1)) / (1 - a) tokens in expectation
(Leviathan et al., 2023, eq. 1). A batch is padded to its longest draft, so its cost depends on that length
alone, and one length is chosen for the step; requests with a lower limit of their own keep it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .costs import StepCosts

_DECAY = 0.95
_PRIOR_WEIGHT = 4.0
_PRIOR_ACCEPTANCE = 0.6
_MARGIN = 1.02
_PROBE_STEPS = 48


class AcceptanceEstimate:
    """Probability that a drafted token is accepted, given that those before it were; recent steps count more.

    `prior` is the estimate of all requests together, from which a new request starts.
    """

    def __init__(self, prior: AcceptanceEstimate | None = None) -> None:
        self._prior = prior
        self._accepted = 0.0
        self._tried = 0.0

    def observe(self, drafted: int, accepted: int) -> None:
        if drafted == 0:
            return
        self._accepted = _DECAY * self._accepted + accepted
        # Tokens behind the first rejection were not tried.
        self._tried = _DECAY * self._tried + min(accepted + 1, drafted)
        if self._prior is not None:
            self._prior.observe(drafted, accepted)

    @property
    def value(self) -> float:
        prior = self._prior.value if self._prior is not None else _PRIOR_ACCEPTANCE
        return (self._accepted + _PRIOR_WEIGHT * prior) / (self._tried + _PRIOR_WEIGHT)


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens that one verification of `drafted` tokens emits in expectation, at least 1."""
    if acceptance >= 1.0:
        return drafted + 1.0
    return float((1.0 - acceptance ** (drafted + 1)) / (1.0 - acceptance))


class DraftLengthChooser:
    """Chooses the draft length of each step from acceptance estimates and measured costs."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._steps = 0

    def choose(self, acceptances: Sequence[float], limits: Sequence[int], catch_up_s: float) -> int:
        """limits: most tokens that each row may draft. catch_up_s: seconds to bring the draft's KV up to date
        first.

        Returns the length for the batch; the longest while costs are unknown. Speculation must promise a gain
        of some percent, for estimates are noisy.
        """
        longest = max(limits, default=0)
        if longest == 0 or not self._costs.calibrated:
            return longest
        rows = len(limits)
        plain = rows / self._costs.step_s(rows, 0)
        best, best_rate = 0, plain * _MARGIN
        for length in range(1, longest + 1):
            seconds = self._costs.step_s(rows, length) + catch_up_s / _PROBE_STEPS
            tokens = sum(
                expected_tokens(a, min(length, limit)) for a, limit in zip(acceptances, limits, strict=True)
            )
            if tokens / seconds > best_rate:
                best, best_rate = length, tokens / seconds
        return self._tried(best, longest)

    def _tried(self, best: int, longest: int) -> int:
        """The best length, but now and then the next longer or shorter one: what is never tried is never
        learned.
        """
        self._steps += 1
        if self._steps % _PROBE_STEPS:
            return best
        longer = (self._steps // _PROBE_STEPS) % 2 == 1 or best == 0
        return min(best + 1, longest) if longer else best - 1
