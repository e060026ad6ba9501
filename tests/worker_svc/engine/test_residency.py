"""Where the KV of preempted requests lies, how it comes back, and that none is left behind."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from worker_svc.engine import (
    EngineConfig,
    EngineError,
    EngineRequest,
    ModelError,
    ModelPair,
    NoFreeSlotError,
    StoppingConfig,
    UnknownRequestError,
    load_pair,
)
from worker_svc.engine.cache import MARGIN_TOKENS, LayerShape, SlotCache

STOPPING = StoppingConfig(max_tokens=40, ignore_eos=True)


def _request(name: str, output: list[int] | None = None) -> EngineRequest:
    prompt = [random.Random(name).randrange(2, 64) for _ in range(20)]
    return EngineRequest(name, prompt, output or [], stopping=STOPPING)


def _run_steps(tools: Any, engine: Any, outputs: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        tools.collect(outputs, engine.step())


def _prefilled(tools: Any, engine: Any, outputs: dict[str, Any]) -> int:
    result = engine.step()
    tools.collect(outputs, result)
    return int(result.prefill_tokens)


def test_slot_then_host_then_dropped(tools: Any, pair: ModelPair) -> None:
    # After two steps without drafting a request holds 21 tokens of 256 bytes, so the host takes two.
    engine = tools.engine(pair, slots=1, spare_slots=1, draft_tokens=0, host_cache_bytes=12_000)
    outputs: dict[str, Any] = {}
    names = ["a", "b", "c", "d", "e", "f"]
    for name in names:
        engine.add(_request(name))
        _run_steps(tools, engine, outputs, 2)
        engine.preempt(name)
    where = {name: place for name, (_, place) in engine.resident().items()}
    assert where["f"] == where["e"] == "slot"
    assert where["d"] == where["c"] == "host"
    assert "a" not in where
    assert "b" not in where
    assert engine.holds("a") == 0
    assert engine.holds("f") == 20 + len(outputs["f"].tokens) - 1
    for name in reversed(names):
        held = engine.holds(name)
        engine.add(_request(name, list(outputs[name].tokens)))
        tokens = 20 + len(outputs[name].tokens)
        assert _prefilled(tools, engine, outputs) == (0 if held else tokens - 1)
        engine.drop(name)
    assert engine.resident() == {}


def test_longer_held_sequence_is_cut_back(tools: Any, pair: ModelPair) -> None:
    """A caller whose log is behind the engine's KV resumes from its own log."""
    engine = tools.engine(pair, slots=2)
    outputs: dict[str, Any] = {}
    engine.add(_request("a"))
    _run_steps(tools, engine, outputs, 5)
    reference = list(outputs["a"].tokens)
    engine.preempt("a")
    outputs["a"] = tools.Output(reference[:2])
    engine.add(_request("a", reference[:2]))
    assert engine.holds("a") == 20 + 2 - 1
    assert _prefilled(tools, engine, outputs) == 0
    _run_steps(tools, engine, outputs, 4)
    shared = min(len(reference), len(outputs["a"].tokens))
    assert outputs["a"].tokens[:shared] == reference[:shared]


