"""What counts as a return to a slot, and from when on it is timed."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from worker_svc.engine import EngineRequest, ModelPair, StoppingConfig
from worker_svc.engine import engine as engine_module

STOPPING = StoppingConfig(max_tokens=40, ignore_eos=True)


def _request(name: str, output: list[int] | None = None) -> EngineRequest:
    prompt = [random.Random(name).randrange(2, 64) for _ in range(20)]
    return EngineRequest(name, prompt, output or [], stopping=STOPPING)


def test_returns_are_counted_and_first_entries_are_not(tools: Any, pair: ModelPair) -> None:
    """Whoever has output or KV comes back; others begin, and their entry tells nothing of a preemption."""
    engine = tools.engine(pair, slots=3, prefill_tokens=8)
    engine.add(_request("a"))
    first = engine.step()
    assert (first.prefill_tokens, first.switched, first.switch_s) == (8, 0, 0.0)
    engine.preempt("a")
    engine.add(_request("a"))  # no output yet, but KV
    engine.add(_request("new"))
    back = engine.step()
    assert back.switched == 1
    assert back.switch_s > 0
    engine.preempt("new")
    engine.add(_request("new"))  # it has had no turn: no KV yet
    engine.add(_request("elsewhere", [5, 6]))
    more = engine.step()
    assert more.switched == 1
    assert engine.step().switched == 0


def test_the_time_of_a_return_begins_with_the_call(
    tools: Any, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tools.engine(pair)
    engine.add(_request("a"))
    output = engine.step().tokens_of(0)
    engine.preempt("a")
    now_s = 100.0
    check = engine_module.checked_tokens

    def slow_check(*arguments: Any) -> list[int]:
        nonlocal now_s
        now_s += 5.0
        return check(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "checked_tokens", slow_check)
        patch.setattr(engine_module, "time", SimpleNamespace(perf_counter=lambda: now_s))
        engine.add(_request("a", output))
    assert engine.step().switch_s >= 5.0
