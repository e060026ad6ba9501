"""Prompts that begin alike share the KV of their beginning, and nothing else changes by it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker_svc.engine import EngineRequest, ModelPair, StoppingConfig, load_pair
from worker_svc.engine.cache import LayerShape, SlotCache
from worker_svc.engine.rows import TARGET
from worker_svc.engine.slots import common_prefix

MAX_TOKENS = 14
STOPPING = StoppingConfig(max_tokens=MAX_TOKENS, ignore_eos=True)
SYSTEM = [[random.Random(seed).randrange(2, 64) for _ in range(40)] for seed in (100, 200)]


def _prompt(number: int) -> list[int]:
    """Two system prompts, each with four users' questions."""
    return SYSTEM[number % 2] + [random.Random(number).randrange(2, 64) for _ in range(3 + number)]


def _request(number: int, output: tuple[int, ...] = ()) -> EngineRequest:
    return EngineRequest(str(number), _prompt(number), output, stopping=STOPPING)


@pytest.fixture(scope="module")
def references(tools: Any, pair: ModelPair) -> dict[str, list[int]]:
    engine = tools.engine(pair, draft_tokens=0, prompt_lookup=False, prefix_sharing=False)
    outputs = tools.drain(engine, [_request(number) for number in range(8)])
    return {name: output.tokens for name, output in outputs.items()}


def _until_emitted(tools: Any, engine: Any, outputs: dict[str, Any]) -> tuple[int, dict[int, int]]:
    """Prompt tokens computed until the newest request emits, and what was said to be cached then."""
    computed = 0
    while True:
        result = engine.step()
        tools.collect(outputs, result)
        computed += result.prefill_tokens
        if engine.running[-1:] and engine.running[-1] in result.request_ids:
            return computed, {int(result.request_ids[r]): n for r, n in result.cached_tokens.items()}


def test_a_running_request_lends_its_prefix(tools: Any, pair: ModelPair, references: Any) -> None:
    engine = tools.engine(pair)
    outputs: dict[str, Any] = {}
    engine.add(_request(0))
    assert _until_emitted(tools, engine, outputs) == (len(_prompt(0)) - 1, {})
    engine.add(_request(2))
    assert _until_emitted(tools, engine, outputs) == (len(_prompt(2)) - 1 - 40, {2: 40})
    engine.add(_request(1))
    assert _until_emitted(tools, engine, outputs) == (len(_prompt(1)) - 1, {})
    while engine.running:
        tools.collect(outputs, engine.step())
    assert {name: output.tokens for name, output in outputs.items()} == {
        name: references[name] for name in ("0", "1", "2")
    }


def test_a_burst_shares_what_its_first_computes(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair)
    for number in (0, 2, 4, 6):
        engine.add(_request(number))
    result = engine.step()
    own = sum(len(_prompt(number)) - 1 - 40 for number in (0, 2, 4, 6))
    assert result.prefill_tokens == 40 + own
    assert sorted(result.cached_tokens.values()) == [40, 40, 40]


@pytest.mark.parametrize("hold_finished", [False, True])
def test_a_finished_request_leaves_its_prefix(
    tools: Any, pair: ModelPair, references: Any, hold_finished: bool
) -> None:
    """Until others need the place, or it is asked to go."""
    engine = tools.engine(pair, slots=2, spare_slots=1, hold_finished=hold_finished)
    assert tools.drain(engine, [_request(0)])["0"].tokens == references["0"]
    engine.drop("0")
    kept = engine.step().kv
    assert kept.tokens == kept.bytes == 0
    assert kept.kept_tokens >= len(_prompt(0)) + MAX_TOKENS - 1
    outputs: dict[str, Any] = {}
    # A next turn: prompt and answer of the first come back, and a new question.
    turn = EngineRequest("7", [*_prompt(0), *references["0"], 9, 8, 7], stopping=STOPPING)
    engine.add(turn)
    computed, cached = _until_emitted(tools, engine, outputs)
    assert cached == {7: len(_prompt(0)) + MAX_TOKENS - 1}
    assert computed == 3
    engine.drop("7")
    assert engine.step().kv.tokens == 0
    engine.forget_kept()
    usage = engine.step().kv
    assert usage.kept_tokens == usage.allocated_bytes == 0
    engine.add(_request(2))
    assert _until_emitted(tools, engine, outputs)[1] == {}


def test_what_was_verified_beyond_the_end_is_not_kept(tools: Any, folders: Any, references: Any) -> None:
    """A draft that is always right, and a stop in the middle of what a step accepts."""
    sure = load_pair(folders.target, folders.target)
    engine = tools.engine(sure, draft_tokens=4, prompt_lookup=False)
    stop = references["0"][1]
    ends = StoppingConfig(max_tokens=MAX_TOKENS, stop_token_ids=(stop,), ignore_eos=True)
    tokens = tools.drain(engine, [EngineRequest("0", _prompt(0), stopping=ends)])["0"].tokens
    assert tokens == references["0"][: references["0"].index(stop) + 1]
    whole = [*_prompt(0), *tokens]
    assert engine.step().kv.kept_tokens <= len(whole)
    again = EngineRequest("1", [*whole, 9, 8, 7], stopping=STOPPING)
    assert tools.drain(engine, [again])["1"].tokens == tools.greedy_reference(
        sure, list(again.prompt_token_ids), MAX_TOKENS
    )


