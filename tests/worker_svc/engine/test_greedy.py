"""Greedy output equals transformers' generate, token for token, whatever happens to a request on its way."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker_svc.engine import EngineRequest, FinishReason, ModelPair, StoppingConfig, load_pair

PROMPTS = [
    [random.Random(i).randrange(2, 64) for _ in range(n)] for i, n in enumerate([1, 2, 3, 7, 20, 33, 61, 100])
]
MAX_TOKENS = 20


@cache
def _reference(tools: Any, pair: ModelPair, prompt: int, max_tokens: int = MAX_TOKENS) -> list[int]:
    return tools.greedy_reference(pair, PROMPTS[prompt], max_tokens)


def _request(name: str, prompt: int, output: list[int], **changes: Any) -> EngineRequest:
    return EngineRequest(
        name, PROMPTS[prompt], output, stopping=StoppingConfig(max_tokens=MAX_TOKENS), **changes
    )


@pytest.mark.parametrize("draft_tokens", [0, 1, 2, 5])
def test_equals_generate(tools: Any, pair: ModelPair, draft_tokens: int) -> None:
    engine = tools.engine(pair, draft_tokens=draft_tokens)
    outputs = tools.drain(engine, [_request(str(i), i, []) for i in range(len(PROMPTS))])
    for i in range(len(PROMPTS)):
        assert outputs[str(i)].tokens == _reference(tools, pair, i)
    if draft_tokens:
        accepted = sum(output.accepted for output in outputs.values())
        drafted = sum(output.drafted for output in outputs.values())
        assert 0 < accepted < drafted


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("fast_path", [True, False])
def test_families(tools: Any, make_folders: Any, family: str, fast_path: bool) -> None:
    folders = make_folders(family)
    pair = load_pair(folders.target, folders.draft)
    engine = tools.engine(pair, draft_tokens=3, fast_path=fast_path, prefill_tokens=16)
    outputs = tools.drain(engine, [_request(str(i), i, []) for i in range(len(PROMPTS))])
    for i in range(len(PROMPTS)):
        assert outputs[str(i)].tokens == tools.greedy_reference(pair, PROMPTS[i], MAX_TOKENS)
    assert sum(output.accepted for output in outputs.values()) > 0


def test_draft_of_another_shape(tools: Any, make_folders: Any) -> None:
    target = make_folders("qwen3").target
    draft = make_folders("gpt2").draft
    pair = load_pair(target, draft)
    outputs = tools.drain(tools.engine(pair), [_request(str(i), i, []) for i in range(len(PROMPTS))])
    assert [outputs[str(i)].tokens for i in range(len(PROMPTS))] == [
        tools.greedy_reference(pair, prompt, MAX_TOKENS) for prompt in PROMPTS
    ]


def test_no_draft_model(tools: Any, folders: Any) -> None:
    pair = load_pair(folders.target, None)
    engine = tools.engine(pair, prompt_lookup=False)
    outputs = tools.drain(engine, [_request(str(i), i, []) for i in range(len(PROMPTS))])
    for i in range(len(PROMPTS)):
        assert outputs[str(i)].tokens == _reference(tools, pair, i)
        assert outputs[str(i)].drafted == 0


def test_runs_to_the_end_of_the_context(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, context_tokens=64, draft_tokens=5)
    prompts = {"a": [5, 6, 7], "b": list(range(2, 60)), "c": [*range(2, 64), 9]}
    stopping = StoppingConfig(ignore_eos=True)
    outputs = tools.drain(engine, [EngineRequest(k, p, stopping=stopping) for k, p in prompts.items()])
    for name, prompt in prompts.items():
        assert len(outputs[name].tokens) == 64 - len(prompt)
        assert outputs[name].finish is FinishReason.LENGTH


@pytest.mark.parametrize("adaptive", [True, False])
def test_draft_length_of_each_request(tools: Any, pair: ModelPair, adaptive: bool) -> None:
    engine = tools.engine(pair, draft_tokens=4, adaptive=adaptive)
    requests = [_request(str(i), i, [], draft_tokens=[0, 2, 5, None][i % 4]) for i in range(len(PROMPTS))]
    outputs = tools.drain(engine, requests)
    for i in range(len(PROMPTS)):
        assert outputs[str(i)].tokens == _reference(tools, pair, i)
    if not adaptive:
        assert all(outputs[str(i)].drafted == 0 for i in range(0, len(PROMPTS), 4))


class _Plan:
    """A caller that adds, preempts, resumes and drops at random, and keeps each request's output itself."""

    def __init__(self, tools: Any, engine: Any) -> None:
        self.tools, self.engine = tools, engine
        self.outputs: dict[str, Any] = {}
        self.paused: list[int] = []
        self.unseen = list(range(len(PROMPTS)))

    def start(self, queue: list[int], pick: int) -> None:
        if queue and self.engine.free_slots:
            prompt = queue.pop(pick % len(queue))
            held = self.outputs.setdefault(str(prompt), self.tools.Output([]))
            self.engine.add(_request(str(prompt), prompt, list(held.tokens)))

    def act(self, action: str, pick: int) -> None:
        running = self.engine.running
        if action == "start":
            self.start(self.unseen, pick)
        elif action == "resume":
            self.start(self.paused, pick)
        elif action in ("preempt", "drop") and running:
            name = running[pick % len(running)]
            if action == "preempt":
                self.engine.preempt(name)
            else:
                self.engine.drop(name)
                assert self.engine.holds(name) == 0
            self.paused.append(int(name))
        else:
            self.tools.collect(self.outputs, self.engine.step())

    def finish(self) -> None:
        while self.unseen or self.paused or self.engine.running:
            self.start(self.unseen, 0)
            self.start(self.paused, 0)
            self.tools.collect(self.outputs, self.engine.step())


_actions = st.lists(
    st.tuples(
        st.sampled_from(
            ["start", "start", "resume", "resume", "preempt", "preempt", "drop", "step", "step", "step"]
        ),
        st.integers(0, 7),
    ),
    min_size=10,
    max_size=60,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=_actions,
    slots=st.integers(1, 4),
    spare=st.integers(0, 3),
    host_bytes=st.sampled_from([0, 20_000, 1 << 20]),
    draft_tokens=st.integers(0, 4),
    prefill_tokens=st.sampled_from([5, 40, 512]),
    adaptive=st.booleans(),
    prompt_lookup=st.booleans(),
)
def test_any_schedule(
    tools: Any,
    pair: ModelPair,
    actions: list[tuple[str, int]],
    slots: int,
    spare: int,
    host_bytes: int,
    draft_tokens: int,
    prefill_tokens: int,
    adaptive: bool,
    prompt_lookup: bool,
) -> None:
    """Arrivals, preemptions, host memory, recomputation and drops in any order change no token."""
    engine = tools.engine(
        pair,
        slots=slots,
        spare_slots=spare,
        host_cache_bytes=host_bytes,
        draft_tokens=draft_tokens,
        prefill_tokens=prefill_tokens,
        adaptive=adaptive,
        prompt_lookup=prompt_lookup,
    )
    if adaptive:
        engine.calibrate(budget_s=0.0)
    plan = _Plan(tools, engine)
    for action, pick in actions:
        plan.act(action, pick)
    plan.finish()
    for prompt in range(len(PROMPTS)):
        assert plan.outputs[str(prompt)].tokens == _reference(tools, pair, prompt)
    assert engine.resident() == {}
