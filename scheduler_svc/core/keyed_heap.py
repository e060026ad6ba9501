"""A priority queue whose entries can be re-keyed and removed."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

Name = TypeVar("Name")

_SLACK = 64


class KeyedHeap(Generic[Name]):
    """Names in the order of their keys. Every change costs O(log n): an entry that is re-keyed
    or removed stays in the heap as a dead one and is skipped when it comes up, and the heap is
    rebuilt when more than half of it is dead. Keys must be comparable with each other."""

    __slots__ = ("_heap", "_keys")

    def __init__(self) -> None:
        self._heap: list[tuple[Any, Name]] = []
        self._keys: dict[Name, Any] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: Name) -> bool:
        return name in self._keys

    def put(self, name: Name, key: Any) -> bool:
        """Adds the name, or gives it another key. Keys of different names must differ. False: it had that
        key already."""
        if self._keys.get(name) == key:
            return False
        self._keys[name] = key
        if len(self._heap) > 2 * len(self._keys) + _SLACK:
            self._heap = [(key, name) for name, key in self._keys.items()]
            heapify(self._heap)
        else:
            heappush(self._heap, (key, name))
        return True

    def remove(self, name: Name) -> bool:
        """Whether the name was there."""
        return self._keys.pop(name, None) is not None

    def key(self, name: Name) -> Any:
        """The name's key, None where it is not there."""
        return self._keys.get(name)

    def first(self) -> tuple[Any, Name] | None:
        """The least key and its name."""
        heap, keys = self._heap, self._keys
        while heap:
            entry = heap[0]
            if keys.get(entry[1]) == entry[0]:
                return entry
            heappop(heap)
        return None

    def ordered(self) -> list[Name]:
        """All names in order, O(n log n)."""
        return sorted(self._keys, key=self._keys.__getitem__)
