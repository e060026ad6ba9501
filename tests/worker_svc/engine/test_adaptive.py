"""The draft length follows acceptance and cost, and estimates follow what is measured."""

from __future__ import annotations

import random
from typing import Any

import pytest

from worker_svc.engine import EngineRequest, ModelPair, SamplingConfig, StoppingConfig
from worker_svc.engine.adaptive import AcceptanceEstimate, DraftChooser, Offer, expected_tokens
from worker_svc.engine.costs import CostTable, StepCosts


def _costs(draft_s: float, verify_s: float, row_s: float) -> StepCosts:
    """Drafting costs draft_s a token, verifying verify_s and row_s for each token of each row."""
    costs = StepCosts()
    for rows in (1, 2, 4, 8):
        for length in range(9):
            costs.verify.set(rows, length + 1, verify_s + row_s * rows * (length + 1))
            if length:
                costs.draft.set(rows, length, draft_s * length)
    costs.calibrated = True
    return costs


def _choose(costs: StepCosts, acceptance: float, rows: int = 1, limit: int = 8) -> int:
    plans = DraftChooser(costs).choose([Offer(limit, acceptance)] * rows, 0.0)
    return max(plan.length for plan in plans)


def test_expected_tokens() -> None:
    generator = random.Random(0)
    for acceptance, drafted in ((0.0, 4), (0.5, 3), (0.9, 8), (1.0, 5)):
        total = 0
        for _ in range(4000):
            emitted = 1
            while emitted <= drafted and generator.random() < acceptance:
                emitted += 1
            total += emitted
        assert total / 4000 == pytest.approx(expected_tokens(acceptance, drafted), rel=0.05)


