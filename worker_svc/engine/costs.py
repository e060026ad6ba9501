"""What drafting and verifying cost on this machine: measured at start, refined by every step.

The scheduler's T_ssm (a drafted token) and T_llm (a verification) are `StepCosts.draft_s` and
`StepCosts.verify_s`.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

# The newest observation of an entry counts as one of so many at least: the average of the first ones, then a
# moving one.
_LEAST_WEIGHT = 0.05
_SET_OBSERVATIONS = 4
_MOST_OBSERVATIONS = 8
_SMOOTHING = 0.1
_OUTLIER = 1.5
_SPEED_STEPS = 3
_OTHER_STEPS = 9
_FIT_POINTS = 4
_GUESSES_LAST = 32
_USUAL_CHUNK_TOKENS = 128


class CostTable:
    """Seconds of a pass over `rows` rows of `width` tokens: averages where measured, an estimate elsewhere.

    The estimate is a fit in rows, width and their product, corrected by how far the measured neighbours lie
    from that fit: kernels have cliffs (a matrix of 5 rows may cost three times one of 4) that no fit shows.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._observations: dict[tuple[int, int], int] = {}
        self._fit: tuple[float, ...] | None = None
        self._guesses: dict[tuple[int, int], float] = {}
        self._guesses_age = 0

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        return ((rows, width, seconds) for (rows, width), seconds in sorted(self._seconds.items()))

    def set(self, rows: int, width: int, seconds: float) -> None:
        """Replaces an entry by a careful measurement."""
        self._seconds[rows, width] = seconds
        self._observations[rows, width] = _SET_OBSERVATIONS
        self._forget_guesses()

    def observe(self, rows: int, width: int, seconds: float) -> None:
        """Moves an entry towards what a step has just taken; an unmeasured one starts there."""
        key = rows, width
        known = self._seconds.get(key)
        if known is None:
            self._seconds[key], self._observations[key] = seconds, 1
            self._forget_guesses()
            return
        self._observations[key] += 1
        seconds = min(max(seconds, known / _OUTLIER), known * _OUTLIER)
        weight = max(_LEAST_WEIGHT, 1.0 / self._observations[key])
        self._seconds[key] = known + weight * (seconds - known)
        self._guesses_age += 1
        if self._guesses_age >= _GUESSES_LAST:
            self._forget_guesses()

    def estimate(self, rows: int, width: int) -> float:
        """Seconds expected; 0 while nothing was measured."""
        key = rows, width
        known = self._seconds.get(key, self._guesses.get(key))
        if known is not None or not self._seconds:
            return known or 0.0
        if len(self._seconds) < _FIT_POINTS:
            return max(self._seconds.values())
        self._guesses[key] = guess = self._guess(rows, width)
        return guess

    def _guess(self, rows: int, width: int) -> float:
        total = correction = 0.0
        for (other_rows, other_width), seconds in self._seconds.items():
            distance = abs(math.log2(other_rows / rows)) + abs(math.log2(other_width / width))
            trust = min(self._observations[other_rows, other_width], _MOST_OBSERVATIONS)
            weight = trust / (distance * distance + 0.01)
            total += weight
            correction += weight * math.log(seconds / self._fitted(other_rows, other_width))
        return self._fitted(rows, width) * math.exp(correction / total)

    def _fitted(self, rows: int, width: int) -> float:
        if self._fit is None:
            self._fit = self._least_squares()
        guess = sum(weight * term for weight, term in zip(self._fit, _terms(rows, width), strict=True))
        return max(guess, 0.5 * min(self._seconds.values()))

    def _least_squares(self) -> tuple[float, ...]:
        keys = list(self._seconds)
        terms = np.array([_terms(rows, width) for rows, width in keys])
        seconds = np.array([self._seconds[key] for key in keys])
        # Relative errors count, or the widest batches would decide how the smallest are judged.
        weights = 1.0 / seconds
        solution = np.linalg.lstsq(terms * weights[:, None], np.ones(len(keys)), rcond=None)[0]
        return tuple(float(value) for value in solution)

    def _forget_guesses(self) -> None:
        self._fit, self._guesses, self._guesses_age = None, {}, 0


