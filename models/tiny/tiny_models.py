"""The shapes of the pair, its optimiser, and growing a shallow target into a deep one."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from tiny_tokens import CONTEXT_TOKENS, VOCAB_TOKENS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TARGET_LAYERS = 16
END_ID, PAD_ID = 0, 1


def llama_config(hidden: int, layers: int, heads: int, intermediate: int) -> LlamaConfig:
    """A Llama of the pair's common kind: head size 32, two KV heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB_TOKENS,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def target_config(layers: int = TARGET_LAYERS) -> LlamaConfig:
    return llama_config(hidden=192, layers=layers, heads=6, intermediate=512)


def draft_config() -> LlamaConfig:
    return llama_config(hidden=128, layers=1, heads=4, intermediate=512)


def new_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


@torch.no_grad()
def deepen(shallow: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """The same function with more layers: each layer is followed by copies that add nothing yet.

    A copy's two output projections are zero, so the logits do not change, while its inner
    weights start from trained ones. Training shallow first costs a fraction of the arithmetic
    for the same tokens.
    """
    old = shallow.config.num_hidden_layers
    if layers % old:
        raise ValueError(f"{layers} layers are not a multiple of {old}")
    deep = LlamaForCausalLM(target_config(layers))
    deep.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(shallow.model.norm.state_dict())
    for index, layer in enumerate(deep.model.layers):
        state = copy.deepcopy(shallow.model.layers[index * old // layers].state_dict())
        if index % (layers // old):
            state["self_attn.o_proj.weight"].zero_()
            state["mlp.down_proj.weight"].zero_()
        layer.load_state_dict(state)
    deep.tie_weights()
    return deep


def orthogonalised(updates: Tensor, steps: int = 4) -> Tensor:
    """Newton-Schulz: every singular value of each [rows, columns] matrix of a stack near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = updates.mT if updates.size(-2) > updates.size(-1) else updates
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if updates.size(-2) > updates.size(-1) else x


class Optimiser:
    """Muon for the layers' matrices, AdamW for embeddings and norms; ``scale`` multiplies both rates.

    Matrices of one shape are orthogonalised as one stack: a batched product is much faster
    than a loop over small ones.
    """

    def __init__(self, model: nn.Module, muon_rate: float, adam_rate: float, momentum: float = 0.95) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers." in name:
                by_shape[tuple(parameter.shape)].append(parameter)
            else:
                others.append(parameter)
        self.groups = [(ps, torch.zeros(len(ps), *shape)) for shape, ps in by_shape.items()]
        self.muon_rate, self.adam_rate, self.momentum = muon_rate, adam_rate, momentum
        self.adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for parameters, velocity in self.groups:
            gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalised(gradient.lerp_(velocity, self.momentum))
            rate = self.muon_rate * scale * max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            for parameter, change in zip(parameters, update, strict=True):
                parameter.mul_(1 - rate * 0.05).sub_(change, alpha=rate)
                parameter.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def warm_then_decay(total_steps: int, warm_steps: int, decay_from: float) -> Callable[[int], float]:
    """Rate scale of a step: a short rise, a plateau, then a straight line to zero."""

    def scale(step: int) -> float:
        rise = min(1.0, (step + 1) / warm_steps) if warm_steps else 1.0
        left = (total_steps - step) / max(1, math.ceil(total_steps * (1 - decay_from)))
        return rise * min(1.0, left)

    return scale
