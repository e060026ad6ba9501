"""A priority queue whose entries can be re-keyed and removed."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

Name = TypeVar("Name")

# Not tuple[Any, Name]: compiled code would take such a tuple apart and put another one together, and here it
# matters which one it is.
_Entry = tuple[Any, ...]
"""Key and name."""

_SLACK = 64
_SWEPT_AT_ONCE = 4
"""Entries that one `put` looks through where dead ones are swept out."""


class KeyedHeap(Generic[Name]):
    """Names in the order of their keys. Every change costs O(log n), never more at once: an entry that is
    re-keyed or removed stays in the heap as a dead one and is skipped when it comes up. When more than half
    of the heap is dead a second one is begun, and each `put` takes a few entries over, of those that live:
    building it anew in one go would stop the caller for long where there are very many. Keys must be
    comparable with each other."""

    __slots__ = ("_entries", "_heap", "_swept")

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._swept: list[_Entry] = []
        """The heap before, while it is swept, from its end: without its last entry a heap is still one."""
        self._entries: dict[Name, _Entry] = {}
        """An entry lives if it is this very one: after a change back there are two of the same key."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: Name) -> bool:
        return name in self._entries

    def put(self, name: Name, key: Any) -> bool:
        """Adds the name, or gives it another key. Keys of different names must differ. False: it had that
        key already."""
        before = self._entries.get(name)
        if before is not None and before[0] == key:
            return False
        entry: _Entry = (key, name)
        self._entries[name] = entry
        heappush(self._heap, entry)
        if self._swept:
            self._sweep()
        elif len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap, self._swept = [], self._heap
        return True

    def _sweep(self) -> None:
        heap, swept, entries = self._heap, self._swept, self._entries
        for _ in range(min(_SWEPT_AT_ONCE, len(swept))):
            entry = swept.pop()
            if entries.get(entry[1]) is entry:
                heappush(heap, entry)

    def remove(self, name: Name) -> bool:
        """Whether the name was there."""
        return self._entries.pop(name, None) is not None

    def key(self, name: Name) -> Any:
        """The name's key, None where it is not there."""
        entry = self._entries.get(name)
        return None if entry is None else entry[0]

    def first(self) -> tuple[Any, Name] | None:
        """The least key and its name."""
        entry = self._first_of(self._heap)
        if self._swept:
            other = self._first_of(self._swept)
            if entry is None or (other is not None and other[0] < entry[0]):
                entry = other
        return None if entry is None else (entry[0], entry[1])

    def _first_of(self, heap: list[_Entry]) -> _Entry | None:
        entries = self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[1]) is entry:
                return entry
            heappop(heap)
        return None

    def ordered(self) -> list[Name]:
        """All names in order, O(n log n)."""
        return [name for _, name in sorted(self._entries.values(), key=_key)]


def _key(entry: _Entry) -> Any:
    return entry[0]
