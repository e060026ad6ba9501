"""Compiled narrow passes give the lean path's logits and KV, whatever else is in the pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_svc.engine import Engine, EngineConfig, narrow
from worker_svc.engine.cache import SlotCache
from worker_svc.engine.forward import layer_shapes
from worker_svc.engine.llama import LlamaRunner
from worker_svc.engine.narrow import NarrowLlamaRunner, narrow_runner
from worker_svc.engine.runners import make_runner

SLOTS, LIMIT = 4, 120
# Key heads, queries' heads for each, head's width, vocabulary: sizes below and beyond a vector and a panel.
SHAPES = [(2, 2, 8, 64), (1, 1, 16, 50), (2, 3, 32, 64), (2, 1, 24, 33)]


def _model(tools: Any, heads: int, group: int, dim: int, vocabulary: int) -> Any:
    config = tools.families["llama"](vocabulary)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads * group, heads, dim
    return tools.make_model(config, 0)


def _cache(model: Any) -> SlotCache:
    return SlotCache(layer_shapes(model), SLOTS, LIMIT, 16, torch.float32, torch.device("cpu"))


def _narrow(model: Any) -> NarrowLlamaRunner:
    runner = narrow_runner(model, _cache(model))
    assert runner is not None
    return runner


@pytest.fixture(scope="module")
def runners(tools: Any) -> list[tuple[LlamaRunner, NarrowLlamaRunner]]:
    models = [_model(tools, *shape) for shape in SHAPES]
    with torch.inference_mode():
        return [(LlamaRunner(model, _cache(model)), _narrow(model)) for model in models]


@given(st.data())
@settings(max_examples=100, deadline=None)
@torch.inference_mode()
def test_equals_torch(runners: Any, data: st.DataObject) -> None:
    lean, compiled = data.draw(st.sampled_from(runners))
    rows = data.draw(st.integers(1, SLOTS))
    queries = data.draw(st.sampled_from([1, 2, 3, 5, 6, 17, 70]))
    slots = data.draw(st.permutations(range(SLOTS)))[:rows]
    starts = data.draw(st.lists(st.integers(0, LIMIT - queries), min_size=rows, max_size=rows))
    logits = data.draw(st.integers(1, queries))
    pick = None
    if data.draw(st.booleans()):
        pick, logits = torch.tensor([data.draw(st.integers(0, queries - 1)) for _ in range(rows)]), 1
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for mine, theirs in zip(compiled.cache.states, lean.cache.states, strict=True):
        mine.copy_(torch.randn(mine.shape, generator=generator))
        theirs.copy_(mine)
    tokens = torch.randint(0, 33, (rows, queries), generator=generator)
    expected = lean.forward(tokens, slots, starts, logits, pick)
    got = compiled.forward(tokens, slots, starts, logits, pick)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    for mine, theirs in zip(compiled.cache.states, lean.cache.states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)
    assert compiled.cache.written == lean.cache.written


@torch.inference_mode()
def test_a_token_is_the_same_in_any_pass(runners: Any) -> None:
    """Bit for bit: alone, among other rows, and among drafts."""
    _, compiled = runners[2]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (SLOTS, 9), generator=generator)
    for slot in range(SLOTS):
        compiled.forward(tokens[slot : slot + 1], [slot], [0], 1)
    starts = [7, 8, 3, 5]
    together = compiled.forward(tokens[:, :3], range(SLOTS), starts, 3).clone()
    for slot, start in enumerate(starts):
        for place in range(3):
            alone = compiled.forward(tokens[slot : slot + 1, place : place + 1], [slot], [start + place], 1)
            assert torch.equal(alone[0, 0], together[slot, place])


def test_which_models_have_it(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tools, *SHAPES[0])
    with torch.inference_mode():
        assert type(make_runner(model, _cache(model), 64, fast_path=True)) is NarrowLlamaRunner
        odd = _model(tools, 2, 2, 12, 64)
        assert type(make_runner(odd, _cache(odd), 64, fast_path=True)) is LlamaRunner
        torch.set_num_threads(2)
        try:
            assert type(make_runner(model, _cache(model), 64, fast_path=True)) is LlamaRunner
        finally:
            torch.set_num_threads(1)
        monkeypatch.setattr(narrow, "narrow_pass", lambda: None)
        assert type(make_runner(model, _cache(model), 64, fast_path=True)) is LlamaRunner


@torch.inference_mode()
def test_one_that_is_wrong_is_not_taken(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tools, *SHAPES[0])
    monkeypatch.setattr(narrow, "narrow_pass", lambda: lambda *arguments: None)
    assert type(make_runner(model, _cache(model), 64, fast_path=True)) is LlamaRunner


def test_an_engine_runs_on_it(pair: Any) -> None:
    engine = Engine(pair, EngineConfig(slots=2))
    assert all(type(runner) is NarrowLlamaRunner for runner in engine._runners)
