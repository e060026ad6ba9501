"""What drafting and verifying cost on this machine: measured at start, refined by every step.

The scheduler's T_ssm (a drafted token) and T_llm (a verification) are `StepCosts.draft_s` and
`StepCosts.verify_s`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_SMOOTHING = 0.02
_SPEED_SMOOTHING = 0.3
_OUTLIER = 3.0
_FIT_POINTS = 4


class CostTable:
    """Seconds of a pass over `rows` rows of `width` tokens: averages where measured, a fit elsewhere."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._fit: tuple[float, ...] | None = None

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        return ((rows, width, seconds) for (rows, width), seconds in sorted(self._seconds.items()))

    def set(self, rows: int, width: int, seconds: float) -> None:
        """Replaces an entry by a careful measurement."""
        self._seconds[rows, width] = seconds
        self._fit = None

    def observe(self, rows: int, width: int, seconds: float) -> None:
        """Moves an entry towards what a step has just taken; an unmeasured one starts there."""
        known = self._seconds.get((rows, width))
        self.set(rows, width, seconds if known is None else known + _SMOOTHING * (seconds - known))

    def estimate(self, rows: int, width: int) -> float:
        """Seconds expected; 0 while nothing was measured."""
        known = self._seconds.get((rows, width))
        if known is not None or not self._seconds:
            return known or 0.0
        if len(self._seconds) < _FIT_POINTS:
            return max(self._seconds.values())
        if self._fit is None:
            self._fit = self._least_squares()
        guess = sum(weight * term for weight, term in zip(self._fit, _terms(rows, width), strict=True))
        return max(min(self._seconds.values()), guess)

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
    drafted tokens). Both hold seconds at the speed of the calibration; `slowdown` is how much slower the
    machine is now, which longer contexts and busy neighbours change for all entries alike. other_s: the rest
    of a step. calibrated: whether the tables can judge lengths that were not tried. batch, drafted, modelled:
    rows of the last step, its draft length, and that of the draft model alone (lookups cost no model).
    """

    def __init__(self) -> None:
        self.draft = CostTable()
        self.verify = CostTable()
        self.slowdown = 1.0
        self.other_s = 0.0
        self.prefill_s_per_token = 0.0
        self.draft_prefill_s_per_token = 0.0
        self.calibrated = False
        self.batch = 1
        self.drafted = 0
        self.modelled = 0

    @property
    def draft_s(self) -> float:
        """Seconds per drafted token of the present batch (T_ssm); 0 without a draft model, or where all was
        looked up.
        """
        if self.drafted == 0:
            return self.slowdown * self.draft.estimate(self.batch, 1)
        return self.slowdown * self._draft_s(self.batch, self.modelled) / self.drafted

    @property
    def verify_s(self) -> float:
        """Seconds to verify the present batch at its present draft length (T_llm)."""
        return self.slowdown * self.verify.estimate(self.batch, self.drafted + 1)

    def step_s(self, rows: int, drafted: int, modelled: int | None = None) -> float:
        """Seconds expected of a step over `rows` rows without prefill, whose longest draft has `drafted`
        tokens, and the longest of the draft model `modelled` (None: as many).
        """
        return self.slowdown * self._model_s(rows, drafted, modelled) + self.other_s

    def steps_s(self, rows: int, modelled: int, drafted: int) -> npt.NDArray[np.float64]:
        """`step_s` for all lengths up to these: [1 + modelled, 1 + drafted]."""
        drafting = np.array([self._draft_s(rows, length) for length in range(modelled + 1)])
        verifying = np.array([self.verify.estimate(rows, length + 1) for length in range(drafted + 1)])
        table: npt.NDArray[np.float64] = drafting[:, None] + verifying
        return self.slowdown * table + self.other_s

    def observe_step(
        self,
        rows: int,
        drafted: int,
        draft_s: float,
        verify_s: float,
        other_s: float,
        modelled: int | None = None,
    ) -> None:
        """Learns from a step: first the speed of the machine, then what is particular to this size."""
        modelled = drafted if modelled is None else modelled
        self.batch, self.drafted, self.modelled = rows, drafted, modelled
        expected_s = self._model_s(rows, drafted, modelled)
        if self.calibrated and expected_s > 0:
            # A step that the operating system interrupted must not overturn what hundreds of steps have
            # shown.
            ratio = (draft_s + verify_s) / (expected_s * self.slowdown)
            ratio = min(max(ratio, 1 / _OUTLIER), _OUTLIER)
            self.slowdown *= 1 + _SPEED_SMOOTHING * (ratio - 1)
        if modelled:
            self.draft.observe(rows, modelled, draft_s / self.slowdown)
        self.verify.observe(rows, drafted + 1, verify_s / self.slowdown)
        self.other_s = _smooth(self.other_s, other_s)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        self.prefill_s_per_token = _smooth(self.prefill_s_per_token, seconds / tokens)

    def observe_draft_prefill(self, tokens: int, seconds: float) -> None:
        self.draft_prefill_s_per_token = _smooth(self.draft_prefill_s_per_token, seconds / tokens)

    def _model_s(self, rows: int, drafted: int, modelled: int | None) -> float:
        drafting = self._draft_s(rows, drafted if modelled is None else modelled)
        return drafting + self.verify.estimate(rows, drafted + 1)

    def _draft_s(self, rows: int, modelled: int) -> float:
        return self.draft.estimate(rows, modelled) if modelled else 0.0


def _smooth(known: float, seconds: float) -> float:
    if known <= 0.0:
        return seconds
    return known + _SPEED_SMOOTHING * (min(seconds, known * _OUTLIER) - known)