def _terms(rows: int, width: int) -> tuple[float, float, float, float]:
    return (1.0, float(rows), float(width), float(rows * width))


class StepCosts:
    """Measured seconds of the phases of a step.

    - draft: table over (rows, drafted tokens) of the whole drafting phase.
    - verify: table over (rows, 1 + drafted tokens), at a KV length of `held_tokens`.
    - kv_s: seconds that a row's verification takes more for each token of KV beyond that, as (a, b) in
      a + b * width.
    - slowdown: how much slower than at the calibration the machine is now (median of the last steps); the
      tables hold seconds at the speed of the calibration.
    - other_s: what a step takes beside drafting and verifying (median of the last steps).
    - stretch: how much longer a step takes than its thread works, which waits now and then for a core or for
      the interpreter's lock (median of the last steps). Drafts are chosen by work alone: what a step waits
      would only blur the differences between sizes. What the scheduler is told is in seconds that pass.
    - calibrated: whether the tables can judge lengths that were not tried.
    - batch, drafted, modelled, reach_tokens: rows of the last step, its draft length, that of the draft model
      alone (lookups cost no model), and its longest KV.
    """

    def __init__(self) -> None:
        self.draft = CostTable()
        self.verify = CostTable()
        self.other_s = 0.0
        self.held_tokens = 0
        self.kv_s = (0.0, 0.0)
        self.slowdown = 1.0
        self.stretch = 1.0
        self.prefill = PrefillCost()
        self.draft_prefill = PrefillCost()
        self.calibrated = False
        self.batch = 1
        self.drafted = 0
        self.modelled = 0
        self.reach_tokens = 0
        self._ratios: deque[float] = deque(maxlen=_SPEED_STEPS)
        self._others: deque[float] = deque(maxlen=_OTHER_STEPS)
        self._stretches: deque[float] = deque(maxlen=_OTHER_STEPS)

    def draft_s(self, draft_tokens: int) -> float:
        """Seconds per drafted token (T_ssm) for one who takes every step to draft `draft_tokens` (n): chosen
        so that n * T_ssm + T_llm is a step of the present batch with the lengths that it really drafts. 0
        without a draft model, or where all was looked up or nothing drafted.
        """
        if draft_tokens == 0:
            return 0.0
        modelled = self.modelled if self._others else draft_tokens
        return self.stretch * self.slowdown * self._draft_s(self.batch, modelled) / draft_tokens

    @property
    def verify_s(self) -> float:
        """Seconds to verify the present batch at its present draft length, with all else that the step does
        but drafting (T_llm).
        """
        verify_s = self.slowdown * self._verify_s(self.batch, self.drafted, self.reach_tokens)
        return self.stretch * (verify_s + self.other_s)

    @property
    def prefill_s_per_token(self) -> float:
        """Seconds per prompt token, in chunks of a usual size."""
        return self.stretch * self.prefill.seconds(_USUAL_CHUNK_TOKENS) / _USUAL_CHUNK_TOKENS

    def step_s(self, rows: int, drafted: int, modelled: int | None = None, reach_tokens: int = 0) -> float:
        """Busy seconds expected of a step without prefill over `rows` rows, the longest holding
        `reach_tokens`, whose longest draft has `drafted` tokens, and the longest of the draft model
        `modelled` (None: as many).
        """
        return self.slowdown * self._model_s(rows, drafted, modelled, reach_tokens) + self.other_s

    def steps_s(
        self, rows: int, modelled: int, drafted: int, reach_tokens: int = 0
    ) -> npt.NDArray[np.float64]:
        """`step_s` for all lengths up to these: [1 + modelled, 1 + drafted]."""
        drafting = np.array([self._draft_s(rows, length) for length in range(modelled + 1)])
        verifying = np.array([self._verify_s(rows, length, reach_tokens) for length in range(drafted + 1)])
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
        reach_tokens: int = 0,
        passed_s: float | None = None,
    ) -> None:
        """Learns from a step: first the speed of the machine, then what is particular to this size.

        passed_s: the time that passed in it, where that is more than the busy seconds of its parts.
        """
        modelled = drafted if modelled is None else modelled
        self.batch, self.drafted, self.modelled, self.reach_tokens = rows, drafted, modelled, reach_tokens
        expected_s = self._model_s(rows, drafted, modelled, reach_tokens)
        if self.calibrated and expected_s > 0:
            # The median: a step that the operating system interrupted must not overturn the others, but a
            # machine that has changed its speed shows it in two steps.
            self._ratios.append((draft_s + verify_s) / expected_s)
            self.slowdown = statistics.median(self._ratios)
        if modelled:
            self.draft.observe(rows, modelled, draft_s / self.slowdown)
        # Never less than half: what is left of a step dominated by its KV says little of the rest.
        calm_s = verify_s / self.slowdown
        self.verify.observe(
            rows, drafted + 1, max(calm_s - self._kv_s(rows, drafted, reach_tokens), 0.5 * calm_s)
        )
        self._others.append(max(other_s, 0.0))
        self.other_s = statistics.median(self._others)
        busy_s = draft_s + verify_s + other_s
        self._stretches.append(max(passed_s / busy_s, 1.0) if passed_s and busy_s > 0 else 1.0)
        self.stretch = statistics.median(self._stretches)

    def _model_s(self, rows: int, drafted: int, modelled: int | None, reach_tokens: int) -> float:
        drafting = self._draft_s(rows, drafted if modelled is None else modelled)
        return drafting + self._verify_s(rows, drafted, reach_tokens)

    def _draft_s(self, rows: int, modelled: int) -> float:
        return self.draft.estimate(rows, modelled) if modelled else 0.0

    def _verify_s(self, rows: int, drafted: int, reach_tokens: int) -> float:
        known = self.verify.estimate(rows, drafted + 1)
        # A KV shorter than the calibration's saves time too, but no step is free.
        return max(known + self._kv_s(rows, drafted, reach_tokens), 0.5 * known)

    def _kv_s(self, rows: int, drafted: int, reach_tokens: int) -> float:
        if reach_tokens == 0:
            return 0.0
        fixed, by_width = self.kv_s
        return rows * (reach_tokens - self.held_tokens) * (fixed + by_width * (drafted + 1))


