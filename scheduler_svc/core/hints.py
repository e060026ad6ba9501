"""What requests with the very same prediction turned out to be.

Predictions often come in few values: those of a classifier, or a constant that a client has written beside
each of its calls; and a length that is right to the token is mostly that of the same request before. Each
such value of a class is a kind of request of its own. The last thousand of them are kept, in drawers, so
that what has changed is little to store; a full drawer drops what was not seen for longest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from zlib import crc32

from scheduler_svc.core.class_records import Moments, Rate, number

DRAWERS = 64
ROWS_PER_DRAWER = 16
TOLD_AT_ONCE = 16
"""Drawers that are written in one tick: all of them would hold it up for some milliseconds."""
FADE_AT = 1_000.0
"""Requests of one prediction at which their sums are halved: a call site changes with its program."""

Hint = tuple[str, float]
"""A class of requests, and the tokens that were predicted."""


@dataclass(slots=True)
class HintRecord:
    """One prediction of one class."""

    log_error: Moments = field(default_factory=Moments)
    """log(true length / predicted length)."""
    rate: Rate = field(default_factory=Rate)

    def add(self, log_error: float, tokens: int, steps: int) -> None:
        self.log_error.add(log_error)
        self.rate.add(tokens, steps)
        if self.log_error.count >= FADE_AT:
            self.log_error.fade()
            self.rate.fade()


class HintRecords:
    """All that are kept, by class and prediction."""

    def __init__(self) -> None:
        self._drawers: list[dict[Hint, HintRecord]] = [{} for _ in range(DRAWERS)]
        """Each with what was seen last at its end."""
        self._changed: dict[int, None] = {}
        """Drawers to tell of, the longest changed first."""

    def get(self, request_class: str, predicted_tokens: float) -> HintRecord | None:
        hint = request_class, predicted_tokens
        return self._drawers[_drawer(hint)].get(hint)

    def add(
        self, request_class: str, predicted_tokens: float, log_error: float, tokens: int, steps: int
    ) -> None:
        hint = request_class, predicted_tokens
        index = _drawer(hint)
        record = self._drawers[index].pop(hint, None) or HintRecord()
        record.add(log_error, tokens, steps)
        self._put(index, hint, record)
        self._changed[index] = None

    def take_changes(self) -> Iterator[tuple[str, str]]:
        """Names and contents of drawers in which something was learnt since they were told last; the next
        calls tell the others."""
        for index in list(self._changed)[:TOLD_AT_ONCE]:
            del self._changed[index]
            yield str(index), self._to_json(index)

    def _to_json(self, index: int) -> str:
        return json.dumps(
            [
                {
                    "class": request_class,
                    "predicted_tokens": predicted_tokens,
                    "requests": record.log_error.count,
                    "log_error": record.log_error.mean,
                    "squares": record.log_error.squares,
                    "tokens": record.rate.tokens,
                    "steps": record.rate.steps,
                }
                for (request_class, predicted_tokens), record in self._drawers[index].items()
            ]
        )

    def restore(self, text: str) -> None:
        """Takes over a drawer. Raises ValueError, having changed nothing, for anything that `take_changes`
        has not told."""
        try:
            rows = [
                (
                    (str(row["class"]), number(row["predicted_tokens"])),
                    HintRecord(
                        Moments(number(row["requests"]), number(row["log_error"]), number(row["squares"])),
                        Rate(number(row["tokens"]), number(row["steps"])),
                    ),
                )
                for row in json.loads(text)
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"no drawer of predictions: {error}") from error
        for hint, record in rows:
            self._put(_drawer(hint), hint, record)

    def _put(self, index: int, hint: Hint, record: HintRecord) -> None:
        drawer = self._drawers[index]
        drawer[hint] = record
        if len(drawer) > ROWS_PER_DRAWER:
            del drawer[next(iter(drawer))]


def _drawer(hint: Hint) -> int:
    return crc32(f"{hint[1]!r} {hint[0]}".encode()) % DRAWERS
