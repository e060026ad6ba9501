"""Which request's KV lies in which slot, and what happens when there are more requests than slots.

The rows that decode in a step must lie in the first slots, so that the batch is a plain slice of every
tensor. Rows are moved only then, and only those that are out of place; a preempted row stays where it is
until its slot is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .cache import SlotCache
from .rows import Place, Row


@dataclass(frozen=True, slots=True)
class _Parked:
    parts: list[list[Tensor]]
    size_bytes: int


class Residency:
    """Places rows in slots of all caches alike (slot i of the target belongs to slot i of the draft), then in
    the host.
    """

    def __init__(self, caches: Sequence[SlotCache], slots: int, host_limit_bytes: int) -> None:
        self._caches = caches
        self._by_slot: list[Row | None] = [None] * slots
        self._idle: OrderedDict[str, Row] = OrderedDict()
        self._host: OrderedDict[str, tuple[Row, _Parked]] = OrderedDict()
        self._host_limit_bytes = host_limit_bytes
        self.host_bytes = 0
        self.dropped: list[Row] = []

    def seat(self, row: Row) -> None:
        """Gives a row a slot to run in, with its KV if the host holds it. The oldest idle row makes room."""
        if row.slot >= 0:
            self._idle.pop(row.request_id, None)
        else:
            # Out of the host first, or making room could push out the very row that comes back.
            parked = self._take_from_host(row)
            row.slot = self._free_slot()
            self._by_slot[row.slot] = row
            if parked is not None:
                for cache, parts, tokens in zip(self._caches, parked.parts, row.kv_tokens, strict=False):
                    cache.put_back(row.slot, parts, tokens)
        row.place = Place.RUNNING

    def set_idle(self, row: Row) -> None:
        """The row leaves the batch; its KV stays in its slot until that is needed."""
        row.place = Place.SLOT
        self._idle[row.request_id] = row

    def forget(self, row: Row) -> None:
        """Frees whatever the row holds."""
        self._idle.pop(row.request_id, None)
        self._take_from_host(row)
        if row.slot >= 0:
            self._by_slot[row.slot] = None
            row.slot = -1
        if not any(self._by_slot):
            self.shrink()

    def arrange(self, rows: Iterable[Row]) -> tuple[list[Row], int]:
        """Brings the given rows into the first slots; returns them in slot order, and how many were moved."""
        wanted = set(rows)
        count = len(wanted)
        holes = [slot for slot in range(count) if self._by_slot[slot] not in wanted]
        if holes:
            movers = sorted((row for row in wanted if row.slot >= count), key=lambda row: row.slot)
            for row, slot in zip(movers, holes, strict=True):
                self._move(row, slot)
        return [row for row in self._by_slot[:count] if row is not None], len(holes)

    def shrink(self) -> None:
        """Gives back memory beyond the first block; for when no slot holds anything."""
        for cache in self._caches:
            cache.shrink()

    def tokens_held(self) -> int:
        """Tokens of the target's KV in slots."""
        return sum(row.kv_tokens[0] for row in self._by_slot if row is not None)

    def bytes_held(self) -> int:
        """Bytes of KV in slots, of all models."""
        return sum(
            tokens * cache.bytes_per_token
            for row in self._by_slot
            if row is not None
            for cache, tokens in zip(self._caches, row.kv_tokens, strict=False)
        )

    def _free_slot(self) -> int:
        for slot, row in enumerate(self._by_slot):
            if row is None:
                return slot
        _, oldest = self._idle.popitem(last=False)
        slot = oldest.slot
        self._park(oldest)
        return slot

    def _take_from_host(self, row: Row) -> _Parked | None:
        held = self._host.pop(row.request_id, None)
        if held is None:
            return None
        self.host_bytes -= held[1].size_bytes
        return held[1]

    def _park(self, row: Row) -> None:
        """Takes an idle row to host memory, or drops it where it does not fit."""
        size = sum(t * cache.bytes_per_token for cache, t in zip(self._caches, row.kv_tokens, strict=False))
        slot, row.slot = row.slot, -1
        self._by_slot[slot] = None
        if size > self._host_limit_bytes:
            self.dropped.append(row)
            return
        while self.host_bytes + size > self._host_limit_bytes:
            _, (victim, parked) = self._host.popitem(last=False)
            self.host_bytes -= parked.size_bytes
            self.dropped.append(victim)
        parts = [
            cache.take_out(slot, tokens) for cache, tokens in zip(self._caches, row.kv_tokens, strict=False)
        ]
        self._host[row.request_id] = (row, _Parked(parts, size))
        self.host_bytes += size
        row.place = Place.HOST

    def _move(self, row: Row, slot: int) -> None:
        other = self._by_slot[slot]
        source = row.slot
        if other is not None:
            spare = next((s for s, held in enumerate(self._by_slot) if held is None), None)
            if spare is None:
                for index, cache in enumerate(self._caches):
                    cache.swap(source, slot, max(row.kv_tokens[index], other.kv_tokens[index]))
                self._by_slot[source], self._by_slot[slot] = other, row
                other.slot, row.slot = source, slot
                return
            self._copy(other, spare)
        self._copy(row, slot)

    def _copy(self, row: Row, slot: int) -> None:
        for cache, tokens in zip(self._caches, row.kv_tokens, strict=False):
            cache.copy(row.slot, slot, tokens)
        self._by_slot[row.slot] = None
        self._by_slot[slot] = row
        row.slot = slot
