"""The KV cache of one model: a row of positions for each slot, with a length that the caller keeps.

All layers of one shape share a tensor [layers, slots, capacity, elements], in which the tokens of a slot lie
together in each layer: moving a slot, or taking it to the host, is one copy, and rejecting tokens is only a
smaller length. What lies behind a slot's length is rubbish of its own request, overwritten before any query
may see it; what nobody has written since the slot was emptied is zero, or padding.

On a CPU the whole range is addresses, which become memory page by page where something is written, and are
given back when the slot is emptied. A GPU has no such pages for a tensor. There the memory is taken at once:
the budget is set aside in any case, and to grow would need the old and the new cache side by side. Only where
a CPU has no lazy pages does the capacity of all slots grow with the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .config import MAX_DRAFT_TOKENS
from .memory import HAS_LAZY_PAGES, LazyTensor, pinned_bytes
from .transfers import upload

MARGIN_TOKENS = MAX_DRAFT_TOKENS + 1
"""Padding of short drafts may be written this far behind what a slot holds, at the end of its context too."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV of one token in one layer: heads, and the widths of a key and of a value.

    device: where the layer runs, if that is not where the cache's inputs lie.
    """

    heads: int
    key_dim: int
    value_dim: int
    device: torch.device | None = None

    @property
    def elements(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


def lazy_memory(layers: Sequence[LayerShape], device: torch.device) -> bool:
    """Whether the memory of these layers can follow what is written: where all of them are on the CPU."""
    return HAS_LAZY_PAGES and _on_cpu(layers, device)


def growing_memory(layers: Sequence[LayerShape], device: torch.device) -> bool:
    """Whether the memory of these layers is taken bit by bit: on a CPU without lazy pages."""
    return not HAS_LAZY_PAGES and _on_cpu(layers, device)


def _on_cpu(layers: Sequence[LayerShape], device: torch.device) -> bool:
    return all((shape.device or device).type == "cpu" for shape in layers)


class SlotCache:
    """KV of all layers for a fixed number of slots.

    limit_tokens: positions of a slot at most; the caller checks its requests against it. block_tokens: where
    capacity has to grow, it does so in blocks, doubling. lazy: whether memory follows what is written, or
    what is allocated; grows: whether what is allocated follows the longest slot (None: as the device allows).
    written[i]: positions of slot i written since it was last emptied. generation: of the tensors, which move
    when the cache grows or shrinks. states[i] is layer i's view [slots, capacity, elements], keys of all
    heads before values; keys[i] and values[i] are [slots, capacity, heads, dim].
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        slots: int,
        limit_tokens: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        lazy: bool | None = None,
        grows: bool | None = None,
    ) -> None:
        self.lazy = lazy_memory(layers, device) if lazy is None else lazy
        self.grows = growing_memory(layers, device) if grows is None else grows
        self.generation = 0
        self.written = [0] * slots
        self.shapes = tuple(layers)
        self.slots = slots
        self.limit_tokens = limit_tokens
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.device = device
        self.capacity_tokens = 0
        self.states: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.bytes_per_token = sum(shape.elements for shape in layers) * dtype.itemsize
        self._groups: dict[LayerShape, Tensor] = {}
        self._pages: list[LazyTensor] = []
        self._allocate(min(block_tokens, limit_tokens) if self.grows else limit_tokens)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the slots take up now."""
        tokens = sum(self.written) if self.lazy else self.slots * self.capacity_tokens
        return tokens * self.bytes_per_token

    def reserve(self, tokens: int) -> None:
        """Makes sure that every slot can hold `tokens`; doubles the capacity, so that growth is rare."""
        if tokens <= self.capacity_tokens:
            return
        if tokens > self.limit_tokens:
            raise AssertionError(f"{tokens} tokens asked of a cache limited to {self.limit_tokens}")
        wanted = max(tokens, 2 * self.capacity_tokens)
        blocks = -(-wanted // self.block_tokens)
        self._allocate(min(blocks * self.block_tokens, self.limit_tokens))

    def claim(self, slots: Sequence[int], starts: Sequence[int], queries: int) -> None:
        """Reserves and accounts what a pass writes: `queries` tokens from starts[i] on in slot slots[i]."""
        self.reserve(max(starts) + queries)
        for slot, start in zip(slots, starts, strict=True):
            if start + queries > self.written[slot]:
                self.written[slot] = start + queries

    def trim(self, slot: int, tokens: int) -> None:
        """Makes all behind the first `tokens` of a slot zero, and gives its memory back where memory follows
        what is written.

        A NaN that one request leaves would spoil the next: attention weighs what it may not see by zero, and
        zero times NaN is NaN.
        """
        excess = self.written[slot] - tokens
        if excess <= 0:
            return
        self.written[slot] = tokens
        if not self.lazy:
            for tensor in self._groups.values():
                # Padding of recorded passes is not accounted.
                tensor[:, slot, tokens : tokens + excess + MARGIN_TOKENS] = 0
        else:
            for pages, tensor in zip(self._pages, self._groups.values(), strict=True):
                layer, row, token = tensor.stride()[:3]
                for index in range(tensor.shape[0]):
                    pages.release(index * layer + slot * row + tokens * token, excess * token)

    def shrink(self) -> None:
        """Empties all slots, and gives back what memory can be: all where it follows what is written, all but
        one block where it grows, none on a GPU. For when no slot holds anything.
        """
        for slot in range(self.slots):
            self.trim(slot, 0)
        if self.grows and self.capacity_tokens > self.block_tokens:
            self._groups, self.capacity_tokens = {}, 0
            self._allocate(min(self.block_tokens, self.limit_tokens))

    def _allocate(self, capacity: int) -> None:
        grown = {}
        for shape in dict.fromkeys(self.shapes):
            # Zeros, not rubbish: a masked NaN would still poison the weighted sum of an attention kernel.
            size = (self.shapes.count(shape), self.slots, capacity, shape.elements)
            if self.lazy:
                self._pages.append(LazyTensor(size, self.dtype))
                tensor = self._pages[-1].tensor
            else:
                tensor = torch.zeros(size, dtype=self.dtype, device=shape.device or self.device)
            if shape in self._groups:
                tensor[:, :, : self.capacity_tokens] = self._groups[shape]
            grown[shape] = tensor
        self._groups = grown
        self.generation += 1
        self.capacity_tokens = capacity
        self.states, self.keys, self.values = [], [], []
        for index, shape in enumerate(self.shapes):
            state = grown[shape][self.shapes[:index].count(shape)]
            split = shape.heads * shape.key_dim
            self.states.append(state)
            self.keys.append(state[..., :split].view(*state.shape[:2], shape.heads, shape.key_dim))
            self.values.append(state[..., split:].view(*state.shape[:2], shape.heads, shape.value_dim))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` of one slot over another."""
        self.written[target] = max(self.written[target], tokens)
        for tensor in self._groups.values():
            tensor[:, target, :tokens] = tensor[:, source, :tokens]

    def swap(self, first: int, second: int, tokens: int) -> None:
        """Exchanges the first `tokens` of two slots."""
        self.written[first] = self.written[second] = max(self.written[first], self.written[second], tokens)
        for tensor in self._groups.values():
            held = tensor[:, first, :tokens].clone()
            tensor[:, first, :tokens] = tensor[:, second, :tokens]
            tensor[:, second, :tokens] = held

    def host_bytes(self, tokens: int) -> int:
        """Bytes of host memory that `take_out` takes for so many tokens."""
        sizes = [
            (tensor.shape[0] * tokens * tensor.shape[3] * self.dtype.itemsize, tensor.is_cuda)
            for tensor in self._groups.values()
        ]
        return sum(pinned_bytes(size) if pinned else size for size, pinned in sizes)

    def take_out(self, slot: int, tokens: int) -> list[Tensor]:
        """Copies a slot to host memory (pinned where the cache is on a GPU)."""
        parts = []
        for tensor in self._groups.values():
            pinned = tensor.is_cuda
            row = tensor[:, slot, :tokens]
            host = torch.empty(row.shape, dtype=row.dtype, pin_memory=pinned)
            # The device's own order is enough: the copy precedes any later write to the slot.
            host.copy_(row, non_blocking=pinned)
            parts.append(host)
        return parts

    def put_back(self, slot: int, parts: Sequence[Tensor], tokens: int) -> None:
        """Fills a slot from what `take_out` gave."""
        self.reserve(tokens)
        self.written[slot] = max(self.written[slot], tokens)
        for tensor, part in zip(self._groups.values(), parts, strict=True):
            tensor[:, slot, :tokens].copy_(part[:, :tokens], non_blocking=True)


