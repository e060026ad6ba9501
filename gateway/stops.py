"""Stop strings in a growing text: O(1) amortised per character and string (Knuth, Morris, Pratt 1977)."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds matches as they are completed, and how much of the end could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failure_table(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        """Per stop string: characters at the end of the text that are its beginning."""
        self._length = 0

    def push(self, text: str) -> list[tuple[str, int]]:
        """Adds text; returns the stop strings that it completes, each with the position where it begins."""
        found: list[tuple[str, int]] = []
        for index, (stop, failure) in enumerate(self._stops):
            matched = self._matched[index]
            if not matched and stop[0] not in text:
                continue
            for i, char in enumerate(text):
                while matched and stop[matched] != char:
                    matched = failure[matched]
                if stop[matched] == char:
                    matched += 1
                    if matched == len(stop):
                        found.append((stop, self._length + i + 1 - matched))
                        matched = failure[matched]
            self._matched[index] = matched
        self._length += len(text)
        return found

    @property
    def partial_start(self) -> int:
        """Position from which on the text could be the beginning of a stop string; its length if nowhere."""
        return self._length - max(self._matched, default=0)


def _failure_table(stop: str) -> list[int]:
    """Entry n: length of the longest proper beginning of stop[:n] that is also its end."""
    table = [0, 0]
    length = 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = table[length]
        if stop[length] == char:
            length += 1
        table.append(length)
    return table
