"""Running a model over rows of its slot cache: one interface, and the general way through transformers.

The general path gives any Hugging Face causal model its cache as a `Cache` and its mask as a ready 4D tensor.
Whether an architecture really bears this (recurrent states, position biases and the like do not) is not
guessed from its name: `check_runner` compares it with the model's plain forward pass at load.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from .cache import LayerShape, SlotCache, SlotCacheView, SlotWindow
from .errors import ModelError, first_line

_CHECK_TOKENS = 12
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
_TOLERANCE_HALF = 6e-2


class Runner(Protocol):
    """Runs a model over slots of its cache."""

    cache: SlotCache

    def forward(
        self,
        tokens: Tensor,
        slots: Sequence[int],
        starts: Sequence[int],
        logits: int,
        pick: Tensor | None = None,
    ) -> Tensor:
        """Feeds row i of tokens (int64 [rows, queries]) to slot slots[i] from position starts[i] on.

        Returns the logits of the last `logits` tokens of each row, [rows, logits, vocabulary], in the model's
        dtype; with `pick` (int64 [rows]) those of token pick[i] of each row alone, [rows, 1, vocabulary].
        """
        ...


class WindowRunner(Runner, Protocol):
    """A runner whose pass can be given its window."""

    def run(self, tokens: Tensor, window: SlotWindow, logits: int, pick: Tensor | None = None) -> Tensor:
        """`forward` over a window that is reserved and accounted."""
        ...


def attention_kinds(config: Any) -> tuple[str, ...]:
    """Kinds of attention layers in a configuration, of which each needs a mask of its own."""
    config = config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        kinds = tuple(sorted(set(layer_types)))
    elif getattr(config, "sliding_window", None) is not None:
        kinds = ("sliding_attention",)
    else:
        kinds = ("full_attention",)
    unsupported = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unsupported:
        raise ModelError(
            f"{config.model_type} has {', '.join(unsupported)} layers, which cannot be cut back to a length; "
            "only full and sliding attention can be served"
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        # GPT-Neo. The check of the runner would see it only with rows that differ by more than the window.
        raise ModelError(
            f"{config.model_type} masks its local layers itself, as if all rows were as long as the longest; "
            "it cannot be served"
        )
    return kinds


class GeneralRunner:
    """Any causal language model of transformers, unchanged."""

    def __init__(self, model: Any, cache: SlotCache) -> None:
        self.cache = cache
        self._model = model
        self._view = SlotCacheView(cache)
        config = model.config.get_text_config(decoder=True)
        self._kinds = attention_kinds(model.config)
        self._sliding_tokens = getattr(config, "sliding_window", None)
        self._last_position = (position_limit(config) or 1 << 30) - 1
        # Eager attention adds its mask to the scores; every other implementation takes booleans.
        self._additive = config._attn_implementation == "eager"
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

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
        self._view.bind(window)
        masks = {kind: self._mask(window, kind) for kind in self._kinds}
        output = self._model(
            input_ids=tokens,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            # Only padding lies behind the last position; learned position tables have no entry there, and
            # longrope would take other factors for the whole pass.
            position_ids=window.positions.clamp(max=self._last_position),
            past_key_values=self._view,
            use_cache=True,
            **({"logits_to_keep": logits} if pick is None and self._keeps_logits else {}),
        )
        result: Tensor = output.logits
        return result[:, -logits:] if pick is None else picked(result, pick)

    def _mask(self, window: SlotWindow, kind: str) -> Tensor:
        mask = window.attends(self._sliding_tokens if kind == "sliding_attention" else None)
        if not self._additive:
            return mask
        dtype = self.cache.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(dtype).min
        )


def picked(values: Tensor, pick: Tensor) -> Tensor:
    """Entry pick[i] of row i of values [rows, queries, width], as [rows, 1, width]."""
    return values[torch.arange(values.shape[0], device=values.device), pick][:, None]


def tolerance(dtype: torch.dtype) -> float:
    """By how much of the largest logit two ways to compute the same logits may differ."""
    return _TOLERANCE.get(dtype, _TOLERANCE_HALF)


def position_limit(config: Any) -> int | None:
    """Positions that a model can be given; None where its configuration names no limit."""
    config = config.get_text_config(decoder=True)
    named = getattr(config, "max_position_embeddings", None)
    limits = [int(limit) for limit in (named, longrope_limit(config)) if limit]
    return min(limits, default=None)


def longrope_limit(config: Any) -> int | None:
    """Positions up to which longrope has one set of factors; None for a model without longrope.

    A pass whose highest position is beyond takes the other set for all its rows and tokens, while keys in the
    cache keep theirs. Chunks of a prompt, neighbours in a batch and padding would then change the output.
    """
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [kind for kind in rope.values() if isinstance(kind, dict)]
    named = getattr(config, "original_max_position_embeddings", None)
    limits = [
        int(kind.get("original_max_position_embeddings") or named or 0)
        for kind in (rope, *by_layer)
        if kind.get("rope_type") == "longrope"
    ]
    return min(filter(None, limits), default=None)


@contextmanager
def refusing(model: Any) -> Iterator[None]:
    """Makes of whatever the model's own code raises a ModelError of one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{model.config.model_type} cannot be run with a cache by slots: {first_line(error)}"
        ) from error


@torch.inference_mode()
def layer_shapes(model: Any) -> list[LayerShape]:
    """KV shape of each layer, learned from a forward pass over one token."""
    attention_kinds(model.config)
    with refusing(model):
        cache = DynamicCache(config=model.config)
        model(
            input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
        return _layer_shapes(model, cache)


def _layer_shapes(model: Any, cache: DynamicCache) -> list[LayerShape]:
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise ModelError(
                f"{model.config.model_type} keeps a state that is not keys and values; it cannot be served"
            )
        elsewhere = keys.device if keys.device != model.device else None
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], elsewhere))
    return shapes


@torch.inference_mode()
def check_runner(model: Any, runner: Runner, vocabulary_size: int) -> None:
    """Compares a runner with the model's own forward pass: prefill in chunks, ragged rows, rejected tokens.

    Raises ModelError when logits differ by more than rounding. Leaves rubbish in the first slots.
    """
    device = runner.cache.device
    generator = torch.Generator().manual_seed(0)
    rows = min(2, runner.cache.slots)
    length = min(_CHECK_TOKENS, runner.cache.limit_tokens - 4)
    tokens = torch.randint(0, vocabulary_size, (rows, length), generator=generator).to(device)
    plain = model(input_ids=tokens, use_cache=False).logits[:, -1].float()
    held = [length // 2 + row for row in range(rows)]
    for row in range(rows):
        runner.forward(tokens[row : row + 1, :3], [row], [0], 1)
        runner.forward(tokens[row : row + 1, 3 : held[row]], [row], [3], 1)
    queries = length - held[0]
    wrong = torch.zeros((rows, queries), dtype=torch.long, device=device)
    runner.forward(wrong, range(rows), held, 1)
    right = wrong.clone()
    for row in range(rows):
        right[row, : length - held[row]] = tokens[row, held[row] :]
    got = runner.forward(right, range(rows), held, queries).float()
    scale = float(plain.abs().max().clamp_min(1e-6))
    allowed = tolerance(runner.cache.dtype)
    for row in range(rows):
        error = float((got[row, length - held[row] - 1] - plain[row]).abs().max()) / scale
        if not error <= allowed:
            raise ModelError(
                f"{model.config.model_type} does not give the same logits with a cache by slots "
                f"(relative difference {error:.2g}, at most {allowed:g} allowed); it cannot be served"
            )
