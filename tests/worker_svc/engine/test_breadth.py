"""Models of many makes: greedy output equals transformers' generate with speculation, preemption through slot
and host, lost KV, and ragged batches.

Windows are shorter than the prompts, so that sliding attention forgets, and forgets the right tokens after a
swap.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from transformers import (
    GemmaConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from worker_svc.engine import EngineRequest, ModelError, ModelPair, StoppingConfig, load_pair
from worker_svc.engine.llama import LlamaRunner

from .conftest import SHAPE

MAX_TOKENS = 12
PROMPTS = [[random.Random(i).randrange(2, 64) for _ in range(n)] for i, n in enumerate([1, 5, 24, 47, 90])]

_SHAPE: dict[str, Any] = SHAPE | {"vocab_size": 64}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

MODELS: dict[str, Any] = {
    "llama, one key head": lambda: LlamaConfig(**_SHAPE | {"num_key_value_heads": 1}),
    "llama, as many key heads": lambda: LlamaConfig(**_SHAPE | {"num_key_value_heads": 4}),
    "llama, tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama, biases": lambda: LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "llama, llama3 rope": lambda: LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3),
    "llama, linear rope": lambda: LlamaConfig(
        **_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama, yarn": lambda: LlamaConfig(
        **_SHAPE,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40,
        },
    ),
    "qwen2, biases and window in some layers": lambda: Qwen2Config(
        **_SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3 moe": lambda: Qwen3MoeConfig(
        **_SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gemma": lambda: GemmaConfig(**_SHAPE, head_dim=8, tie_word_embeddings=False),
    "olmo2": lambda: Olmo2Config(**_SHAPE),
    "phi3, partial rotary": lambda: Phi3Config(**_SHAPE, partial_rotary_factor=0.5, sliding_window=None),
}  # fmt: skip


def _request(name: str, prompt: list[int], output: list[int]) -> EngineRequest:
    return EngineRequest(name, prompt, output, stopping=StoppingConfig(max_tokens=MAX_TOKENS))


def _with_preemptions(tools: Any, pair: ModelPair) -> list[list[int]]:
    """Runs all prompts through two slots, taking turns: some wait in a slot, some in the host, some lose
    their KV.
    """
    longest = max(map(len, PROMPTS)) + MAX_TOKENS
    per_token = sum(
        runner.cache.bytes_per_token for runner in tools.engine(pair, slots=1, spare_slots=0)._runners
    )
    engine = tools.engine(
        pair, slots=2, spare_slots=1, draft_tokens=3, prefill_tokens=32, host_cache_bytes=longest * per_token
    )
    outputs = {str(index): tools.Output([]) for index in range(len(PROMPTS))}
    queue = list(outputs)
    places: set[str] = set()
    while queue or engine.running:
        while queue and engine.free_slots:
            name = queue.pop(0)
            engine.add(_request(name, PROMPTS[int(name)], list(outputs[name].tokens)))
        tools.collect(outputs, engine.step())
        if engine.running and queue:
            name = engine.running[0]
            engine.preempt(name)
            queue.append(name)
        places |= {place for _, place in engine.resident().values()}
    assert {"slot", "host"} <= places
    assert sum(output.accepted for output in outputs.values()) > 0
    return [outputs[str(index)].tokens for index in range(len(PROMPTS))]


def _endless(folders: Any) -> ModelPair:
    """A pair whose outputs end by length alone, so that every request is preempted before it ends."""
    return replace(load_pair(folders.target, folders.draft), eos_token_ids=(1 << 30,))


def _reference(tools: Any, pair: ModelPair) -> list[list[int]]:
    outputs = [tools.greedy_reference(pair, prompt, MAX_TOKENS) for prompt in PROMPTS]
    # A random model that only repeats itself would agree with anything.
    assert len({token for output in outputs for token in output}) > 8
    return outputs


@pytest.mark.parametrize("model", MODELS)
def test_equals_generate(tools: Any, save_pair: Any, model: str) -> None:
    pair = _endless(save_pair(MODELS[model]()))
    assert _with_preemptions(tools, pair) == _reference(tools, pair)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "mixtral"])
def test_preemptions_change_nothing(tools: Any, make_folders: Any, family: str) -> None:
    pair = _endless(make_folders(family))
    assert _with_preemptions(tools, pair) == _reference(tools, pair)


def test_the_window_is_really_exceeded(tools: Any, make_folders: Any) -> None:
    """Without its window the same model says something else, so the tests above would notice."""
    folders = make_folders("mistral")
    pair = load_pair(folders.target, folders.draft)
    expected = _reference(tools, pair)
    wide = load_pair(folders.target, None)
    wide.target.config.sliding_window = None
    assert _reference(tools, wide) != expected


def test_longrope_is_served_as_far_as_it_has_one_set_of_factors(tools: Any, save_pair: Any) -> None:
    """Chunks, neighbours and the padding of drafts change nothing up to there; more is refused."""
    original = 48
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 5.0, 7.0],
    }
    config = Phi3Config(
        **_SHAPE, original_max_position_embeddings=original, rope_parameters=rope, sliding_window=None
    )
    pair = _endless(save_pair(config))
    assert pair.context_tokens == original
    outputs = tools.drain(
        tools.engine(pair, draft_tokens=4, prefill_tokens=8),
        [
            EngineRequest(str(n), prompt, stopping=StoppingConfig(max_tokens=original - len(prompt)))
            for n, prompt in enumerate(PROMPTS[:4])
        ],
    )
    for n, prompt in enumerate(PROMPTS[:4]):
        assert outputs[str(n)].tokens == tools.greedy_reference(pair, prompt, original - len(prompt))
    reason = "the models take 48: phi3 has longrope positions, of which .* beyond 48 tokens"
    with pytest.raises(ModelError, match=reason) as caught:
        tools.engine(pair, context_tokens=original + 1)
    assert "\n" not in str(caught.value)


def test_longrope_that_never_changes_limits_nothing(save_pair: Any) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        **_SHAPE, original_max_position_embeddings=160, rope_parameters=rope, sliding_window=None
    )
    pair = load_pair(save_pair(config).target, None)
    assert (pair.context_tokens, pair.context_reason) == (160, "")


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_bfloat16_differs_only_at_near_ties(tools: Any, make_folders: Any, family: str) -> None:
    """The first token that is not generate's has a logit within rounding of the best one."""
    folders = make_folders(family)
    pair = load_pair(folders.target, None, dtype="bfloat16")
    engine = tools.engine(pair, prompt_lookup=False)
    got = tools.drain(engine, [_request(str(i), prompt, []) for i, prompt in enumerate(PROMPTS)])
    exact = load_pair(folders.target, None)
    for index, prompt in enumerate(PROMPTS):
        tokens = got[str(index)].tokens
        for count, token in enumerate(tokens):
            scores = tools.next_logits(exact, prompt + tokens[:count])
            spread = float(scores.max() - scores.min())
            assert float(scores.max() - scores[token]) <= 0.05 * spread


def test_which_llamas_run_lean(tools: Any, save_pair: Any) -> None:
    """Scaled positions and shared heads do not need the general path; biases and yarn do."""
    lean = {}
    for name in MODELS:
        if name.startswith("llama"):
            pair = load_pair(save_pair(MODELS[name]()).target, None)
            lean[name] = isinstance(tools.engine(pair)._runners[0], LlamaRunner)
    general = {name for name, taken in lean.items() if not taken}
    assert general == {"llama, biases", "llama, yarn"}