def test_a_host_without_memory_costs_a_prefill_and_no_output(
    tools: Any, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of the host's part says what it may take, not that it gets it."""
    reference = tools.drain(tools.engine(pair), [_request("a")])["a"].tokens
    engine = tools.engine(pair, slots=1, spare_slots=0, draft_tokens=0, prompt_lookup=False)
    outputs: dict[str, Any] = {}
    engine.add(_request("a"))
    _run_steps(tools, engine, outputs, 3)
    engine.preempt("a")

    def take_out(self: SlotCache, slot: int, tokens: int) -> list[Any]:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    with monkeypatch.context() as patch:
        patch.setattr(SlotCache, "take_out", take_out)
        engine.add(_request("b"))
    _run_steps(tools, engine, outputs, 1)
    assert engine.holds("a") == 0
    engine.drop("b")
    resumed = tools.drain(engine, [_request("a", list(outputs["a"].tokens))])
    assert resumed["a"].tokens == reference


def test_rows_that_change_places_take_no_memory_with_them(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=2, spare_slots=0, draft_tokens=0, prompt_lookup=False)
    engine.add(_request("long"))
    for _ in range(10):
        engine.step()
    engine.add(_request("short"))
    engine.step()
    engine.preempt("long")
    engine.step()
    rows = [engine._rows[name] for name in ("short", "long")]
    assert [row.slot for row in rows] == [0, 1]
    for index, runner in enumerate(engine._runners):
        assert runner.cache.written == [row.kv_tokens[index] for row in rows]


def test_an_end_can_be_taken_back(tools: Any, pair: ModelPair) -> None:
    """A finished request that is held goes on from the log of a caller who has not stored its end."""
    engine = tools.engine(pair, slots=1, spare_slots=1, hold_finished=True)
    reference = tools.drain(engine, [_request("a")])["a"].tokens
    assert len(reference) == 40
    assert engine.holds("a") >= 20 + 40 - 1
    assert engine.free_slots == 1
    outputs = {"a": tools.Output(reference[:30])}
    engine.add(_request("a", reference[:30]))
    assert _prefilled(tools, engine, outputs) == 0
    while engine.running:
        tools.collect(outputs, engine.step())
    assert outputs["a"].tokens == reference
    # Others who need the place push it out of its slot first.
    engine.add(_request("b"))
    _run_steps(tools, engine, outputs, 2)
    engine.preempt("b", (0.0,))
    engine.add(_request("c"))
    assert {name: place for name, (_, place) in engine.resident().items()} == {
        "a": "host",
        "b": "slot",
        "c": "running",
    }
    for name in "abc":
        engine.drop(name)
    assert engine.resident() == {}
    assert engine.step().kv.host_bytes == 0


def test_shorter_held_sequence_is_extended(tools: Any, pair: ModelPair) -> None:
    """A request that went on elsewhere needs only the new tokens' prefill here."""
    reference = tools.drain(tools.engine(pair), [_request("a")])["a"].tokens
    engine = tools.engine(pair)
    outputs: dict[str, Any] = {}
    engine.add(_request("a"))
    _run_steps(tools, engine, outputs, 1)
    count = len(outputs["a"].tokens)
    engine.preempt("a")
    outputs["a"] = tools.Output(reference[:30])
    engine.add(_request("a", reference[:30]))
    assert _prefilled(tools, engine, outputs) == 30 - count
    while engine.running:
        tools.collect(outputs, engine.step())
    assert outputs["a"].tokens == reference


def test_another_prompt_under_the_same_id_shares_nothing_wrong(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair)
    outputs: dict[str, Any] = {}
    engine.add(_request("a"))
    _run_steps(tools, engine, outputs, 3)
    engine.preempt("a")
    other = EngineRequest("a", _request("b").prompt_token_ids, stopping=STOPPING)
    assert (
        tools.drain(engine, [other])["a"].tokens
        == tools.drain(tools.engine(pair), [_request("b")])["b"].tokens
    )


def test_200_requests_leave_nothing(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=8, spare_slots=4)
    generator = random.Random(0)
    requests = [
        EngineRequest(
            str(i),
            [generator.randrange(2, 64) for _ in range(generator.randrange(1, 12))],
            stopping=StoppingConfig(max_tokens=generator.randrange(1, 12)),
        )
        for i in range(200)
    ]
    waiting = requests[::-1]
    outputs: dict[str, Any] = {}
    while waiting or engine.running:
        while waiting and engine.free_slots:
            request = waiting.pop()
            held = outputs.get(request.request_id)
            output = held.tokens if held else []
            engine.add(
                EngineRequest(request.request_id, request.prompt_token_ids, output, stopping=request.stopping)
            )
        result = engine.step()
        tools.collect(outputs, result)
        if engine.running and generator.random() < 0.3:
            name = generator.choice(engine.running)
            engine.preempt(name)
            waiting.insert(0, requests[int(name)])
    assert len(outputs) == 200
    assert engine.resident() == {}
    assert result.kv.tokens == result.kv.bytes == result.kv.host_bytes == 0
    engine.forget_kept()
    assert engine.step().kv.allocated_bytes == 0


def test_usage_counts_what_is_held(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=2)
    outputs: dict[str, Any] = {}
    engine.add(_request("a"))
    result = engine.step()
    tools.collect(outputs, result)
    assert (result.switched, result.switch_s) == (0, 0.0)
    assert result.kv.tokens == engine.holds("a") == 20 + len(outputs["a"].tokens) - 1
    # Two layers, two KV heads of 8 values, keys and values, four bytes; the draft has the same shape.
    per_token = 2 * 2 * 8 * 2 * 4
    assert per_token * result.kv.tokens <= result.kv.bytes <= 2 * per_token * (result.kv.tokens + 1)
    again = engine.step()
    assert again.switched == 0
    assert again.step_s >= again.draft_s + again.verify_s > 0


def test_refusals_leave_the_engine_as_it_was(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=1)
    engine.add(_request("a"))
    with pytest.raises(EngineError, match="already running"):
        engine.add(_request("a"))
    with pytest.raises(NoFreeSlotError, match="all 1 slots"):
        engine.add(_request("b"))
    with pytest.raises(UnknownRequestError):
        engine.preempt("b")
    with pytest.raises(EngineError, match="holds no requests"):
        engine.calibrate()
    engine.drop("b")
    assert engine.running == ("a",)
    assert engine.free_slots == 0


def test_an_empty_step_is_allowed(tools: Any, pair: ModelPair) -> None:
    result = tools.engine(pair).step()
    assert result.request_ids == ()
    assert len(result.token_ids) == 0


def test_those_that_would_run_last_leave_first(tools: Any, pair: ModelPair) -> None:
    """Slots, then host memory, are left by the idle request with the highest order, not by the oldest."""
    engine = tools.engine(pair, slots=1, spare_slots=1, draft_tokens=0, host_cache_bytes=12_000)
    outputs: dict[str, Any] = {}
    for name, order in (("a", 3.0), ("b", 9.0), ("c", 1.0), ("d", 5.0), ("e", 2.0)):
        engine.add(replace(_request(name), run_order=(0.0, order)))
        _run_steps(tools, engine, outputs, 2)
        engine.preempt(name)
    where = {name: place for name, (_, place) in engine.resident().items()}
    assert where == {"c": "slot", "e": "slot", "a": "host", "d": "host"}
    # An order that has changed while it ran counts too.
    engine.add(replace(_request("c", outputs["c"].tokens), run_order=(0.0, 1.0)))
    engine.preempt("c", (0.0, 8.0))
    engine.add(_request("f"))
    where = {name: place for name, (_, place) in engine.resident().items()}
    assert where == {"e": "slot", "a": "host", "d": "host", "f": "running"}


def test_budget_names_the_numbers(tools: Any, pair: ModelPair) -> None:
    per_token = 2 * 2 * 2 * 8 * 2 * 4
    needed = (160 + 17) * per_token
    with pytest.raises(
        ModelError, match=rf"one request of 160 tokens .* need {needed} bytes of KV, .* 50000;"
    ):
        tools.engine(pair, kv_limit_bytes=50_000, context_tokens=160)
    # The models' own context is cut to what fits, and a prompt that is too long told the numbers.
    engine = tools.engine(pair, kv_limit_bytes=50_000)
    assert engine.context_tokens == 50_000 // per_token - 17
    with pytest.raises(ValueError, match=f"90 tokens leave no room .* context of {engine.context_tokens} "):
        engine.add(EngineRequest("a", [5] * 90))
    with pytest.raises(ModelError, match=r"one request of 16 tokens .* but the budget is 1000"):
        tools.engine(pair, kv_limit_bytes=1000)
    with pytest.raises(ModelError, match="a context of 161 tokens is asked for, but the models take 160"):
        tools.engine(pair, context_tokens=161)
    with pytest.raises(ValueError, match="slots"):
        EngineConfig(slots=0)


@pytest.mark.parametrize("host_cache_bytes", [0, 1 << 20])
def test_requests_that_outgrow_the_budget_wait_and_change_nothing(
    tools: Any, pair: ModelPair, host_cache_bytes: int
) -> None:
    """Six requests of 60 tokens each in the memory of three: all run, never beyond the budget, those first
    that come first, and with the tokens that they have with room for all.
    """
    free = tools.drain(tools.engine(pair, slots=6), [_request(str(i)) for i in range(6)])
    limit = 3 * (20 + 40 + 17) * 512
    engine = tools.engine(pair, slots=6, kv_limit_bytes=limit, host_cache_bytes=host_cache_bytes)
    for i in range(6):
        engine.add(replace(_request(str(i)), run_order=(float(5 - i),)))
    outputs: dict[str, Any] = {}
    ended, fewest, most_bytes = [], 6, 0
    while engine.running:
        result = engine.step()
        tools.collect(outputs, result)
        fewest = min(fewest, len(result.request_ids) or 6)
        most_bytes = max(most_bytes, result.kv.bytes, result.kv.allocated_bytes)
        ended += [name for name, reason in zip(result.request_ids, result.finish, strict=True) if reason]
    assert most_bytes <= limit
    assert fewest < 6
    assert set(ended[:2]) <= {"5", "4", "3"}
    assert {name: output.tokens for name, output in outputs.items()} == {
        name: output.tokens for name, output in free.items()
    }
    assert engine.resident() == {}


def test_a_slot_that_a_finished_request_left_is_emptied_for_the_next(tools: Any, pair: ModelPair) -> None:
    """Short rows in slots of long ones would hold more than the budget knows of, beside long rows."""
    limit = 3 * (120 + 4 + 17) * 512
    engine = tools.engine(pair, slots=6, spare_slots=0, kv_limit_bytes=limit)
    prompts = [random.Random(i).choices(range(2, 64), k=120) for i in range(6)]

    def most_bytes(requests: list[EngineRequest]) -> int:
        for request in requests:
            engine.add(request)
        most = 0
        while engine.running:
            most = max(most, engine.step().kv.allocated_bytes)
        return most

    few = StoppingConfig(max_tokens=4, ignore_eos=True)
    assert most_bytes([EngineRequest(f"a{i}", prompts[i], stopping=few) for i in range(3)]) <= limit
    # Slots 3 to 5 go to the long ones, those of the finished to the short ones.
    long = [EngineRequest(f"b{i}", prompts[3 + i][:100], stopping=few) for i in range(3)]
    short = [EngineRequest(f"c{i}", [5 + i], stopping=few) for i in range(3)]
    assert most_bytes(long + short) <= limit


@pytest.mark.parametrize("lazy", [True, False])
def test_an_emptied_slot_holds_nothing_of_its_last_request(lazy: bool) -> None:
    """Whatever the lengths are to the pages; padding, too, where passes are recorded."""
    shapes = [LayerShape(2, 9, 5), LayerShape(1, 9, 9), LayerShape(2, 9, 5)]
    cache = SlotCache(shapes, 3, 400, 400, torch.float32, torch.device("cpu"), lazy=lazy)
    for begin, end, written in ((0, 7, 7), (0, 300, 300), (100, 333, 333), (150, 152, 390), (390, 400, 400)):
        for state in cache.states:
            state[:, :written] = 1.0
            state[1, :written] = float("nan")
            if not lazy:
                state[1, written : written + MARGIN_TOKENS] = float("nan")
        cache.written[:] = [written] * 3
        cache.trim(1, end)
        cache.trim(1, begin)
        for state in cache.states:
            assert bool((state[[0, 2], :written] == 1.0).all())
            assert bool(state[1, :begin].isnan().all())
            assert not state[1, begin:].any()


@pytest.mark.parametrize("lazy", [True, False])
def test_a_request_that_overflows_spoils_no_other(
    tools: Any, make_folders: Any, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    """Its KV is NaN, and lies where the next request reads along with a longer one, masked."""
    monkeypatch.setattr("worker_svc.engine.cache.HAS_LAZY_PAGES", lazy)
    overflows = 5
    pair = load_pair(make_folders("mistral").target, None)
    with torch.no_grad():
        pair.target.get_input_embeddings().weight[overflows] = float("inf")

    def request(name: str, count: int, tokens: int, *more: int) -> EngineRequest:
        prompt = [random.Random(name).choice(range(overflows + 1, 64)) for _ in range(count)]
        return EngineRequest(name, [*prompt, *more], stopping=replace(STOPPING, max_tokens=tokens))

    settings = {"slots": 2, "spare_slots": 0, "prompt_lookup": False, "kv_limit_bytes": 1 << 24}
    clean = tools.drain(tools.engine(pair, **settings), [request("long", 60, 20), request("short", 5, 8)])
    engine = tools.engine(pair, **settings)
    tools.drain(engine, [request("first", 60, 8), request("bad", 40, 8, overflows)])
    after = tools.drain(engine, [request("long", 60, 20), request("short", 5, 8)])
    assert after["short"].tokens == clean["short"].tokens
    assert after["long"].tokens == clean["long"].tokens
    engine.forget_kept()
    for state in engine._runners[0].cache.states:
        assert not state.any()


def test_host_memory_is_counted_as_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch rounds pinned memory up to a power of two, each part by itself."""
    shapes = [LayerShape(2, 8, 8), LayerShape(2, 8, 8), LayerShape(1, 8, 8)]
    cache = SlotCache(shapes, 3, 400, 400, torch.float32, torch.device("cpu"))
    parts = cache.take_out(0, 100)
    assert cache.host_bytes(100) == sum(part.nbytes for part in parts) == 100 * cache.bytes_per_token

    class OnGpu:
        is_cuda = True

        def __init__(self, tensor: torch.Tensor) -> None:
            self.shape = tensor.shape

    monkeypatch.setattr(cache, "_groups", {key: OnGpu(held) for key, held in cache._groups.items()})
    # 25,600 and 6,400 bytes.
    assert cache.host_bytes(100) == (1 << 15) + (1 << 13)
    assert cache.host_bytes(128) == (1 << 15) + (1 << 13)
    assert cache.host_bytes(129) == (1 << 16) + (1 << 14)
    assert cache.host_bytes(0) == 0


def test_host_memory_is_bounded_by_what_is_taken(
    tools: Any, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotCache, "host_bytes", lambda self, tokens: 1000)
    engine = tools.engine(pair, slots=1, spare_slots=0, prompt_lookup=False, host_cache_bytes=5000)
    for name in "abcd":
        engine.add(_request(name))
        engine.step()
        engine.preempt(name)
    # Of the target and of the draft for each.
    assert engine._residency.host_bytes == 2 * 2000
    assert sorted(place for _, place in engine.resident().values()) == ["host", "host", "slot"]