def test_longer_drafts_for_better_acceptance() -> None:
    costs = _costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    lengths = [_choose(costs, acceptance) for acceptance in (0.05, 0.4, 0.7, 0.95)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 8


def test_shorter_drafts_where_tokens_are_dear() -> None:
    costs = _costs(draft_s=0.05, verify_s=1.0, row_s=0.3)
    lengths = [_choose(costs, 0.6, rows) for rows in (1, 4, 8)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 0
    assert lengths[-1] == 0


def test_never_chooses_a_length_that_costs_more_than_it_gives() -> None:
    generator = random.Random(1)
    for _ in range(300):
        costs = _costs(generator.uniform(0.01, 1), generator.uniform(0.1, 2), generator.uniform(0, 1))
        rows, acceptance = generator.choice((1, 2, 4, 8)), generator.random()
        length = _choose(costs, acceptance, rows)
        assert rows * expected_tokens(acceptance, length) / costs.step_s(rows, length) >= rows / costs.step_s(
            rows, 0
        )


def test_limits_of_requests_are_kept() -> None:
    costs = _costs(draft_s=0.01, verify_s=1.0, row_s=0.0)
    assert _choose(costs, 0.99, limit=3) == 3
    assert _choose(costs, 0.99, limit=0) == 0
    plans = DraftChooser(costs).choose([Offer(0, 0.9), Offer(5, 0.9)], 0.0)
    assert [plan.length for plan in plans] == [0, 5]
    assert DraftChooser(costs).choose([Offer(5, 0.9)], 1e9)[0].length == 0
    assert DraftChooser(StepCosts()).choose([Offer(5, 0.1)], 0.0)[0].length == 5


def test_neighbouring_lengths_are_tried_now_and_then() -> None:
    chooser = DraftChooser(_costs(draft_s=0.1, verify_s=1.0, row_s=0.05))
    chosen = [chooser.choose([Offer(8, 0.7)], 0.0)[0].length for _ in range(400)]
    usual = max(set(chosen), key=chosen.count)
    assert set(chosen) == {usual - 1, usual, usual + 1}
    assert chosen.count(usual) > 380
    hopeless = DraftChooser(_costs(draft_s=5.0, verify_s=1.0, row_s=0.5))
    tried = [hopeless.choose([Offer(8, 0.1)], 0.0)[0].length for _ in range(400)]
    assert set(tried) == {0, 1}
    assert tried.count(1) <= 400 / 40


def test_acceptance_is_learned_and_shared() -> None:
    everyone = AcceptanceEstimate()
    first = AcceptanceEstimate(everyone)
    generator = random.Random(2)
    for _ in range(300):
        accepted = 0
        while accepted < 4 and generator.random() < 0.8:
            accepted += 1
        first.observe(4, accepted)
    assert first.value == pytest.approx(0.8, abs=0.1)
    assert AcceptanceEstimate(everyone).value == pytest.approx(everyone.value)
    for _ in range(80):
        first.observe(4, 0)
    assert first.value < 0.2
    first.observe(0, 0)


def test_unmeasured_sizes_are_fitted() -> None:
    table = CostTable()
    assert table.estimate(3, 3) == 0.0
    for rows in (1, 4, 8):
        for width in (1, 5):
            table.set(rows, width, 1.0 + 0.2 * rows * width)
    assert table.estimate(2, 3) == pytest.approx(1.0 + 0.2 * 6)
    assert table.estimate(8, 5) == pytest.approx(9.0)


def test_a_slower_machine_changes_all_estimates() -> None:
    costs = _costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    before = costs.step_s(8, 2), costs.draft_s, costs.verify_s
    for _ in range(40):
        costs.observe_step(1, 4, 0.4 * 2, (1.0 + 0.05 * 5) * 2, 0.0)
    costs.batch, costs.drafted = 1, 0
    after = costs.step_s(8, 2), costs.draft_s, costs.verify_s
    assert after == pytest.approx(tuple(2 * value for value in before), rel=0.1)


def test_calibration_fills_the_tables(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=3, draft_tokens=2)
    costs = engine.calibrate()
    assert costs is engine.costs
    assert costs.calibrated
    assert [(rows, width) for rows, width, _ in costs.verify] == [
        (r, w) for r in (1, 2, 3) for w in (1, 2, 3)
    ]
    assert [(rows, width) for rows, width, _ in costs.draft] == [(r, w) for r in (1, 2, 3) for w in (1, 2)]
    assert costs.draft_s > 0
    assert costs.verify_s > 0
    assert costs.prefill_s_per_token > 0
    without = tools.engine(pair, draft_tokens=2)
    without.calibrate(budget_s=0.0)
    assert len(list(without.costs.verify)) == 4


@pytest.mark.parametrize("agreement", ["none", "full"])
def test_the_engine_stops_and_starts_drafting(tools: Any, pair: ModelPair, agreement: str) -> None:
    """With the costs fixed by hand: a draft that is never right is given up, one that always is goes to the
    limit.
    """
    engine = tools.engine(pair, slots=1, adaptive=True, draft_tokens=6, prompt_lookup=False)
    prior = _costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    engine.costs.draft, engine.costs.verify, engine.costs.calibrated = prior.draft, prior.verify, True
    engine.costs.observe_step = lambda *seconds: None
    wrong = SamplingConfig(temperature=100.0)
    stopping = StoppingConfig(max_tokens=120, ignore_eos=True)
    engine.add(EngineRequest("a", [5, 6], sampling=wrong, stopping=stopping))
    row = engine._rows["a"]
    # What is tested is the reaction; what the draft really achieves is beside the point.
    row.acceptance.observe = lambda drafted, accepted: None
    row.acceptance._accepted, row.acceptance._tried = (0.0, 1e6) if agreement == "none" else (1e6, 1e6)
    drafted = []
    while engine.running:
        drafted += engine.step().drafted_counts
    assert drafted[0] == (0 if agreement == "none" else 6)
    assert sum(drafted) <= len(drafted) / 40 + 1 if agreement == "none" else sum(drafted) > 4 * len(drafted)
