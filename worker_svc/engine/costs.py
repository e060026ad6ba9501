"""What drafting and verifying cost on this machine: measured at start, refined by every step.

The scheduler's T_ssm (a drafted token) and T_llm (a verification) are `StepCosts.draft_s` and
`StepCosts.verify_s`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_SMOOTHING = 0.1
_OUTLIER = 3.0


class CostTable:
    """Seconds of a pass over `rows` rows of `width` tokens: averages where measured, a fit elsewhere."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._fit: tuple[float, ...] | None = None

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        return ((rows, width, seconds) for (rows, width), seconds in sorted(self._seconds.items()))

    def observe(self, rows: int, width: int, seconds: float) -> None:
        key = (rows, width)
        known = self._seconds.get(key)
        if known is None:
            known = self.estimate(rows, width) if len(self._seconds) >= 4 else seconds
            self._fit = None
            if known <= 0:
                known = seconds
        # A step that the operating system interrupted must not overturn what hundreds of steps have shown.
        bounded = min(max(seconds, known / _OUTLIER), known * _OUTLIER)
        self._seconds[key] = known + _SMOOTHING * (bounded - known)

    def set(self, rows: int, width: int, seconds: float) -> None:
        """Replaces an entry by a careful measurement."""
        self._seconds[rows, width] = seconds
        self._fit = None

    def estimate(self, rows: int, width: int) -> float:
        """Seconds expected; 0 while nothing was measured."""
        known = self._seconds.get((rows, width))
        if known is not None:
            return known
        if not self._seconds:
            return 0.0
        if self._fit is None:
            self._fit = self._least_squares()
        floor = min(self._seconds.values())
        return max(
            floor, sum(weight * term for weight, term in zip(self._fit, _terms(rows, width), strict=True))
        )

    def _least_squares(self) -> tuple[float, ...]:
        keys = list(self._seconds)
        terms = np.array([_terms(rows, width) for rows, width in keys])
        seconds = np.array([self._seconds[key] for key in keys])
        # Relative errors count, or the widest batches would decide how the smallest are judged.
        weights = 1.0 / seconds
        solution = np.linalg.lstsq(terms * weights[:, None], np.ones(len(keys)), rcond=None)[0]
        return tuple(float(value) for value in solution)


def _terms(rows: int, width: int) -> tuple[float, float, float, float]:
    return (1.0, float(rows), float(width), float(rows * width))


class StepCosts:
    """Measured seconds of the phases of a step.

    draft: table over (rows, drafted tokens) of the whole drafting phase. verify: table over (rows, 1 +
    drafted tokens). other_s: the rest of a step (bookkeeping). prefill_s_per_token: target and draft
    together. calibrated: whether the tables have entries enough to judge lengths that were not tried. batch:
    rows of the last step.
    """

    def __init__(self) -> None:
        self.draft = CostTable()
        self.verify = CostTable()
        self.other_s = 0.0
        self.prefill_s_per_token = 0.0
        self.draft_prefill_s_per_token = 0.0
        self.calibrated = False
        self.batch = 1
        self.drafted = 1

    @property
    def draft_s(self) -> float:
        """Seconds to draft one token for every row of the present batch (T_ssm); 0 without a draft."""
        width = max(1, self.drafted)
        return self.draft.estimate(self.batch, width) / width

    @property
    def verify_s(self) -> float:
        """Seconds to verify the present batch at its present draft length (T_llm)."""
        return self.verify.estimate(self.batch, self.drafted + 1)

    def step_s(self, rows: int, drafted: int) -> float:
        """Seconds expected of a step over `rows` rows with `drafted` drafted tokens each, without prefill."""
        drafting = self.draft.estimate(rows, drafted) if drafted else 0.0
        return drafting + self.verify.estimate(rows, drafted + 1) + self.other_s

    def observe_step(self, rows: int, drafted: int, draft_s: float, verify_s: float, other_s: float) -> None:
        self.batch, self.drafted = rows, drafted
        if drafted:
            self.draft.observe(rows, drafted, draft_s)
        self.verify.observe(rows, drafted + 1, verify_s)
        self.other_s = _smooth(self.other_s, other_s)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        self.prefill_s_per_token = _smooth(self.prefill_s_per_token, seconds / tokens)

    def observe_draft_prefill(self, tokens: int, seconds: float) -> None:
        self.draft_prefill_s_per_token = _smooth(self.draft_prefill_s_per_token, seconds / tokens)


def _smooth(known: float, seconds: float) -> float:
    if known <= 0.0:
        return seconds
    return known + _SMOOTHING * (min(seconds, known * _OUTLIER) - known)