class SlotWindow:
    """The part of a SlotCache that one forward pass writes and reads.

    Row i lies in slot slots[i]. It writes `queries` tokens from position starts[i] on and reads positions
    0 .. reach - 1, where reach is the end of the longest row. Rows that lie side by side, as those of a step
    do, are read where they are; of others a copy is read.
    """

    def __init__(self, cache: SlotCache, slots: Sequence[int], starts: Sequence[int], queries: int) -> None:
        self.first = slots[0]
        self.rows = len(starts)
        self.queries = queries
        self.starts = starts
        self.reach = max(starts) + queries
        cache.claim(slots, starts, queries)
        device = cache.device
        # Layers may lie on several devices, each of which needs the numbers.
        self._on: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        self._scattered: Tensor | None = None
        if self.rows == 1:
            self.positions = torch.arange(starts[0], starts[0] + queries, device=device)[None]
            self.index: Tensor | None = None
            return
        begin = upload(starts, device)
        self.positions = begin[:, None] + torch.arange(queries, device=device)
        if all(slot == place for place, slot in enumerate(slots, start=self.first)):
            lie = torch.arange(self.first, self.first + self.rows, device=device)
        else:
            self._scattered = lie = upload(slots, device)
        self.index = (lie[:, None] * cache.capacity_tokens + self.positions).view(-1)

    def write(self, store: Tensor, states: Tensor) -> Tensor:
        """Writes states [rows, queries, heads, width] into a layer's store; returns what the rows hold now,
        [rows, reach, heads, width].
        """
        if self.index is None:
            start = self.starts[0]
            store[self.first, start : start + self.queries] = states[0]
            return store[self.first : self.first + 1, : self.reach]
        numbers = self._on.get(store.device)
        if numbers is None:
            scattered = self._scattered
            numbers = self._on[store.device] = (
                self.index.to(store.device),
                scattered.to(store.device) if scattered is not None else None,
            )
        index, slots = numbers
        store.flatten(0, 1).index_copy_(0, index, states.flatten(0, 1))
        if slots is not None:
            return store[:, : self.reach].index_select(0, slots)
        return store[self.first : self.first + self.rows, : self.reach]

    def attends(self, sliding_tokens: int | None) -> Tensor:
        """Boolean mask [rows, 1, queries, reach]: causal by position, within a sliding window if one is
        given.
        """
        return self._attends(self.positions, sliding_tokens)

    def _attends(self, positions: Tensor, sliding_tokens: int | None) -> Tensor:
        columns = torch.arange(self.reach, device=positions.device)
        rows = positions[:, None, :, None]
        mask = columns <= rows
        if sliding_tokens is not None:
            mask &= columns > rows - sliding_tokens
        return mask


