"""What `laps-sd` learns from finished requests: how long they get and how much is accepted.

It makes estimates of the sums in `class_records`. Nothing here knows about queues or time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scheduler_svc.core.class_records import ClassRecord, Line, Moments, prediction_level, rate_levels
from scheduler_svc.core.hints import HintRecords

MAX_CLASSES = 256
"""Classes kept apart; clients choose their names, so later ones share one entry."""
OTHER_CLASSES = "(others)"
MAX_ANSWERS = 10_000
"""Of `Knowledge.of_request` that are kept: clients choose their predictions."""

PRIOR_LOG_SD = 0.3
PRIOR_WEIGHT = 4.0
"""Before anything is learnt, predictions count as unbiased, with this log error, as firmly as after so
many requests."""
SHARED_WEIGHT = 8.0
"""What is known of all requests weighs as so many requests of one class."""
LEVEL_WEIGHT = 24.0
"""What the line of its class says of a prediction weighs as so many requests with predictions of its size."""
HINT_WEIGHT = 8.0
"""What its class and size say of a prediction weighs as so many requests with the very same one."""
HINT_STEPS = 20.0
"""Steps that they weigh in the tokens per step of those."""
LINE_RIDGE = 4.0
"""Sum of squared deviations of log predictions that the slope of all classes weighs in that of one, and a
slope of 0 in that of all."""
LEAST_LINE_SLOPE, MOST_LINE_SLOPE = -1.0, 0.5
"""At -1 a prediction says nothing about a request within its class."""
SLOPE_RIDGE = 2.0
"""Sum of squared deviations of log tokens per step that the absence of a correlation weighs."""
MAX_SLOPE = 2.0
PRIOR_TOKENS_PER_STEP = 2.0
PRIOR_RATE_STEPS = 20.0
"""Steps that the class mean of the tokens per step weighs in a request's own, until that is learnt."""
LEAST_RATE_STEPS, MOST_RATE_STEPS = 4.0, 80.0
RATE_STEPS_WEIGHT = 2_000.0
"""Steps that the prior of that weight counts for."""
PRIOR_STEP_VARIANCE = 1.5
"""Variance of the tokens of single steps within a request that the prior assumes."""
SHARED_STEPS = 100.0
"""Steps that the mean over all classes weighs in the mean of one."""
LEVEL_STEPS = 50.0
"""Steps that the mean of its class weighs in the tokens per step of predictions within an octave, and the
mean of those in that within half an octave."""
LEVEL_LOG_SD = 0.15
"""Log-error at which a prediction's size says half as much about tokens per step as a true length would."""


@dataclass(frozen=True, slots=True)
class LengthBelief:
    """Where the logarithm of a request's true length lies: the prediction, corrected."""

    median_tokens: float
    log_sd: float


