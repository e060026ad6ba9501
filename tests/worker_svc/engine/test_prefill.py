"""Prompts: in chunks that yield to those who decode, and several in one pass where passes are dear."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker_svc.engine import Engine, EngineRequest, ModelPair, StoppingConfig
from worker_svc.engine.costs import PrefillCost

STOPPING = StoppingConfig(max_tokens=40, ignore_eos=True)
SHORT = StoppingConfig(max_tokens=6, ignore_eos=True)


def _run_steps(tools: Any, engine: Any, outputs: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        tools.collect(outputs, engine.step())


def _prefilled(tools: Any, engine: Any, outputs: dict[str, Any]) -> int:
    result = engine.step()
    tools.collect(outputs, result)
    return int(result.prefill_tokens)


def _prompt(seed: int, tokens: int) -> list[int]:
    return [random.Random(seed).randrange(2, 64) for _ in range(tokens)]


def _passes_cost(engine: Engine, tokens: int) -> None:
    """Prefill passes that cost as much as so many tokens, whatever is measured."""
    for cost in (engine.costs.prefill, engine.costs.draft_prefill):
        cost.set(tokens * 1e-3, 1e-3, 0.0)
        cost.observe = lambda *observed: None  # type: ignore[method-assign]


def _watch(engine: Engine) -> list[tuple[list[int], list[int], int]]:
    """Slots, starts and width of every pass of the target from now on."""
    passes: list[tuple[list[int], list[int], int]] = []
    target = engine._runners[0]
    forward = target.forward

    def watched(tokens: Tensor, slots: Sequence[int], starts: Sequence[int], *args: Any) -> Tensor:
        passes.append((list(slots), list(starts), tokens.shape[1]))
        return forward(tokens, slots, starts, *args)

    target.forward = watched  # type: ignore[method-assign]
    return passes


def test_prefill_is_chunked(tools: Any, pair: ModelPair) -> None:
    """A long prompt takes several steps, in which the running request goes on."""
    engine = tools.engine(pair, prefill_tokens=10)
    outputs: dict[str, Any] = {}
    engine.add(EngineRequest("short", [5, 6, 7], stopping=STOPPING))
    _run_steps(tools, engine, outputs, 1)
    engine.add(EngineRequest("long", [7] * 55, stopping=STOPPING))
    before = len(outputs["short"].tokens)
    for step in range(5):
        assert _prefilled(tools, engine, outputs) == 10
        assert "long" not in outputs
        assert len(outputs["short"].tokens) >= before + step + 1
    assert _prefilled(tools, engine, outputs) == 4
    assert outputs["long"].tokens


def _engine_of_known_costs(tools: Any, pair: ModelPair, outputs: dict[str, Any]) -> Any:
    """With one request that decodes; beside it prefill may take as long as 30 tokens, and a little, need."""
    engine = tools.engine(pair, adaptive=True, draft_tokens=0)
    engine.calibrate(budget_s=0.0)
    engine.costs.observe_step = lambda *seconds, **passed: None
    engine.costs.prefill.observe = lambda *seconds: None
    # Nothing but whole tokens.
    engine.costs.prefill.set(0.0, 0.7 * engine.costs.step_s(1, 0) / 30.5, 0.0)
    engine.add(EngineRequest("long", [7] * 80, stopping=STOPPING))
    assert _prefilled(tools, engine, outputs) == 79
    engine.costs.reach_tokens = 0
    engine.costs.kv_s = (0.0, 0.0)
    return engine


def test_prefill_yields_less_where_more_wait_for_it(tools: Any, pair: ModelPair) -> None:
    """Three that wait for one that decodes get three times as much; once as many decode, no more than it."""
    outputs: dict[str, Any] = {}
    engine = _engine_of_known_costs(tools, pair, outputs)
    for number in (1, 2, 3):
        engine.add(EngineRequest(f"next {number}", [10 * number] * 80, stopping=STOPPING))
    assert _prefilled(tools, engine, outputs) == 79 + 12
    engine.costs.step_s = lambda *sizes: 30.5 * engine.costs.prefill.token_s / 0.7
    assert [_prefilled(tools, engine, outputs) for _ in range(5)] == [30, 30, 30, 30, 26]


def test_prefill_yields_to_running_requests(tools: Any, pair: ModelPair) -> None:
    """With known costs, a step that decodes for others prefills no longer than most of what it decodes."""
    outputs: dict[str, Any] = {}
    engine = _engine_of_known_costs(tools, pair, outputs)
    engine.add(EngineRequest("next", [8] * 80, stopping=STOPPING))
    assert [_prefilled(tools, engine, outputs) for _ in range(3)] == [30, 30, 19]
    engine.costs.prefill.set(0.0, 1e9, 0.0)
    engine.add(EngineRequest("last", [9] * 40, stopping=STOPPING))
    assert _prefilled(tools, engine, outputs) == 16


def test_a_chunk_takes_the_time_that_it_is_given() -> None:
    cost = PrefillCost()
    assert cost.seconds(10) == 0.0
    cost.set(1e-3, 1e-5, 1e-8)
    for start in (0, 100, 1000, 10_000):
        for seconds in (1e-3, 2e-3, 1e-2):
            tokens = cost.affordable_tokens(seconds, start)
            assert cost.seconds(tokens, start) <= seconds + 1e-9
            assert cost.seconds(tokens + 1, start) > seconds - 1e-9
    assert cost.affordable_tokens(5e-4) == 0
    for _ in range(100):
        cost.observe([(100, 0, 1)], 5e-3)
    assert cost.seconds(100) == pytest.approx(5e-3, rel=0.01)


def test_a_burst_goes_through_in_one_pass(tools: Any, pair: ModelPair) -> None:
    """Where a pass costs more than padding does; and no token is another for it."""
    requests = [EngineRequest(str(n), _prompt(n, 20 + 5 * n), stopping=SHORT) for n in range(4)]
    expected = tools.drain(tools.engine(pair, draft_tokens=0, prompt_lookup=False), requests)
    engine = tools.engine(pair, slots=4, draft_tokens=0, prompt_lookup=False)
    _passes_cost(engine, 100)
    passes = _watch(engine)
    for request in requests:
        engine.add(request)
    outputs: dict[str, Any] = {}
    assert _prefilled(tools, engine, outputs) == 19 + 24 + 29 + 34
    assert passes[0] == ([0, 1, 2, 3], [0, 0, 0, 0], 34)
    assert len(passes) == 2, "one for the prompts, one that decodes"
    while engine.running:
        tools.collect(outputs, engine.step())
    assert {n: output.tokens for n, output in outputs.items()} == {
        n: output.tokens for n, output in expected.items()
    }


def test_padding_costs_no_more_than_a_pass(tools: Any, pair: ModelPair) -> None:
    """The short one would be padded by 60 tokens beside the long one, and is by 5 beside the middle one."""
    engine = tools.engine(pair, slots=4, draft_tokens=0, prompt_lookup=False)
    _passes_cost(engine, 59)
    passes = _watch(engine)
    for number, tokens in enumerate((80, 20, 25)):
        engine.add(EngineRequest(str(number), _prompt(number, tokens), stopping=SHORT))
    engine.step()
    assert [(slots, width) for slots, _, width in passes] == [([0], 79), ([1, 2], 24), ([0, 1, 2], 1)]


def test_no_padding_beyond_a_slot_or_the_budget(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=3, draft_tokens=0, prompt_lookup=False, prefill_tokens=70)
    _passes_cost(engine, 1000)
    passes = _watch(engine)
    outputs: dict[str, Any] = {}
    engine.add(EngineRequest("0", _prompt(0, 31), stopping=SHORT))
    engine.add(EngineRequest("1", _prompt(1, 36), stopping=SHORT))
    engine.add(EngineRequest("2", _prompt(2, 2), stopping=SHORT))
    assert _prefilled(tools, engine, outputs) == 30 + 35 + 1
    # A third row would make it 105 tokens.
    assert [(slots, width) for slots, _, width in passes[:2]] == [([0, 1], 35), ([2], 1)]
    engine = tools.engine(pair, slots=2, draft_tokens=0, prompt_lookup=False)
    limit = engine._runners[0].cache.limit_tokens
    _passes_cost(engine, 1000)
    passes = _watch(engine)
    last = _prompt(3, engine.context_tokens - 30)
    engine.add(EngineRequest("3", last, stopping=SHORT))
    engine.step()
    engine.preempt("3")
    engine.add(EngineRequest("3", last, _prompt(4, 20), stopping=StoppingConfig(max_tokens=25)))
    engine.add(EngineRequest("4", _prompt(5, 90), stopping=SHORT))
    del passes[:]
    engine.step()
    assert all(start + width <= limit for _, starts, width in passes for start in starts)
    assert [len(slots) for slots, _, _ in passes] == [1, 1, 2]


def test_rows_that_do_not_lie_side_by_side(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=4, draft_tokens=0, prompt_lookup=False, hold_finished=False)
    outputs: dict[str, Any] = {}
    lengths = {"a": 6, "b": 30, "c": 6, "d": 30}
    for number, (name, tokens) in enumerate(lengths.items()):
        stopping = StoppingConfig(max_tokens=tokens, ignore_eos=True)
        engine.add(EngineRequest(name, _prompt(number, 20), stopping=stopping))
    _passes_cost(engine, 100)
    while "a" in engine.running or "c" in engine.running:
        tools.collect(outputs, engine.step())
    engine.forget_kept()
    passes = _watch(engine)
    engine.add(EngineRequest("e", _prompt(10, 20), stopping=SHORT))
    engine.add(EngineRequest("f", _prompt(11, 25), stopping=SHORT))
    tools.collect(outputs, engine.step())
    (slots, starts, width), *_ = passes
    assert (starts, width) == ([0, 0], 24)
    assert slots[1] - slots[0] > 1, "the case that is meant"
    while engine.running:
        tools.collect(outputs, engine.step())
    for name, number, tokens in (("b", 1, 20), ("d", 3, 20), ("e", 10, 20), ("f", 11, 25)):
        made = outputs[name].tokens
        assert made == tools.greedy_reference(pair, _prompt(number, tokens), len(made))


def test_who_begins_alike_waits_for_the_first(tools: Any, pair: ModelPair) -> None:
    """Their common beginning is computed once, the rest of all of them in one pass."""
    engine = tools.engine(pair, slots=4, draft_tokens=0, prompt_lookup=False)
    _passes_cost(engine, 100)
    passes = _watch(engine)
    system = _prompt(0, 40)
    for number in range(3):
        engine.add(EngineRequest(str(number), [*system, *_prompt(1 + number, 10)], stopping=SHORT))
    assert _prefilled(tools, engine, {}) == 49 + 9 + 9
    assert passes[:2] == [([0], [0], 49), ([1, 2], [40, 40], 9)]


def test_a_pass_that_is_run_is_used(tools: Any, pair: ModelPair) -> None:
    """Beside one that decodes; a pass alone takes longer than prefill should."""
    outputs: dict[str, Any] = {}
    engine = _engine_of_known_costs(tools, pair, outputs)
    cost = engine.costs.prefill
    cost.set(50 * cost.token_s, cost.token_s, 0.0)
    engine.add(EngineRequest("next", _prompt(0, 70), stopping=STOPPING))
    engine.add(EngineRequest("last", _prompt(1, 70), stopping=STOPPING))
    assert [_prefilled(tools, engine, outputs) for _ in range(3)] == [50, 19 + 19, 50]


def test_padding_holds_no_memory(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=2, draft_tokens=0, prompt_lookup=False)
    _passes_cost(engine, 1000)
    engine.add(EngineRequest("long", _prompt(0, 100), stopping=SHORT))
    engine.add(EngineRequest("short", _prompt(1, 10), stopping=SHORT))
    engine.step()
    cache = engine._runners[0].cache
    assert cache.written == [100, 10, *[0] * (cache.slots - 2)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_passes_change_no_token(tools: Any, pair: ModelPair, data: Any) -> None:
    """Of whatever chunks they are made: any costs, budgets and arrivals, with drafting and preemption."""
    engine = tools.engine(
        pair,
        slots=4,
        spare_slots=data.draw(st.integers(0, 2), label="spare"),
        draft_tokens=data.draw(st.sampled_from([0, 3]), label="draft tokens"),
        host_cache_bytes=data.draw(st.sampled_from([0, 60_000]), label="host"),
        prefill_tokens=data.draw(st.sampled_from([9, 60, 512]), label="budget"),
    )
    _passes_cost(engine, data.draw(st.sampled_from([0, 10, 1000]), label="a pass costs tokens"))
    generator = random.Random(data.draw(st.integers(0, 1000), label="schedule"))
    system = _prompt(99, 20)
    prompts = {
        str(n): [*(system if n % 3 == 0 else []), *_prompt(n, generator.randrange(1, 60))] for n in range(8)
    }
    waiting, outputs = list(prompts), {name: tools.Output([]) for name in prompts}
    while waiting or engine.running:
        for _ in range(generator.randrange(4)):
            if waiting and engine.free_slots:
                name = waiting.pop()
                engine.add(EngineRequest(name, prompts[name], outputs[name].tokens, stopping=SHORT))
        if not engine.running:
            continue
        tools.collect(outputs, engine.step())
        if engine.running and generator.random() < 0.2:
            name = generator.choice(engine.running)
            engine.preempt(name, (generator.random(),))
            waiting.append(name)
    for name, prompt in prompts.items():
        assert outputs[name].tokens == tools.greedy_reference(pair, prompt, SHORT.max_tokens)
