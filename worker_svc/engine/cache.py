"""The KV cache of one model: preallocated by slot, with a length per slot that the caller keeps.

All layers of one shape share a tensor [layers, slots, capacity, elements], in which the tokens of a slot lie
together in each layer: moving a slot, or taking it to the host, is one copy, and rejecting tokens is only a
smaller length. What lies behind a slot's length is rubbish that is overwritten before any query may see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .transfers import upload


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


class SlotCache:
    """KV of all layers for a fixed number of slots; capacity grows in blocks, shared by all slots.

    limit_tokens: capacity never exceeds this; the caller checks its requests against it. states[i] is layer
    i's view [slots, capacity, elements], keys of all heads before values; keys[i] and values[i] are [slots,
    capacity, heads, dim].
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        slots: int,
        limit_tokens: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
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
        self._allocate(min(block_tokens, limit_tokens))

    @property
    def allocated_bytes(self) -> int:
        return self.slots * self.capacity_tokens * self.bytes_per_token

    def reserve(self, tokens: int) -> None:
        """Makes sure that every slot can hold `tokens`; doubles the capacity, so that growth is rare."""
        if tokens <= self.capacity_tokens:
            return
        if tokens > self.limit_tokens:
            raise AssertionError(f"{tokens} tokens asked of a cache limited to {self.limit_tokens}")
        wanted = max(tokens, 2 * self.capacity_tokens)
        blocks = -(-wanted // self.block_tokens)
        self._allocate(min(blocks * self.block_tokens, self.limit_tokens))

    def shrink(self) -> None:
        """Returns to one block; for when no slot holds anything."""
        if self.capacity_tokens > self.block_tokens:
            self._groups, self.capacity_tokens = {}, 0
            self._allocate(min(self.block_tokens, self.limit_tokens))

    def _allocate(self, capacity: int) -> None:
        grown = {}
        for shape in dict.fromkeys(self.shapes):
            # Zeros, not rubbish: a masked NaN would still poison the weighted sum of an attention kernel.
            tensor = torch.zeros(
                (self.shapes.count(shape), self.slots, capacity, shape.elements),
                dtype=self.dtype,
                device=shape.device or self.device,
            )
            if shape in self._groups:
                tensor[:, :, : self.capacity_tokens] = self._groups[shape]
            grown[shape] = tensor
        self._groups = grown
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
        for tensor in self._groups.values():
            tensor[:, target, :tokens] = tensor[:, source, :tokens]

    def swap(self, first: int, second: int, tokens: int) -> None:
        """Exchanges the first `tokens` of two slots."""
        for tensor in self._groups.values():
            held = tensor[:, first, :tokens].clone()
            tensor[:, first, :tokens] = tensor[:, second, :tokens]
            tensor[:, second, :tokens] = held

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
        for tensor, part in zip(self._groups.values(), parts, strict=True):
            tensor[:, slot, :tokens].copy_(part[:, :tokens], non_blocking=True)


class SlotWindow:
    """The part of a SlotCache that one forward pass writes and reads.

    Rows are the slots first .. first + rows - 1; row i writes `queries` tokens from position starts[i] on and
    reads positions 0 .. reach - 1, where reach is the end of the longest row.
    """

    def __init__(self, cache: SlotCache, first: int, starts: Sequence[int], queries: int) -> None:
        self.first = first
        self.rows = len(starts)
        self.queries = queries
        self.starts = starts
        self.reach = max(starts) + queries
        cache.reserve(self.reach)
        device = cache.device
        # Layers may lie on several devices, each of which needs the index.
        self._index_on: dict[torch.device, Tensor] = {}
        if self.rows == 1:
            self.positions = torch.arange(starts[0], starts[0] + queries, device=device)[None]
            self.index: Tensor | None = None
        else:
            begin = upload(starts, device)
            self.positions = begin[:, None] + torch.arange(queries, device=device)
            slots = torch.arange(first, first + self.rows, device=device)
            self.index = (slots[:, None] * cache.capacity_tokens + self.positions).view(-1)

    def write(self, store: Tensor, states: Tensor) -> Tensor:
        """Writes states [rows, queries, heads, width] into a layer's store; returns what the rows hold now,
        a view [rows, reach, heads, width].
        """
        if self.index is None:
            start = self.starts[0]
            store[self.first, start : start + self.queries] = states[0]
        else:
            index = self._index_on.get(store.device)
            if index is None:
                index = self._index_on[store.device] = self.index.to(store.device)
            store.flatten(0, 1).index_copy_(0, index, states.flatten(0, 1))
        return store[self.first : self.first + self.rows, : self.reach]

    def attends(self, sliding_tokens: int | None) -> Tensor:
        """Boolean mask [rows, 1, queries, reach]: causal by position, within a sliding window if one is
        given.
        """
        columns = torch.arange(self.reach, device=self.positions.device)
        rows = self.positions[:, None, :, None]
        mask = columns <= rows
        if sliding_tokens is not None:
            mask &= columns > rows - sliding_tokens
        return mask


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
