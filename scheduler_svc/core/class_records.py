"""The sums that `laps-sd` keeps per class of request.

A handful of numbers per class, so they can be stored and read as JSON, and a process that starts again
goes on from there. `learning` makes estimates of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

FADE_AT = 5_000.0
"""Requests of a record at which its sums are halved: the recent past counts more than the distant one."""


@dataclass(slots=True)
class Moments:
    """Count, mean and sum of squared deviations (Welford)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1.0
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)

    def fade(self) -> None:
        self.count /= 2.0
        self.squares /= 2.0


@dataclass(slots=True)
class Line:
    """Sums of a regression of y, `mean` and `squares`, over x, `at` and `at_squares` (Welford)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    at: float = 0.0
    at_squares: float = 0.0
    covariation: float = 0.0

    def add(self, at: float, value: float) -> None:
        self.count += 1.0
        at_delta, delta = at - self.at, value - self.mean
        self.at += at_delta / self.count
        self.mean += delta / self.count
        self.at_squares += at_delta * (at - self.at)
        self.squares += delta * (value - self.mean)
        self.covariation += at_delta * (value - self.mean)

    def fade(self) -> None:
        self.count /= 2.0
        self.squares /= 2.0
        self.at_squares /= 2.0
        self.covariation /= 2.0

    def residuals(self, slope: float) -> Moments:
        """What is left of y when `slope * (x - at)` is taken out."""
        squares = self.squares - 2.0 * slope * self.covariation + slope * slope * self.at_squares
        return Moments(self.count, self.mean, max(0.0, squares))


@dataclass(slots=True)
class RateSpread:
    """Sums of a one-way analysis of variance: how much tokens per step differ between the requests of a
    class, and how much between the steps of one request (Searle, Casella and McCulloch, Variance
    Components, 3.6; requests weigh by their steps)."""

    requests: float = 0.0
    steps: float = 0.0
    squared_steps: float = 0.0
    mean: float = 0.0
    between: float = 0.0
    """Sum over requests of steps * (own mean - class mean) ** 2."""
    within: float = 0.0
    """Sum over steps of (tokens - own mean) ** 2."""

    def add(self, rate: float, steps: int, step_variance: float) -> None:
        self.requests += 1.0
        self.steps += steps
        self.squared_steps += steps * steps
        delta = rate - self.mean
        self.mean += delta * steps / self.steps
        self.between += steps * delta * (rate - self.mean)
        self.within += steps * step_variance

    def fade(self) -> None:
        self.requests /= 2.0
        self.steps /= 2.0
        self.squared_steps /= 2.0
        self.between /= 2.0
        self.within /= 2.0


@dataclass(slots=True)
class Rate:
    """Tokens and the steps that made them."""

    tokens: float = 0.0
    steps: float = 0.0

    def add(self, tokens: int, steps: int) -> None:
        self.tokens += tokens
        self.steps += steps

    def fade(self) -> None:
        self.tokens /= 2.0
        self.steps /= 2.0


@dataclass(slots=True)
class ClassRecord:
    """One class of requests."""

    tokens: float = 0.0
    steps: float = 0.0
    log_error: Moments = field(default_factory=Moments)
    """log(true length / predicted length)."""
    log_rate: Moments = field(default_factory=Moments)
    """log(tokens per step)."""
    covariation: float = 0.0
    """Sum of products of the deviations of those two."""
    by_prediction: Line = field(default_factory=Line)
    """`log_error` over log(predicted length), of requests whose client has predicted."""
    levels: dict[str, Line] = field(default_factory=dict)
    """The same by level of the prediction (powers of two), our own guesses apart."""
    rates: dict[str, Rate] = field(default_factory=dict)
    """Tokens per step by size of the client's prediction, coarse and fine (`rate_levels`)."""
    spread: RateSpread = field(default_factory=RateSpread)

    def add(
        self,
        predicted_tokens: float,
        hinted: bool,
        tokens: int,
        steps: int,
        step_variance: float | None = None,
    ) -> None:
        log_predicted = math.log(predicted_tokens)
        log_error = math.log(max(1, tokens)) - log_predicted
        log_rate = math.log(max(0.2, tokens / steps))
        rate_deviation = log_rate - self.log_rate.mean
        self.log_error.add(log_error)
        self.log_rate.add(log_rate)
        self.covariation += rate_deviation * (log_error - self.log_error.mean)
        if hinted:
            self.by_prediction.add(log_predicted, log_error)
            for name in rate_levels(predicted_tokens):
                self.rates.setdefault(name, Rate()).add(tokens, steps)
        level = prediction_level(predicted_tokens, hinted)
        self.levels.setdefault(level, Line()).add(log_predicted, log_error)
        self.tokens += tokens
        self.steps += steps
        if step_variance is not None:
            self.spread.add(tokens / steps, steps, step_variance)
        if self.log_error.count >= FADE_AT:
            self.tokens /= 2.0
            self.steps /= 2.0
            self.covariation /= 2.0
            for moments in (self.log_error, self.log_rate):
                moments.fade()
            for line in (self.by_prediction, *self.levels.values()):
                line.fade()
            for rate in self.rates.values():
                rate.fade()
            self.spread.fade()

    def to_json(self) -> str:
        return json.dumps(
            {
                "requests": round(self.log_error.count, 3),
                "tokens_per_step": round(self.tokens / self.steps, 4) if self.steps else None,
                "tokens": self.tokens,
                "steps": self.steps,
                "log_error": asdict(self.log_error),
                "log_rate": asdict(self.log_rate),
                "covariation": self.covariation,
                "by_prediction": asdict(self.by_prediction),
                "levels": {level: asdict(line) for level, line in sorted(self.levels.items())},
                "rates": {level: asdict(rate) for level, rate in sorted(self.rates.items())},
                "spread": asdict(self.spread),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> ClassRecord:
        """Raises ValueError for anything that `to_json` has not written."""
        try:
            entry = json.loads(text)
            record = cls(
                tokens=number(entry["tokens"]),
                steps=number(entry["steps"]),
                log_error=_moments(entry["log_error"]),
                log_rate=_moments(entry["log_rate"]),
                covariation=number(entry["covariation"]),
                by_prediction=_line(entry["by_prediction"]),
                levels={str(level): _line(row) for level, row in entry["levels"].items()},
                rates={
                    str(level): Rate(number(row["tokens"]), number(row["steps"]))
                    for level, row in entry.get("rates", {}).items()
                },
                spread=RateSpread(**{name: number(value) for name, value in entry.get("spread", {}).items()}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of a class: {error}") from error
        return record


def _moments(row: Any) -> Moments:
    return Moments(number(row["count"]), number(row["mean"]), number(row["squares"]))


def _line(row: Any) -> Line:
    return Line(
        number(row["count"]),
        number(row["mean"]),
        number(row["squares"]),
        number(row["at"]),
        number(row["at_squares"]),
        number(row["covariation"]),
    )


def number(value: Any) -> float:
    """Raises ValueError or TypeError for what is no finite number."""
    read = float(value)
    if not math.isfinite(read):
        raise ValueError("not a finite number")
    return read


def prediction_level(predicted_tokens: float, hinted: bool) -> str:
    """The power of two next to the prediction; guesses of our own are kept apart from the client's."""
    power = round(math.log2(max(1.0, predicted_tokens)))
    return f"~{2**power}" if hinted else f"guess {2**power}"


def rate_levels(predicted_tokens: float) -> tuple[str, str]:
    """Two ranges of tokens that a client's prediction lies in, one octave wide and half of one."""
    log_predicted = math.log2(max(1.0, predicted_tokens))
    return _range(round(log_predicted), 0.5), _range(round(2.0 * log_predicted) / 2.0, 0.25)


def _range(middle: float, reach: float) -> str:
    return f"{2.0 ** (middle - reach):.1f}-{2.0 ** (middle + reach):.1f}"
