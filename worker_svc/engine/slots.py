"""Which KV lies in which slot, and what happens when there are more requests than slots, or than memory.

The rows that decode in a step must lie in the first slots, so that the batch is a plain slice of every
tensor. Rows are moved only then, and only those that are out of place; a preempted row stays where it is
until its slot or its memory is needed. What a finished request leaves in its slot is kept as long as nobody
needs the place: a request whose prompt begins in the same way takes its KV from there, or from any other
request.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .cache import SlotCache
from .rows import TARGET, Place, Row

log = logging.getLogger(__name__)

# Copying fewer tokens saves less than it costs to look for them.
LEAST_SHARED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Parked:
    parts: list[list[Tensor]]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a finished request has left: its tokens, and how many of them have their KV, by model."""

    tokens: list[int]
    kv_tokens: list[int]


class Residency:
    """Places rows in slots of all caches alike (slot i of the target belongs to slot i of the draft), then in
    the host.
    """

    def __init__(self, caches: Sequence[SlotCache], slots: int, host_limit_bytes: int) -> None:
        self._caches = caches
        self._by_slot: list[Row | None] = [None] * slots
        self._idle: OrderedDict[str, Row] = OrderedDict()
        self._host: OrderedDict[str, tuple[Row, _Parked]] = OrderedDict()
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._host_limit_bytes = host_limit_bytes
        self.host_bytes = 0
        self.dropped: list[Row] = []

    def seat(self, row: Row) -> None:
        """Gives a row a slot to run in, with its KV if the host holds it. The idle row that would run last
        makes room.
        """
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
        """The row leaves the batch; its KV stays where it is until that is needed."""
        if row.slot < 0:
            return
        row.place = Place.SLOT
        self._idle[row.request_id] = row

    def forget(self, row: Row, keep: bool = False) -> None:
        """Frees whatever the row holds; with `keep`, its KV stays for others to share as long as there is
        room.
        """
        self._idle.pop(row.request_id, None)
        self._take_from_host(row)
        if row.slot >= 0:
            self._by_slot[row.slot] = None
            if keep and row.kv_tokens[TARGET] >= LEAST_SHARED_TOKENS:
                self._kept[row.slot] = _Kept(row.tokens, list(row.kv_tokens))
            else:
                self._release(row.slot)
            row.slot = -1
        if not any(self._by_slot) and not self._kept:
            self.shrink()

    def forget_kept(self) -> None:
        """Frees all that finished requests have left."""
        while self._kept:
            self._release(self._kept.popitem(last=False)[0])
        if not any(self._by_slot):
            self.shrink()

    def share(self, row: Row) -> int:
        """Copies to a seated row the KV of the longest prefix that it has in common with what lies in another
        slot, if that is more than it has. Returns the tokens gained.
        """
        best, source, held = row.kv_tokens[TARGET] + LEAST_SHARED_TOKENS - 1, -1, row.kv_tokens
        wanted = row.tokens[:-1]
        for slot, other in self._contents():
            known = other.kv_tokens[TARGET]
            if len(wanted) <= best or known <= best or other.tokens[best] != wanted[best]:
                continue
            common = min(common_prefix(other.tokens, wanted), known)
            if common > best:
                best, source, held = common, slot, other.kv_tokens
        if source < 0:
            return 0
        gained = best - row.kv_tokens[TARGET]
        for model, cache in enumerate(self._caches):
            tokens = min(best, held[model])
            if tokens > row.kv_tokens[model]:
                cache.copy(source, row.slot, tokens)
                row.kv_tokens[model] = tokens
        if source in self._kept:
            self._kept.move_to_end(source)
        return gained

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

    def make_room(self, needed_bytes: int, limit_bytes: int, wanted: Sequence[Row]) -> None:
        """Brings what lies in slots beside the `wanted` rows down to what `limit_bytes` leaves when these
        take `needed_bytes`: first what finished requests left, then idle rows, last in the order of running
        first.
        """
        keep = set(wanted)
        others = sum(self._slot_bytes(slot) for slot, row in enumerate(self._by_slot) if row not in keep)
        while others + needed_bytes > limit_bytes and self._kept:
            slot, _ = self._kept.popitem(last=False)
            others -= self._slot_bytes(slot)
            self._release(slot)
        while others + needed_bytes > limit_bytes and self._idle:
            victim = self._last_to_run()
            others -= self._slot_bytes(victim.slot)
            self.park(victim)

    def park(self, row: Row) -> None:
        """Takes a row out of its slot to host memory; there those that would run last are dropped where it
        does not fit.
        """
        self._idle.pop(row.request_id, None)
        size = sum(cache.host_bytes(t) for cache, t in zip(self._caches, row.kv_tokens, strict=False))
        slot, row.slot = row.slot, -1
        self._by_slot[slot] = None
        row.place = Place.HOST
        while size <= self._host_limit_bytes < self.host_bytes + size:
            victim, parked = max(self._host.values(), key=lambda held: held[0].run_order)
            if victim.run_order < row.run_order:
                break
            del self._host[victim.request_id]
            self.host_bytes -= parked.size_bytes
            self.dropped.append(victim)
        parts = self._parts(row, slot) if self.host_bytes + size <= self._host_limit_bytes else None
        if parts is None:
            self.dropped.append(row)
        else:
            self._host[row.request_id] = (row, _Parked(parts, size))
            self.host_bytes += size
        self._release(slot)

    def _parts(self, row: Row, slot: int) -> list[list[Tensor]] | None:
        """None: the host has less memory than its limit says. Then the row is prefilled again."""
        try:
            return [
                cache.take_out(slot, tokens)
                for cache, tokens in zip(self._caches, row.kv_tokens, strict=False)
            ]
        except RuntimeError as error:
            log.warning("no memory on the host for the KV of a request: %s", error)
            return None

    def shrink(self) -> None:
        """Empties all slots, and gives back what memory can be; for when no slot holds anything."""
        for cache in self._caches:
            cache.shrink()

    def tokens_held(self) -> int:
        """Tokens of the target's KV in slots, of all requests."""
        return sum(row.kv_tokens[TARGET] for row in self._by_slot if row is not None)

    def tokens_kept(self) -> int:
        """Tokens of the target's KV that finished requests have left."""
        return sum(kept.kv_tokens[TARGET] for kept in self._kept.values())

    def bytes_held(self) -> int:
        """Bytes of KV in slots, of all requests and models."""
        return sum(
            tokens * cache.bytes_per_token
            for row in self._by_slot
            if row is not None
            for cache, tokens in zip(self._caches, row.kv_tokens, strict=False)
        )

    def _contents(self) -> Iterable[tuple[int, Row | _Kept]]:
        yield from self._kept.items()
        yield from ((slot, row) for slot, row in enumerate(self._by_slot) if row is not None)

    def _slot_bytes(self, slot: int) -> int:
        return sum(cache.written[slot] * cache.bytes_per_token for cache in self._caches)

    def _release(self, slot: int) -> None:
        for cache in self._caches:
            cache.trim(slot, 0)

    def _free_slot(self) -> int:
        for slot, row in enumerate(self._by_slot):
            if row is None and slot not in self._kept:
                return slot
        if self._kept:
            slot, _ = self._kept.popitem(last=False)
            # Else its pages stay, and the budget counts the row that comes by its own length.
            self._release(slot)
            return slot
        victim = self._last_to_run()
        slot = victim.slot
        self.park(victim)
        return slot

    def _last_to_run(self) -> Row:
        """The idle row that the scheduler would run last; of equal ones the first that became idle."""
        return max(self._idle.values(), key=lambda row: row.run_order)

    def _take_from_host(self, row: Row) -> _Parked | None:
        held = self._host.pop(row.request_id, None)
        if held is None:
            return None
        self.host_bytes -= held[1].size_bytes
        return held[1]

    def _move(self, row: Row, slot: int) -> None:
        other = self._by_slot[slot]
        source = row.slot
        if other is not None:
            # Both slots' memory is there. To copy one to an empty slot costs more: each of its pages comes
            # from the system anew.
            for index, cache in enumerate(self._caches):
                cache.swap(source, slot, max(row.kv_tokens[index], other.kv_tokens[index]))
                cache.trim(source, other.kv_tokens[index])
                cache.trim(slot, row.kv_tokens[index])
            self._by_slot[source], self._by_slot[slot] = other, row
            other.slot, row.slot = source, slot
            return
        kept = self._kept.pop(slot, None)
        empty = [s for s, held in enumerate(self._by_slot) if held is None and s not in self._kept]
        if kept is not None and empty and empty[-1] > slot:
            for cache, tokens in zip(self._caches, kept.kv_tokens, strict=False):
                cache.copy(slot, empty[-1], tokens)
            self._kept[empty[-1]] = kept
        self._copy(row, slot)

    def _copy(self, row: Row, slot: int) -> None:
        for cache, tokens in zip(self._caches, row.kv_tokens, strict=False):
            cache.copy(row.slot, slot, tokens)
            cache.trim(slot, tokens)
        self._by_slot[row.slot] = None
        self._release(row.slot)
        self._by_slot[slot] = row
        row.slot = slot


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    limit = min(len(first), len(second))
    count = 0
    while count < limit and first[count : count + 64] == second[count : count + 64]:
        count += 64
    if count >= limit:
        return limit
    while count < limit and first[count] == second[count]:
        count += 1
    return count
