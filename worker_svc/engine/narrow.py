"""Narrow passes of a small Llama-shaped model as one compiled function: steps that decode, on one thread of a
CPU.

There a step of torch's kernels is mostly calls: attention takes as long for a row with nothing to attend to
as for one with a hundred tokens, and matrices of a few rows are multiplied at a third of what the machine
can do. Wide passes, the prefills, stay with torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from worker_svc.kernels import LANES, PANEL
from worker_svc.kernels.load import narrow_pass

from .cache import SlotCache
from .llama import LlamaRunner

# Panels are copies of the weights beside those of the lean path.
_MAX_WEIGHT_BYTES = 1 << 28
# Above these torch's kernels are about as fast, and attention needs space for scores by query and position.
_MOST_QUERIES = 128
_MOST_TOKENS = 1024
_MOST_PLACES = 256


class NarrowLlamaRunner(LlamaRunner):
    """A LlamaRunner whose narrow passes are compiled. Logits hold until the next pass."""

    def __init__(self, model: Any, cache: SlotCache, function: Callable[..., None]) -> None:
        super().__init__(model, cache)
        self._function = function
        self._inner = model.config.intermediate_size
        self._vocabulary = self._head.shape[0]
        padding = -self._vocabulary % PANEL
        head = torch.nn.functional.pad((self._head * self._final).t(), (0, padding))
        self._columns = self._vocabulary + padding
        parts = [
            _panels(weight)
            for layer in self._layers
            for weight in (layer.attention_in, layer.attention_out, layer.mlp_in, layer.mlp_out)
        ]
        self._panels = torch.cat([*parts, _panels(head)])
        # Of queries and keys alone; [positions, 2, dim] of cosines and sines with the sign of their partner.
        turns = self._rotation[:, 0, 0].repeat_interleave(2, dim=1)
        sign = torch.tensor([-1.0, 1.0]).repeat(self._dim // 2)
        self._turns = torch.stack([turns[..., 0], turns[..., 1] * sign], 1).contiguous()
        self._space = torch.empty(0)
        self._logits = torch.empty(0)
        self._places: dict[tuple[int, int, int], ctypes.Array[ctypes.c_int64]] = {}

    def forward(
        self,
        tokens: Tensor,
        slots: Sequence[int],
        starts: Sequence[int],
        logits: int,
        pick: Tensor | None = None,
    ) -> Tensor:
        rows, queries = tokens.shape
        if queries > _MOST_QUERIES or rows * queries > _MOST_TOKENS:
            return super().forward(tokens, slots, starts, logits, pick)
        cache, count = self.cache, rows * queries
        cache.claim(slots, starts, queries)
        tokens = tokens.contiguous()
        places = self._places_of(rows, queries, logits) if pick is None else _picked(pick, queries)
        states = cache.states[0]
        slot = states.stride(0)
        scores = queries * self._group * (max(starts) + queries + LANES)
        found = self._room("_logits", len(places) * self._columns)
        self._function(
            tokens.data_ptr(), rows, queries, _indices(slots), _indices(starts), places, len(places),
            self._embedding.data_ptr(), len(self._layers), self._hidden, self._heads, self._group, self._dim,
            self._inner, self._columns, self._epsilon_squared, self._panels.data_ptr(),
            self._turns.data_ptr(), states.data_ptr(), states.shape[0] * slot, slot,
            *self._space_for(count, scores), found.data_ptr(),
        )  # fmt: skip
        found = found.view(rows, -1, self._columns)
        return found if self._columns == self._vocabulary else found[..., : self._vocabulary]

    def _places_of(self, rows: int, queries: int, logits: int) -> ctypes.Array[ctypes.c_int64]:
        """Of the last `logits` tokens of each row."""
        key = rows, queries, logits
        if key not in self._places:
            if len(self._places) == _MOST_PLACES:
                self._places.clear()
            ends = range(queries, (rows + 1) * queries, queries)
            self._places[key] = _indices([place for end in ends for place in range(end - logits, end)])
        return self._places[key]

    def _space_for(self, count: int, scores: int) -> list[int]:
        """Addresses to work at: for `count` tokens of each width in a pass, then for scores."""
        mixed = self._heads * self._group * self._dim
        widths = self._hidden, self._hidden, mixed + 2 * self._heads * self._dim, mixed
        sizes = [count * width for width in (*widths, 2 * self._inner, self._inner)]
        at = self._room("_space", sum(sizes) + scores).data_ptr()
        addresses = [at]
        for size in sizes:
            at += size * 4
            addresses.append(at)
        return addresses

    def _room(self, name: str, numbers: int) -> Tensor:
        """The first numbers of a buffer that grows when it has to."""
        room: Tensor = getattr(self, name)
        if room.numel() < numbers:
            room = torch.empty(numbers + numbers // 2)
            setattr(self, name, room)
        return room[:numbers]


def narrow_runner(model: Any, cache: SlotCache) -> NarrowLlamaRunner | None:
    """For a model that has a LlamaRunner; None where its narrow passes are better left to torch, or cannot be
    compiled.
    """
    config, dim = model.config, model.model.layers[0].self_attn.head_dim
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    widths = heads * dim, config.hidden_size, 2 * config.intermediate_size
    if (
        cache.device.type != "cpu"
        # Several threads share torch's matrix products, and compiled passes run on one.
        or torch.get_num_threads() > 1
        or cache.dtype != torch.float32
        or len(set(cache.shapes)) > 1
        or dim % LANES
        or any(width % PANEL for width in widths)
        or sum(p.numel() * p.element_size() for p in model.parameters()) > _MAX_WEIGHT_BYTES
    ):
        return None
    function = narrow_pass()
    return NarrowLlamaRunner(model, cache, function) if function is not None else None


def _panels(weight: Tensor) -> Tensor:
    """Weights [in, out] by panels of columns, each [in, PANEL], flat."""
    return weight.reshape(weight.shape[0], -1, PANEL).transpose(0, 1).flatten()


def _indices(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _picked(pick: Tensor, queries: int) -> ctypes.Array[ctypes.c_int64]:
    return _indices([row * queries + place for row, place in enumerate(pick.tolist())])
