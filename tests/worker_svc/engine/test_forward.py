"""The lean forward gives the general one's logits, and is taken only by models that it knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worker_svc.engine import EngineRequest, ModelError, StoppingConfig, load_pair
from worker_svc.engine.cache import SlotCache
from worker_svc.engine.forward import GeneralRunner, layer_shapes
from worker_svc.engine.llama import LlamaRunner
from worker_svc.engine.runners import make_runner


def _cache(model: Any, slots: int = 5, dtype: torch.dtype = torch.float32) -> SlotCache:
    return SlotCache(layer_shapes(model), slots, 120, 16, dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "head_dim": 16}]
)
@torch.inference_mode()
def test_lean_equals_general(tools: Any, changes: dict[str, Any]) -> None:
    config = tools.families["llama"](64)
    for name, value in changes.items():
        setattr(config, name, value)
    model = tools.make_model(config, 0)
    lean, general = LlamaRunner(model, _cache(model)), GeneralRunner(model, _cache(model))
    generator = torch.Generator().manual_seed(0)
    # Prefills of one row, ragged batches with rejected tokens written over, single tokens, growth of the
    # cache, rows that do not lie side by side.
    for width, slots, starts, logits in [
        (30, [2], [0], 1),
        (9, [0, 1, 2], [0, 0, 30], 9),
        (4, [0, 1, 2], [5, 9, 20], 4),
        (1, [2], [24], 1),
        (5, [1], [13], 5),
        (1, [0, 1, 2, 3], [9, 13, 24, 0], 1),
        (40, [1, 2], [13, 24], 3),
        (3, [3, 0], [1, 10], 2),
    ]:
        tokens = torch.randint(0, 64, (len(slots), width), generator=generator)
        one, other = (runner.forward(tokens, slots, starts, logits) for runner in (lean, general))
        assert one.shape == other.shape == (len(slots), logits, 64)
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    pick = torch.tensor([1, 0, 2])
    tokens = torch.randint(0, 64, (3, 3), generator=generator)
    one, other = (runner.forward(tokens, range(3), [3, 8, 19], 1, pick) for runner in (lean, general))
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    whole = general.forward(tokens, range(3), [3, 8, 19], 3)
    torch.testing.assert_close(other[:, 0], whole[torch.arange(3), pick])


@torch.inference_mode()
def test_which_models_take_the_lean_path(tools: Any) -> None:
    plain = tools.make_model(tools.families["llama"](64), 0)
    assert isinstance(make_runner(plain, _cache(plain), 64, fast_path=True), LlamaRunner)
    assert isinstance(make_runner(plain, _cache(plain), 64, fast_path=False), GeneralRunner)
    half = tools.make_model(tools.families["llama"](64), 0).to(torch.bfloat16)
    assert isinstance(
        make_runner(half, _cache(half, dtype=torch.bfloat16), 64, fast_path=True), GeneralRunner
    )
    for name, value in (("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu")):
        config = tools.families["llama"](64)
        setattr(config, name, value)
        model = tools.make_model(config, 0)
        assert isinstance(make_runner(model, _cache(model), 64, fast_path=True), GeneralRunner)
    other = tools.make_model(tools.families["qwen3"](64), 0)
    assert isinstance(make_runner(other, _cache(other), 64, fast_path=True), GeneralRunner)


@torch.inference_mode()
def test_a_lean_path_that_is_wrong_is_not_taken(tools: Any) -> None:
    """A model that claims to be a plain Llama and is not falls back to the general path."""
    model = tools.make_model(tools.families["llama"](64), 0)
    scaling = model.model.layers[0].self_attn
    scaling.scaling = 3 * scaling.scaling
    assert isinstance(make_runner(model, _cache(model), 64, fast_path=True), GeneralRunner)


@torch.inference_mode()
def test_a_model_that_ignores_positions_is_refused(tools: Any) -> None:
    model = tools.make_model(tools.families["qwen3"](64), 0)
    plain = model.forward
    model.forward = lambda position_ids=None, logits_to_keep=0, **given: plain(**given)
    with pytest.raises(ModelError, match="qwen3 does not give the same logits with a cache by slots"):
        make_runner(model, _cache(model), 64, fast_path=True)


def test_eager_attention(tools: Any, folders: Any) -> None:
    pair = load_pair(folders.target, folders.draft)
    expected = tools.greedy_reference(pair, [5, 6, 7], 20)
    for model in (pair.target, pair.draft):
        model.set_attn_implementation("eager")
    request = EngineRequest("a", [5, 6, 7], stopping=StoppingConfig(max_tokens=20))
    assert tools.drain(tools.engine(pair, fast_path=False), [request])["a"].tokens == expected


def test_bfloat16_runs(tools: Any, folders: Any) -> None:
    """Tokens may differ from fp32's at near ties; what is promised is that it runs and keeps its accounts."""
    pair = load_pair(folders.target, folders.draft, dtype="bfloat16")
    engine = tools.engine(pair)
    requests = [EngineRequest(str(i), [5 + i, 6], stopping=StoppingConfig(max_tokens=20)) for i in range(6)]
    outputs = tools.drain(engine, requests)
    assert all(output.finish for output in outputs.values())
    assert engine.resident() == {}