class PrefillCost:
    """Seconds of prefilling: a part for each pass, one for each token, one for each token and each token
    before it.

    The shares are those of the calibration; `observe` follows the speed of the machine.
    """

    def __init__(self) -> None:
        self.pass_s = 0.0
        self.token_s = 0.0
        self.pair_s = 0.0

    def set(self, pass_s: float, token_s: float, pair_s: float) -> None:
        """The three parts in seconds, as fitted; noise may have made one of them negative."""
        self.pass_s, self.token_s, self.pair_s = max(pass_s, 0.0), max(token_s, 1e-9), max(pair_s, 0.0)

    def seconds(self, tokens: int, start: int = 0, rows: int = 1) -> float:
        """Of one pass over `tokens` tokens behind `start` others in each of so many rows; 0 while nothing was
        measured.
        """
        if tokens <= 0:
            return 0.0
        return self.pass_s + rows * tokens * (self.token_s + (start + 0.5 * tokens) * self.pair_s)

    def affordable_tokens(self, seconds: float, start: int = 0) -> int:
        """The largest chunk behind `start` tokens that takes no longer than `seconds`."""
        left = seconds - self.pass_s
        if left <= 0.0:
            return 0
        by_token, by_square = self.token_s + start * self.pair_s, 0.5 * self.pair_s
        if by_square <= 1e-18:
            return int(left / max(by_token, 1e-12))
        root = math.sqrt(by_token * by_token + 4.0 * by_square * left)
        return int((root - by_token) / (2.0 * by_square))

    def observe(self, passes: Sequence[tuple[int, int, int]], seconds: float) -> None:
        """Scales all parts by how much longer than expected passes over (tokens, start, rows) took."""
        expected_s = sum(self.seconds(tokens, start, rows) for tokens, start, rows in passes)
        if expected_s <= 0.0:
            self.token_s = seconds / sum(tokens * rows for tokens, _, rows in passes)
            return
        ratio = min(max(seconds / expected_s, 1 / _OUTLIER), _OUTLIER)
        factor = 1.0 + _SMOOTHING * (ratio - 1.0)
        self.set(self.pass_s * factor, self.token_s * factor, self.pair_s * factor)