class StaticWindow(SlotWindow):
    """A window from slot 0 on whose begins lie on the device, so that no number of the host enters a pass.

    begins: int64 [rows], where each row writes. reach: positions read, at least up to the end of every row
    that counts. The caller reserves and accounts.
    """

    def __init__(self, cache: SlotCache, begins: Tensor, queries: int, reach: int) -> None:
        self.first = 0
        self.rows = begins.shape[0]
        self.queries = queries
        # Not known here; nothing that runs may ask for them.
        self.starts = [0] * self.rows
        self.reach = reach
        self._on = {}
        self._scattered = None
        self.positions = begins[:, None] + torch.arange(queries, device=begins.device)
        slots = torch.arange(self.rows, device=begins.device)
        self.index = (slots[:, None] * cache.capacity_tokens + self.positions).view(-1)

    def attends(self, sliding_tokens: int | None) -> Tensor:
        # Padding beyond the reach must see something: the NaN of an empty row would stay in the cache.
        return self._attends(self.positions.clamp(max=self.reach - 1), sliding_tokens)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer as transformers sees it: appends new states and hands back all that the rows of the window
    hold.
    """

    is_croppable = False

    def __init__(self, cache: SlotCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._index = index
        self.window: SlotWindow | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        window = self.window
        if window is None:
            raise AssertionError("a forward pass without a window")
        keys = window.write(self._cache.keys[self._index], key_states.transpose(1, 2))
        values = window.write(self._cache.values[self._index], value_states.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.window.reach if self.window else query_length), 0

    def get_seq_length(self) -> int:
        return min(self.window.starts) if self.window else 0

    def get_max_length(self) -> int:
        return self._cache.limit_tokens


class SlotCacheView(Cache):
    """A SlotCache in the form that transformers' models take as `past_key_values`."""

    def __init__(self, cache: SlotCache) -> None:
        self._slot_layers = [SlotLayer(cache, index) for index in range(len(cache.shapes))]
        super().__init__(layers=list(self._slot_layers))

    def bind(self, window: SlotWindow) -> None:
        for layer in self._slot_layers:
            layer.window = window
