"""A lean forward pass for small Llama-shaped models, where the time goes into calling kernels rather than
into them.

Projections are fused, the weights of the norms are folded into the projections behind them, rotary pairs lie
side by side so that a rotation is one complex product, and query heads that share a key head are packed into
its query dimension. The logits are those of transformers to rounding; `check_runner` compares them at every
load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .cache import SlotCache, SlotWindow
from .forward import picked

# The fused weights are copies; above this size the copies would cost more than the saved kernel calls gain.
_MAX_WEIGHT_BYTES = 1 << 29
_ROPE_TYPES = ("default", "linear", "llama3")
_LOW = float("-inf")
# Masks of verifications are kept by width; those of prefills are too large and too many to keep.
_KEPT_QUERIES = 17


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights transposed for addmm, [in, out]: queries, keys and values; output; gate and up; down."""

    attention_in: Tensor
    attention_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor


def suits(model: Any, dtype: torch.dtype) -> bool:
    """Whether the lean path can run this model; what it does not know goes the general way."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(
        getattr(config, "model_type", None) == "llama"
        and dtype == torch.float32
        and config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and rope.get("rope_type", "default") in _ROPE_TYPES
        and sum(p.numel() * p.element_size() for p in model.parameters()) <= _MAX_WEIGHT_BYTES
    )


class LlamaRunner:
    """The Runner of a model that `suits`.

    A token's projection is laid out as [key heads, group + 2, dim]: the query heads that share a key head,
    the key, and the value. The cache holds the last two in this order, with rotary pairs side by side, so it
    is of use to no one else.
    """

    def __init__(self, model: Any, cache: SlotCache) -> None:
        config, base = model.config, model.model
        self.cache = cache
        self._hidden = config.hidden_size
        self._heads = config.num_key_value_heads
        self._group = config.num_attention_heads // config.num_key_value_heads
        self._dim = base.layers[0].self_attn.head_dim
        # RMS(x) = |x| / sqrt(n), so x / RMS(x) is x / |x| with sqrt(n) folded into the weights.
        self._scale = config.hidden_size**0.5
        self._epsilon_squared: float = config.rms_norm_eps * config.hidden_size
        self._epsilon = torch.tensor(self._epsilon_squared**0.5, device=cache.device)
        self._embedding = base.embed_tokens.weight
        self._final = base.norm.weight * self._scale
        self._head = model.lm_head.weight
        self._layers = [self._fused(layer) for layer in base.layers]
        self._rotation = self._rotations(base.rotary_emb)
        self._biases: dict[int, Tensor] = {}
        self._stores: list[Tensor] = []
        self._stores_of: list[Tensor] | None = None

    def forward(
        self,
        tokens: Tensor,
        slots: Sequence[int],
        starts: Sequence[int],
        logits: int,
        pick: Tensor | None = None,
    ) -> Tensor:
        return self.run(tokens, SlotWindow(self.cache, slots, starts, tokens.shape[1]), logits, pick)

    def run(self, tokens: Tensor, window: SlotWindow, logits: int, pick: Tensor | None = None) -> Tensor:
        rows, queries = tokens.shape
        rotation, bias = self._rotation_of(window), self._bias_of(window)
        heads, group, dim = self._heads, self._group, self._dim
        hidden = functional.embedding(tokens.view(-1), self._embedding)
        for layer, store in zip(self._layers, self._layer_stores(), strict=True):
            fused = torch.mm(self._normed(hidden), layer.attention_in)
            fused = fused.view(rows, queries, heads, group + 2, dim // 2, 2)
            # The value is turned by 1 + 0i, so that one product serves queries, key and value.
            turned = torch.view_as_real(torch.view_as_complex(fused) * rotation)
            held = window.write(store, turned[:, :, :, group:]).flatten(4).transpose(1, 2)
            asked = (
                turned[:, :, :, :group].permute(0, 2, 1, 3, 4, 5).reshape(rows, heads, queries * group, dim)
            )
            mixed = functional.scaled_dot_product_attention(
                asked, held[:, :, :, 0], held[:, :, :, 1], attn_mask=bias
            )
            mixed = mixed.view(rows, heads, queries, group, dim).permute(0, 2, 1, 3, 4)
            hidden = torch.addmm(hidden, mixed.reshape(rows * queries, -1), layer.attention_out)
            gate, up = torch.mm(self._normed(hidden), layer.mlp_in).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, functional.silu(gate).mul_(up), layer.mlp_out)
        last = hidden.view(rows, queries, self._hidden)
        last = last[:, -logits:] if pick is None else picked(last, pick)
        return functional.linear(self._normed(last) * self._final, self._head)

    def _normed(self, hidden: Tensor) -> Tensor:
        """RMSNorm (Zhang and Sennrich, 2019) but for a factor that the weights carry: x / sqrt(|x|^2 + n *
        eps).

        Three kernels that exist; the norm of torch itself is put together from six.
        """
        return hidden / torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), self._epsilon)

    def _layer_stores(self) -> list[Tensor]:
        """Each layer's cache as [slots, capacity, key heads, 2, dim / 2, 2]; made anew when the cache has
        grown.
        """
        if self._stores_of is not self.cache.states:
            self._stores_of = self.cache.states
            pairs = (self._heads, 2, self._dim // 2, 2)
            self._stores = [states.view(*states.shape[:2], *pairs) for states in self.cache.states]
        return self._stores

    def _rotation_of(self, window: SlotWindow) -> Tensor:
        """Rotations of a window's positions, complex [rows, queries, 1, group + 2, dim / 2]."""
        if window.index is None:
            start = window.starts[0]
            return torch.view_as_complex(self._rotation[None, start : start + window.queries])
        flat = functional.embedding(window.positions, self._rotation.flatten(1))
        return torch.view_as_complex(flat.view(*flat.shape[:2], *self._rotation.shape[1:]))

    def _bias_of(self, window: SlotWindow) -> Tensor | None:
        """Causal mask to be added, broadcastable to [rows, key heads, queries * group, reach]."""
        if window.index is not None:
            hidden = ~window.attends(None)
            bias = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=self.cache.device)
            bias.masked_fill_(hidden, _LOW)
            return self._grouped(bias)
        if window.queries == 1:
            return None
        start, limit = window.starts[0], self.cache.limit_tokens
        if window.queries > _KEPT_QUERIES:
            return self._grouped(self._triangle(start, window.queries))
        if window.queries not in self._biases:
            self._biases[window.queries] = self._grouped(self._triangle(limit, window.queries))
        return self._biases[window.queries][..., limit - start :]

    def _triangle(self, start: int, queries: int) -> Tensor:
        shape = (1, 1, queries, start + queries)
        full = torch.full(shape, _LOW, dtype=self.cache.dtype, device=self.cache.device)
        return full.triu_(start + 1)

    def _grouped(self, bias: Tensor) -> Tensor:
        """Repeats each query's mask for the query heads that are packed beside it."""
        if bias.shape[2] == 1:
            return bias.expand(-1, -1, self._group, -1)
        return bias.repeat_interleave(self._group, dim=2)

    def _fused(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        width = (self._heads, -1, self._dim, self._hidden)
        parts = [attention.q_proj.weight.view(width), attention.k_proj.weight.view(width)]
        # Rotary halves (i, i + dim / 2) become neighbours.
        pairs = [part.unflatten(2, (2, self._dim // 2)).transpose(2, 3).flatten(2, 3) for part in parts]
        fused = torch.cat([*pairs, attention.v_proj.weight.view(width)], dim=1).reshape(-1, self._hidden)
        mlp_in = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        return _Layer(
            # Read in their order, weights are multiplied faster; of the other two this would take copies.
            attention_in=(fused * (layer.input_layernorm.weight * self._scale)).t().contiguous(),
            attention_out=attention.o_proj.weight.t(),
            mlp_in=(mlp_in * (layer.post_attention_layernorm.weight * self._scale)).t().contiguous(),
            mlp_out=mlp.down_proj.weight.t(),
        )

    def _rotations(self, rotary: Any) -> Tensor:
        """cos and sin by position, real [positions, 1, group + 2, dim / 2, 2]; 1 and 0 for the value."""
        positions = torch.arange(self.cache.limit_tokens, device=self.cache.device, dtype=torch.float32)
        angles = torch.outer(positions, rotary.inv_freq.to(torch.float32))
        turns = torch.stack([angles.cos(), angles.sin()], -1) * rotary.attention_scaling
        still = torch.tensor([1.0, 0.0], device=self.cache.device).expand_as(turns)
        return torch.stack([turns] * (self._group + 1) + [still], 1)[:, None]
