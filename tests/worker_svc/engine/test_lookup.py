"""Prompt lookup finds what a plain search finds, is judged whether used or not, and changes no token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker_svc.engine import EngineRequest, ModelPair, SamplingConfig, StoppingConfig, load_pair
from worker_svc.engine.acceptance import expected_tokens
from worker_svc.engine.adaptive import DraftChooser, Drafter, Offer
from worker_svc.engine.lookup import MATCH_TOKENS, NgramIndex, PromptLookup, shared_priors

from .made_up import made_up_costs, same_chance

STOPPING = StoppingConfig(max_tokens=30, ignore_eos=True)
# Random models repeat no phrases, so half of the prompts do: their last tokens have occurred before.
PROMPTS = [[random.Random(i).randrange(2, 64) for _ in range(5 + i)] * (1 + i % 2) for i in range(8)]


def _naive(tokens: list[int]) -> tuple[int, int] | None:
    for size in MATCH_TOKENS:
        for end in range(len(tokens) - 1, size - 1, -1):
            if size < len(tokens) and tokens[end - size : end] == tokens[len(tokens) - size :]:
                return size, end
    return None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=12))
def test_the_index_finds_what_a_search_finds(chunks: list[list[int]]) -> None:
    index = NgramIndex()
    tokens: list[int] = []
    for chunk in chunks:
        tokens += chunk
        assert index.find(tokens) == _naive(tokens)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.lists(st.integers(0, 3), max_size=8))
def test_a_long_text_is_entered_in_portions_from_its_end(
    monkeypatch: pytest.MonkeyPatch, tokens: list[int], more: list[int]
) -> None:
    monkeypatch.setattr("worker_svc.engine.lookup._PORTION_TOKENS", 7)
    index, tokens, begins = NgramIndex(), list(tokens), len(tokens)
    for token in [*more, *tokens]:
        found = index.find(tokens)
        begins = max(begins - 7, 1)
        whole = _naive(tokens)
        if begins == 1 or (whole is not None and whole[1] >= begins):
            assert found == whole
        tokens.append(token)


def test_a_long_prompt_takes_no_step_for_itself() -> None:
    """What one search enters does not depend on how long the prompt is."""
    tokens = list(range(100_000))
    index = NgramIndex()
    entered = 0
    for _ in range(3):
        index.find(tokens)
        held = sum(map(len, index._next))
        assert held - entered <= 1100 * len(MATCH_TOKENS)
        assert held > entered
        entered = held


def test_proposals_go_on_behind_the_end() -> None:
    lookup = PromptLookup(shared_priors())
    assert lookup.propose([1, 2, 3, 4], 5) == (0, ())
    assert lookup.proposal is None
    assert lookup.propose([1, 2, 3, 4, 1, 2], 5)[0] == 5
    assert lookup.proposal is not None
    assert lookup.proposal.matched == 2
    assert lookup.proposal.tokens == [3, 4, 1, 2, 3]
    assert lookup.propose([1, 2, 3, 4, 1, 2], 0) == (0, ())
    same = PromptLookup(shared_priors())
    assert same.propose([9, 7, 7, 7], 3)[0] == 3
    assert same.proposal is not None
    assert same.proposal.tokens == [7, 7, 7]


def test_lookups_are_judged_by_what_is_emitted_and_shared() -> None:
    priors = shared_priors()
    lookup = PromptLookup(priors)
    lookup.observe([1])
    tokens = [5, 6, 7, 8, 5, 6]
    for _ in range(60):
        lookup.propose(tokens, 4)
        lookup.observe([7, 8, 1])
    # Two tokens are always right, the third never, and what is behind it stays unknown.
    for known in (lookup, PromptLookup(priors)):
        survival = known.propose(tokens, 4)[1]
        assert survival[1] > 0.8
        assert survival[2] < 0.3
    # A match of three tokens is another matter than one of two.
    other = PromptLookup(priors)
    assert other.propose([4, 5, 6, 7, 8, 4, 5, 6], 4)[1][0] == pytest.approx(0.6)


def test_each_row_takes_the_drafter_that_promises_more() -> None:
    chooser = DraftChooser(made_up_costs(draft_s=0.05, verify_s=1.0, row_s=0.01))
    plans = chooser.choose(
        [
            Offer(8, same_chance(0.8), 8, same_chance(0.2)),
            Offer(8, same_chance(0.4), 8, same_chance(0.95)),
            Offer(0),
        ],
        0.0,
    )
    assert [plan.drafter for plan in plans] == [Drafter.DRAFT, Drafter.LOOKUP, Drafter.NONE]
    assert 0 < plans[0].length < plans[1].length == 8
    # Where drafting is dear, a lookup that is worse but free is preferred.
    dear = DraftChooser(made_up_costs(draft_s=0.9, verify_s=1.0, row_s=0.01))
    (plan,) = dear.choose([Offer(8, same_chance(0.8), 3, same_chance(0.6))], 0.0)
    assert (plan.drafter, plan.length) == (Drafter.LOOKUP, 3)


def test_never_slower_than_none() -> None:
    generator = random.Random(3)
    for _ in range(300):
        costs = made_up_costs(generator.uniform(0.01, 1), generator.uniform(0.1, 2), generator.uniform(0, 1))
        offers = [
            Offer(
                generator.randrange(9),
                same_chance(generator.random()),
                generator.randrange(9),
                same_chance(generator.random()),
            )
            for _ in range(generator.choice((1, 2, 4, 8)))
        ]
        plans = DraftChooser(costs).choose(offers, 0.0)
        tokens, modelled = 0.0, 0
        for offer, plan in zip(offers, plans, strict=True):
            survival = offer.found_survival if plan.drafter is Drafter.LOOKUP else offer.draft_survival
            limit = {Drafter.LOOKUP: offer.found_tokens, Drafter.DRAFT: offer.draft_tokens}.get(
                plan.drafter, 0
            )
            assert plan.length <= limit
            assert (plan.length == 0) == (plan.drafter is Drafter.NONE)
            modelled = max(modelled, plan.length if plan.drafter is Drafter.DRAFT else 0)
            tokens += expected_tokens(survival, plan.length)
        seconds = costs.step_s(len(offers), max(plan.length for plan in plans), modelled)
        assert tokens / seconds >= len(offers) / costs.step_s(len(offers), 0)
    useless = DraftChooser(made_up_costs(draft_s=0.5, verify_s=1.0, row_s=0.2))
    assert useless.choose([Offer(0, (), 8, same_chance(0.05))] * 4, 0.0)[0].drafter is Drafter.NONE


def _requests(sampling: SamplingConfig | None = None, limits: tuple[int | None, ...] = (None,)) -> Any:
    return [
        EngineRequest(
            str(i),
            prompt,
            sampling=sampling or SamplingConfig(),
            stopping=STOPPING,
            draft_tokens=limits[i % len(limits)],
        )
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def plain(tools: Any, folders: Any) -> dict[int | None, dict[str, list[int]]]:
    """Outputs by seed without any speculation; None is greedy."""
    engine = tools.engine(load_pair(folders.target, None), prompt_lookup=False)
    result = {}
    for seed in (None, 5):
        sampling = SamplingConfig() if seed is None else SamplingConfig(temperature=1.0, seed=seed)
        outputs = tools.drain(engine, _requests(sampling))
        assert all(output.drafted == 0 for output in outputs.values())
        result[seed] = {name: output.tokens for name, output in outputs.items()}
    return result


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_changes_no_token(
    tools: Any, folders: Any, pair: ModelPair, plain: Any, data: Any
) -> None:
    """Rows that look up, rows that use the draft model and rows that do neither, in one batch, preempted at
    random.
    """
    alone = data.draw(st.booleans(), label="without draft model")
    seed = data.draw(st.sampled_from([None, 5]), label="seed")
    engine = tools.engine(
        load_pair(folders.target, None) if alone else pair,
        slots=data.draw(st.integers(1, 5), label="slots"),
        spare_slots=data.draw(st.integers(0, 3), label="spare"),
        draft_tokens=data.draw(st.integers(1, 6), label="draft tokens"),
        adaptive=data.draw(st.booleans(), label="adaptive"),
        host_cache_bytes=data.draw(st.sampled_from([0, 20_000]), label="host"),
    )
    if engine.config.adaptive:
        engine.calibrate(budget_s=0.0)
    sampling = SamplingConfig() if seed is None else SamplingConfig(temperature=1.0, seed=seed)
    limits = data.draw(st.lists(st.sampled_from([None, 0, 1, 3]), min_size=1, max_size=4), label="limits")
    waiting = _requests(sampling, tuple(limits))
    requests = {request.request_id: request for request in waiting}
    outputs = {name: tools.Output([]) for name in requests}
    generator = random.Random(data.draw(st.integers(0, 1000), label="schedule"))
    while waiting or engine.running:
        while waiting and engine.free_slots:
            request = waiting.pop(generator.randrange(len(waiting)))
            held = tuple(outputs[request.request_id].tokens)
            engine.add(
                EngineRequest(
                    request.request_id,
                    request.prompt_token_ids,
                    held,
                    sampling,
                    STOPPING,
                    request.draft_tokens,
                )
            )
        tools.collect(outputs, engine.step())
        if engine.running and generator.random() < 0.3:
            name = generator.choice(engine.running)
            engine.preempt(name)
            waiting.append(requests[name])
    assert {name: output.tokens for name, output in outputs.items()} == plain[seed]


def test_both_drafters_work_in_one_step(tools: Any, pair: ModelPair, plain: Any) -> None:
    engine = tools.engine(pair, slots=8, draft_tokens=3)
    for request in _requests():
        engine.add(request)
    outputs: dict[str, Any] = {}
    mixed = 0
    accepted = dict.fromkeys(Drafter, 0)
    while engine.running:
        result = engine.step()
        tools.collect(outputs, result)
        mixed += {Drafter.DRAFT, Drafter.LOOKUP} <= set(result.drafters)
        for drafter, count in zip(result.drafters, result.accepted_counts, strict=True):
            accepted[drafter] += count
    assert mixed > 0
    assert accepted[Drafter.DRAFT] > 0
    assert accepted[Drafter.LOOKUP] > 0
    assert accepted[Drafter.NONE] == 0
    assert {name: output.tokens for name, output in outputs.items()} == plain[None]


def test_a_target_alone_speculates(tools: Any, folders: Any, plain: Any) -> None:
    engine = tools.engine(load_pair(folders.target, None), draft_tokens=3)
    outputs = tools.drain(engine, _requests())
    assert {name: output.tokens for name, output in outputs.items()} == plain[None]
    assert sum(output.accepted for output in outputs.values()) > 0
    engine.calibrate()
    assert {width for _, width, _ in engine.costs.verify} >= {1, 2, 3, 4}
    assert list(engine.costs.draft) == []
    assert engine.costs.draft_s(4) == 0.0


def test_lookups_have_a_limit_of_their_own(tools: Any, pair: ModelPair, plain: Any) -> None:
    """Longer than the draft model's, up to `lookup_tokens`; none at all for a request that may not draft."""
    engine = tools.engine(pair, draft_tokens=2, lookup_tokens=9)
    requests = _requests(limits=(None, 1, 0))
    for request in requests[:4]:
        engine.add(request)
    lengths: dict[tuple[str, Drafter], int] = {}
    outputs: dict[str, Any] = {}
    while engine.running:
        result = engine.step()
        tools.collect(outputs, result)
        for name, drafter, drafted in zip(
            result.request_ids, result.drafters, result.drafted_counts, strict=True
        ):
            lengths[name, drafter] = max(drafted, lengths.get((name, drafter), 0))
    assert max(length for (_, drafter), length in lengths.items() if drafter is Drafter.DRAFT) == 2
    assert max(length for (_, drafter), length in lengths.items() if drafter is Drafter.LOOKUP) == 9
    assert {drafter for name, drafter in lengths if name == "2"} == {Drafter.NONE}
    assert {name: output.tokens for name, output in outputs.items()} == {
        request.request_id: plain[None][request.request_id] for request in requests[:4]
    }


def test_long_lookups_are_chosen_where_they_have_been_right() -> None:
    chooser = DraftChooser(made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.03))
    short, long = (
        chooser.choose([Offer(4, same_chance(0.6), 8, same_chance(chance))], 0.0)[0].length
        for chance in (0.4, 0.99)
    )
    assert short <= 4
    assert long == 8


def test_a_shorter_log_starts_a_new_index(tools: Any, folders: Any, plain: Any) -> None:
    engine = tools.engine(load_pair(folders.target, None), slots=1)
    request = _requests()[3]
    outputs: dict[str, Any] = {}
    engine.add(request)
    while len(outputs.get("3", tools.Output([])).tokens) < 12:
        tools.collect(outputs, engine.step())
    engine.preempt("3")
    output = plain[None]["3"]
    engine.add(EngineRequest("3", request.prompt_token_ids, output[:2], stopping=STOPPING))
    outputs["3"] = tools.Output(output[:2])
    while engine.running:
        tools.collect(outputs, engine.step())
    assert outputs["3"].tokens == output