def test_what_a_resumed_request_reuses_is_not_called_cached(
    tools: Any, pair: ModelPair, references: Any
) -> None:
    engine = tools.engine(pair)
    outputs: dict[str, Any] = {}
    engine.add(_request(0))
    _until_emitted(tools, engine, outputs)
    # It has run elsewhere so far; its prefix is here by chance.
    engine.add(_request(2, tuple(references["2"][:5])))
    outputs["2"] = tools.Output(references["2"][:5])
    computed, cached = _until_emitted(tools, engine, outputs)
    assert computed == len(_prompt(2)) + 5 - 1 - 40
    assert cached == {}


def test_sharing_can_be_turned_off(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, prefix_sharing=False)
    outputs: dict[str, Any] = {}
    for number in (0, 2):
        engine.add(_request(number))
        assert _until_emitted(tools, engine, outputs) == (len(_prompt(number)) - 1, {})
    while engine.running:
        result = engine.step()
    assert result.kv.kept_tokens == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sharing_changes_no_token(tools: Any, pair: ModelPair, references: Any, data: Any) -> None:
    """With both drafters, preemption, cancelled requests, few slots, little memory and prompts in chunks."""
    slots = data.draw(st.integers(1, 4), label="slots")
    engine = tools.engine(
        pair,
        slots=slots,
        spare_slots=data.draw(st.integers(0, 3), label="spare"),
        draft_tokens=data.draw(st.integers(0, 4), label="draft tokens"),
        host_cache_bytes=data.draw(st.sampled_from([0, 60_000]), label="host"),
        kv_limit_bytes=data.draw(st.sampled_from([None, 512 * 200]), label="memory"),
        prefill_tokens=data.draw(st.sampled_from([7, 30, 512]), label="chunk"),
    )
    generator = random.Random(data.draw(st.integers(0, 1000), label="schedule"))
    waiting = [number for number in range(8) for _ in range(2)]
    generator.shuffle(waiting)
    outputs: dict[str, Any] = {}
    done: list[tuple[str, list[int]]] = []
    shared = 0
    while waiting or engine.running:
        while waiting and engine.free_slots:
            number = waiting.pop()
            if str(number) in engine.running:
                waiting.insert(0, number)
                break
            held = outputs.setdefault(str(number), tools.Output([]))
            engine.add(_request(number, tuple(held.tokens)))
        result = engine.step()
        shared += sum(result.cached_tokens.values())
        tools.collect(outputs, result)
        for name, reason in zip(result.request_ids, result.finish, strict=True):
            if reason:
                done.append((name, outputs.pop(name).tokens))
        if engine.running and generator.random() < 0.2:
            name = generator.choice(engine.running)
            if generator.random() < 0.7:
                engine.preempt(name, (generator.random(),))
            else:
                engine.drop(name)
            waiting.append(int(name))
    assert len(done) == 16
    for name, tokens in done:
        assert tokens == references[name]
    assert shared > 0 or slots < 3


@given(
    st.lists(st.integers(0, 1), max_size=200), st.integers(0, 200), st.lists(st.integers(0, 1), max_size=5)
)
def test_common_prefix(tokens: list[int], cut: int, tail: list[int]) -> None:
    other = tokens[:cut] + tail
    expected = 0
    for one, two in zip(tokens, other, strict=False):
        if one != two:
            break
        expected += 1
    assert common_prefix(tokens, other) == common_prefix(other, tokens) == expected


def test_what_is_shared_anew_after_a_loss_counts_once(tools: Any, pair: ModelPair) -> None:
    """A prompt that the budget pushes out in its prefill, and that the host has no room for."""
    engine = tools.engine(pair, host_cache_bytes=0, prefill_tokens=8, draft_tokens=0, prompt_lookup=False)
    outputs: dict[str, Any] = {}
    engine.add(_request(0))
    _until_emitted(tools, engine, outputs)
    engine.add(EngineRequest("9", SYSTEM[0] + [7, 9] * 15, stopping=STOPPING))
    tools.collect(outputs, engine.step())
    row = engine._rows["9"]
    assert row.kv_tokens[TARGET] == 40 + 8
    engine._residency.park(row)
    engine._forget_dropped()
    assert engine.holds("9") == 0
    assert _until_emitted(tools, engine, outputs) == (30 - 1, {9: 40})


@pytest.mark.parametrize("lazy", [True, False])
def test_memory_follows_what_is_written(lazy: bool) -> None:
    """An emptied slot gives its memory back; its neighbours keep what they hold. Without lazy pages the
    longest slot decides for all.
    """
    shape = LayerShape(heads=2, key_dim=16, value_dim=16)
    cpu = torch.device("cpu")
    cache = SlotCache([shape] * 3, 4, 1000, 100, torch.float32, cpu, lazy=lazy, grows=not lazy)
    per_token = 3 * 2 * 32 * 4
    assert cache.allocated_bytes == (0 if lazy else 4 * 100 * per_token)
    parts = [torch.ones(3, 300, 64)]
    for slot in (0, 1, 2):
        cache.put_back(slot, parts, 300)
    assert cache.allocated_bytes == (3 * 300 if lazy else 4 * 300) * per_token
    cache.trim(1, 0)
    assert cache.allocated_bytes == (2 * 300 if lazy else 4 * 300) * per_token
    for slot in (0, 2):
        assert all(bool((part == 1).all()) for part in cache.take_out(slot, 300))
    assert not cache.take_out(1, 300)[0].any()
    cache.trim(2, 123)
    assert bool((cache.take_out(2, 300)[0][:, :123] == 1).all())
    assert not cache.take_out(2, 300)[0][:, 123:].any()
    cache.trim(0, 0)
    cache.trim(2, 0)
    cache.shrink()
    assert cache.allocated_bytes == (0 if lazy else 4 * 100 * per_token)
