"""Which way a model is run."""

from __future__ import annotations

from typing import Any

import torch

from . import llama
from .cache import SlotCache
from .errors import ModelError
from .forward import GeneralRunner, WindowRunner, check_runner, refusing
from .narrow import narrow_runner


def make_runner(model: Any, cache: SlotCache, vocabulary_size: int, fast_path: bool) -> WindowRunner:
    """The leanest runner that gives this model's logits; ModelError if even the general one does not."""
    if fast_path and _plain(model, cache) and llama.suits(model, cache.dtype):
        lean = llama.LlamaRunner(model, cache)
        # A Llama that differs in some way that `suits` does not know is still a causal language model.
        if _gives_the_same(model, lean, vocabulary_size):
            narrow = narrow_runner(model, cache)
            if narrow is not None and _gives_the_same(model, narrow, vocabulary_size):
                return narrow
            return lean
    with refusing(model):
        runner = GeneralRunner(model, cache)
        check_runner(model, runner, vocabulary_size)
    return runner


def _gives_the_same(model: Any, runner: WindowRunner, vocabulary_size: int) -> bool:
    try:
        check_runner(model, runner, vocabulary_size)
    except ModelError:
        return False
    return True


def _plain(model: Any, cache: SlotCache) -> bool:
    """Whether all weights are ordinary tensors of the cache's type on its device: not quantised, spread or
    sharded.
    """
    return all(
        type(weight) is torch.nn.Parameter and weight.device == cache.device and weight.dtype == cache.dtype
        for weight in model.parameters()
    )