class Knowledge:
    """All classes, what they have in common, and the predictions that were made more than once."""

    def __init__(self) -> None:
        self.classes: dict[str, ClassRecord] = {}
        self.everything = ClassRecord()
        self.hints = HintRecords()
        self._changed: set[str] = set()
        self._slope = 0.0
        self._slope_is_old = False
        self._line_slope = 0.0
        self._line_slope_is_old = False
        self._rate_steps = PRIOR_RATE_STEPS
        self._rate_steps_are_old = False
        self._of_requests: dict[tuple[str, float, bool], tuple[LengthBelief, float, float, float, float]] = {}
        """Answers of `of_request`, until more is learnt."""

    def add(
        self,
        request_class: str,
        predicted_tokens: float,
        hinted: bool,
        tokens: int,
        steps: int,
        step_variance: float | None = None,
    ) -> None:
        """A request has ended by itself after `steps` steps, whose tokens had that variance."""
        if steps < 1:
            return
        name = self._name(request_class)
        self.classes.setdefault(name, ClassRecord()).add(
            predicted_tokens, hinted, tokens, steps, step_variance
        )
        self.everything.add(predicted_tokens, hinted, tokens, steps)
        if hinted:
            log_error = math.log(max(1, tokens) / predicted_tokens)
            self.hints.add(name, predicted_tokens, log_error, tokens, steps)
        self._changed.add(name)
        self._forget_answers()

    def of_request(
        self, request_class: str, predicted_tokens: float, hinted: bool
    ) -> tuple[LengthBelief, float, float, float, float]:
        """All that is known of requests of that class and prediction: `length`, `tokens_per_step`,
        `rate_steps`, `rate_slope`, `typical_log_rate`. Of a queue that is ranked anew many ask the same."""
        key = (request_class, predicted_tokens, hinted)
        answer = self._of_requests.get(key)
        if answer is None:
            if len(self._of_requests) >= MAX_ANSWERS:
                self._of_requests.clear()
            length = self.length(*key)
            by_level = self._by_level(request_class, predicted_tokens, hinted, length.log_sd)
            answer = self._of_requests[key] = (
                length,
                self.tokens_per_step(request_class) * by_level,
                self.rate_steps(),
                self.rate_slope(),
                self.typical_log_rate(request_class) + math.log(by_level),
            )
        return answer

    def _forget_answers(self) -> None:
        self._slope_is_old = self._line_slope_is_old = self._rate_steps_are_old = True
        self._of_requests.clear()

    def requests(self, request_class: str) -> float:
        """Finished requests of the class that count."""
        record = self.classes.get(self._name(request_class))
        return 0.0 if record is None else record.log_error.count

    def length(self, request_class: str, predicted_tokens: float, hinted: bool) -> LengthBelief:
        """The prediction corrected by what predictions of its size and class turned out to be.

        A normal-inverse-gamma posterior of log(true / predicted), with all requests as the prior of the class
        (Gelman et al., Bayesian Data Analysis, 3.3). Within a class the error falls with the prediction: the
        longest predictions are mostly those that are too long. A line through the class's errors over
        log(predicted) takes that out, and is the prior of what predictions of that size turned out to be, and
        those of what the very same prediction did.
        """
        mean, variance = 0.0, PRIOR_LOG_SD**2
        mean, variance = _update(mean, variance, self.everything.log_error, PRIOR_WEIGHT)
        slope = at = 0.0
        name = self._name(request_class)
        record = self.classes.get(name)
        if record is not None:
            errors = record.log_error
            line = record.by_prediction
            if hinted and line.count > 0.0:
                slope, at = self._slope_of(line), line.at
                errors = line.residuals(slope)
            mean, variance = _update(mean, variance, errors, SHARED_WEIGHT)
            level = record.levels.get(prediction_level(predicted_tokens, hinted))
            if level is not None:
                off_line = Moments(level.count, level.mean - slope * (level.at - at), level.squares)
                mean, variance = _update(mean, variance, off_line, LEVEL_WEIGHT)
            mean += slope * (math.log(predicted_tokens) - at)
        if hinted:
            same = self.hints.get(name, predicted_tokens)
            if same is not None:
                mean, variance = _update(mean, variance, same.log_error, HINT_WEIGHT)
        return LengthBelief(predicted_tokens * math.exp(mean), math.sqrt(variance))

    def _slope_of(self, line: Line) -> float:
        """Of a class's line: its own, shrunk to that of all classes (a ridge regression)."""
        if self._line_slope_is_old:
            covariation = sum(record.by_prediction.covariation for record in self.classes.values())
            squares = LINE_RIDGE + sum(record.by_prediction.at_squares for record in self.classes.values())
            self._line_slope = covariation / squares
            self._line_slope_is_old = False
        slope = (line.covariation + LINE_RIDGE * self._line_slope) / (line.at_squares + LINE_RIDGE)
        return min(MOST_LINE_SLOPE, max(LEAST_LINE_SLOPE, slope))

    def tokens_per_step(self, request_class: str) -> float:
        """Mean of the class, shrunk to that of all requests."""
        shared = (SHARED_STEPS * PRIOR_TOKENS_PER_STEP + self.everything.tokens) / (
            SHARED_STEPS + self.everything.steps
        )
        record = self.classes.get(self._name(request_class))
        if record is None:
            return shared
        return (SHARED_STEPS * shared + record.tokens) / (SHARED_STEPS + record.steps)

    def _by_level(self, request_class: str, predicted_tokens: float, hinted: bool, log_sd: float) -> float:
        """By what factor the tokens per step of predictions of that size, and of that very one, differ from
        those of their class.
        The longest outputs, above all those that end at a limit, are often repetitions, and accepted at a
        glance. Where predictions are vague their sizes tell little, and what they tell is in the lengths'
        correction already."""
        name = self._name(request_class)
        record = self.classes.get(name)
        if record is None or not hinted:
            return 1.0
        of_class = of_level = self.tokens_per_step(request_class)
        for level in rate_levels(predicted_tokens):
            seen = record.rates.get(level)
            if seen is not None:
                of_level = (LEVEL_STEPS * of_level + seen.tokens) / (LEVEL_STEPS + seen.steps)
        same = self.hints.get(name, predicted_tokens)
        if same is not None:
            of_level = (HINT_STEPS * of_level + same.rate.tokens) / (HINT_STEPS + same.rate.steps)
        return float((of_level / of_class) ** (1.0 / (1.0 + (log_sd / LEVEL_LOG_SD) ** 2)))

    def rate_slope(self) -> float:
        """How much longer than predicted the well accepted requests of a class turn out to be:
        the slope of log(true / predicted) over log(tokens per step), pooled over classes.
        0 with good predictions; 1 means that acceptance says nothing about the number of steps."""
        if self._slope_is_old:
            covariation = sum(record.covariation for record in self.classes.values())
            squares = SLOPE_RIDGE + sum(record.log_rate.squares for record in self.classes.values())
            self._slope = min(MAX_SLOPE, max(0.0, covariation / squares))
            self._slope_is_old = False
        return self._slope

    def rate_steps(self) -> float:
        """Steps that the class mean weighs in the estimate of a request's tokens per step: the variance
        between the steps of a request over that between requests of a class, k0 of the best linear
        estimate (Buehlmann 1967), pooled over classes."""
        if self._rate_steps_are_old:
            within = RATE_STEPS_WEIGHT * PRIOR_STEP_VARIANCE
            steps = RATE_STEPS_WEIGHT
            between = within / PRIOR_RATE_STEPS
            weight = RATE_STEPS_WEIGHT
            spreads = [record.spread for record in self.classes.values() if record.spread.requests > 1.0]
            for spread in spreads:
                within += spread.within
                steps += spread.steps - spread.requests
            for spread in spreads:
                between += spread.between - (spread.requests - 1.0) * within / steps
                weight += spread.steps - spread.squared_steps / spread.steps
            ratio = (within / steps) / max(between / weight, 1e-6)
            self._rate_steps = min(MOST_RATE_STEPS, max(LEAST_RATE_STEPS, ratio))
            self._rate_steps_are_old = False
        return self._rate_steps

    def typical_log_rate(self, request_class: str) -> float:
        record = self.classes.get(self._name(request_class))
        return self.everything.log_rate.mean if record is None else record.log_rate.mean

    def take_changes(self) -> Iterator[tuple[str, ClassRecord]]:
        """Classes that learnt something since the last call."""
        for name in sorted(self._changed):
            yield name, self.classes[name]
        self._changed.clear()

    def restore(
        self, classes: Mapping[str, ClassRecord], everything: ClassRecord | None, hints: HintRecords
    ) -> None:
        self.hints = hints
        for name, record in list(classes.items())[: MAX_CLASSES + 1]:
            self.classes[name] = record
        if everything is not None:
            self.everything = everything
        self._forget_answers()

    def _name(self, request_class: str) -> str:
        if request_class in self.classes or len(self.classes) < MAX_CLASSES:
            return request_class
        return OTHER_CLASSES


def _update(mean: float, variance: float, seen: Moments, weight: float) -> tuple[float, float]:
    count = seen.count
    if count <= 0.0:
        return mean, variance
    total = weight + count
    delta = seen.mean - mean
    return (
        (weight * mean + count * seen.mean) / total,
        (weight * variance + seen.squares + weight * count / total * delta * delta) / total,
    )


def mean_excess_tokens(median_tokens: float, log_sd: float, emitted: int) -> float:
    """Expected further tokens of a log-normal length that is known to exceed `emitted`; at least 1."""
    if log_sd < 0.01:
        return max(1.0, median_tokens - emitted, 0.01 * emitted)
    location = math.log(median_tokens)
    mean = math.exp(location + log_sd * log_sd / 2.0)
    if emitted <= 0:
        return max(1.0, mean)
    deviation = (math.log(emitted) - location) / log_sd
    if deviation > 5.0:
        # The tail's own approximation; both probabilities below underflow there.
        return max(1.0, emitted * log_sd / deviation)
    return max(1.0, mean * _above(deviation - log_sd) / _above(deviation) - emitted)


def _above(deviation: float) -> float:
    """Probability that a standard normal variable exceeds `deviation`."""
    return 0.5 * math.erfc(deviation / math.sqrt(2.0))
