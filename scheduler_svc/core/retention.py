"""Which finished requests are still kept for readers and for joins by their id."""

from __future__ import annotations

from collections import deque

from scheduler_svc.core.records import Retained

_FORGOTTEN_AT_ONCE = 500
"""By one call: a long pause must not end in one very long commit."""


class Retention:
    """Bounded in time and in number; the oldest go first."""

    def __init__(self, retention_s: float, max_retained: int) -> None:
        self._retention_s = retention_s
        self._max_retained = max_retained
        self._order: deque[tuple[int, Retained]] = deque()
        """With the tick in which it ended."""
        self._by_id: dict[str, Retained] = {}

    def keep(self, retained: Retained, tick: int = 0) -> None:
        """`tick`: that in which it ended; 0: before this leadership."""
        self._by_id[retained.request_id] = retained
        self._order.append((tick, retained))

    def get(self, request_id: str) -> Retained | None:
        return self._by_id.get(request_id)

    def forget(self, now_s: float, logged_tick: int) -> list[str]:
        """Drops those that are past their time or over the number. Those that ended after `logged_tick` stay:
        the journal may still hold output of theirs, which a new request of the same id must not inherit."""
        forgotten: list[str] = []
        order = self._order
        while (
            order
            and len(forgotten) < _FORGOTTEN_AT_ONCE
            and order[0][0] <= logged_tick
            and (len(order) > self._max_retained or order[0][1].finished_s + self._retention_s <= now_s)
        ):
            request_id = order.popleft()[1].request_id
            del self._by_id[request_id]
            forgotten.append(request_id)
        return forgotten

    def next_timer_s(self, logged_tick: int) -> float | None:
        """None also where it is the journal that the first one waits for: that has a timer of its own."""
        if not self._order or self._order[0][0] > logged_tick:
            return None
        return self._order[0][1].finished_s + self._retention_s
