"""The draft length follows acceptance and cost, and estimates follow what is measured."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import pytest

from worker_svc.engine import EngineRequest, ModelPair, SamplingConfig, StoppingConfig
from worker_svc.engine.acceptance import AcceptanceEstimate, expected_tokens
from worker_svc.engine.adaptive import DraftChooser, Offer
from worker_svc.engine.costs import CostTable, StepCosts

from .made_up import made_up_costs, same_chance


def _choose(costs: StepCosts, acceptance: float, rows: int = 1, limit: int = 8) -> int:
    plans = DraftChooser(costs).choose([Offer(limit, same_chance(acceptance))] * rows, 0.0)
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
        assert total / 4000 == pytest.approx(expected_tokens(same_chance(acceptance), drafted), rel=0.05)


def test_longer_drafts_for_better_acceptance() -> None:
    costs = made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    lengths = [_choose(costs, acceptance) for acceptance in (0.05, 0.4, 0.7, 0.95)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 8


def test_shorter_drafts_where_tokens_are_dear() -> None:
    costs = made_up_costs(draft_s=0.05, verify_s=1.0, row_s=0.3)
    lengths = [_choose(costs, 0.6, rows) for rows in (1, 4, 8)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 0
    assert lengths[-1] == 0


def test_never_chooses_a_length_that_costs_more_than_it_gives() -> None:
    generator = random.Random(1)
    for _ in range(300):
        costs = made_up_costs(generator.uniform(0.01, 1), generator.uniform(0.1, 2), generator.uniform(0, 1))
        rows, acceptance = generator.choice((1, 2, 4, 8)), generator.random()
        length = _choose(costs, acceptance, rows)
        assert rows * expected_tokens(same_chance(acceptance), length) / costs.step_s(
            rows, length
        ) >= rows / costs.step_s(rows, 0)


def test_limits_of_requests_are_kept() -> None:
    costs = made_up_costs(draft_s=0.01, verify_s=1.0, row_s=0.0)
    assert _choose(costs, 0.99, limit=3) == 3
    assert _choose(costs, 0.99, limit=0) == 0
    plans = DraftChooser(costs).choose([Offer(0, same_chance(0.9)), Offer(5, same_chance(0.9))], 0.0)
    assert [plan.length for plan in plans] == [0, 5]
    assert DraftChooser(costs).choose([Offer(5, same_chance(0.9))], 1e9)[0].length == 0
    assert DraftChooser(StepCosts()).choose([Offer(5, same_chance(0.1))], 0.0)[0].length == 5


def test_catching_up_is_paid_by_the_steps_that_are_left() -> None:
    offer = Offer(3, [0.5, 0.25, 0.25])
    assert DraftChooser.catch_up_steps(offer, left_tokens=1000) == 48
    assert DraftChooser.catch_up_steps(offer, left_tokens=20) == 10
    assert DraftChooser.catch_up_steps(offer, left_tokens=1) == 1
    assert DraftChooser.catch_up_steps(Offer(0), left_tokens=20) == 20


def test_neighbouring_lengths_are_tried_now_and_then() -> None:
    chooser = DraftChooser(made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.05))
    chosen = [chooser.choose([Offer(8, same_chance(0.7))], 0.0)[0].length for _ in range(400)]
    usual = max(set(chosen), key=chosen.count)
    assert set(chosen) == {usual - 1, usual, usual + 1}
    assert chosen.count(usual) > 380
    hopeless = DraftChooser(made_up_costs(draft_s=5.0, verify_s=1.0, row_s=0.5))
    tried = [hopeless.choose([Offer(8, same_chance(0.1))], 0.0)[0].length for _ in range(400)]
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
    assert first.chances[:4] == pytest.approx([0.8] * 4, abs=0.12)
    assert AcceptanceEstimate(everyone).chances[0] == pytest.approx(everyone.chances[0], abs=0.02)
    for _ in range(80):
        first.observe(4, 0)
    assert first.chances[0] < 0.1
    before = list(first.chances)
    first.observe(0, 0)
    assert list(first.chances) == before


def test_acceptance_of_copied_text_differs_by_position() -> None:
    """Half of the drafts fail at once, the others hold to the end: a single rate would be 0.5 everywhere."""
    estimate = AcceptanceEstimate()
    generator = random.Random(3)
    for _ in range(400):
        estimate.observe(8, 8 if generator.random() < 0.5 else 0)
    assert estimate.chances[0] == pytest.approx(0.5, abs=0.15)
    assert min(estimate.chances[2:8]) > 0.9
    assert estimate.survival[7] == pytest.approx(0.45, abs=0.15)
    # Positions that were never tried take after the last ones that were.
    assert estimate.chances[8] > 0.9


def test_unmeasured_sizes_are_fitted() -> None:
    table = CostTable()
    assert table.estimate(3, 3) == 0.0
    for rows in (1, 4, 8):
        for width in (1, 5):
            table.set(rows, width, 1.0 + 0.2 * rows * width)
    assert table.estimate(2, 3) == pytest.approx(1.0 + 0.2 * 6)
    assert table.estimate(8, 5) == pytest.approx(9.0)


def test_a_cliff_shows_in_what_is_expected_of_its_neighbours() -> None:
    """Between two measured widths behind a cliff the estimate is theirs, not that of a plane."""

    def seconds(rows: int, width: int) -> float:
        return 1.0 + 0.1 * rows if width < 3 else 3.0 + 0.3 * rows

    table = CostTable()
    for rows in (1, 2, 4, 8):
        for width in (1, 2, 4, 6):
            table.set(rows, width, seconds(rows, width))
    assert table.estimate(4, 5) == pytest.approx(seconds(4, 5), rel=0.12)
    assert table.estimate(6, 1) == pytest.approx(seconds(6, 1), rel=0.12)


def test_a_slower_machine_changes_all_estimates() -> None:
    costs = made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    before = costs.step_s(8, 2), costs.draft_s(4), costs.verify_s
    for _ in range(3):
        costs.observe_step(1, 4, 0.4 * 2, (1.0 + 0.05 * 5) * 2, 0.0)
    costs.batch, costs.drafted = 1, 0
    after = costs.step_s(8, 2), costs.draft_s(4), costs.verify_s
    assert after == pytest.approx(tuple(2 * value for value in before), rel=0.1)


@pytest.mark.parametrize(("drafted", "modelled"), [(0, 0), (2, 2), (4, 4), (16, 4), (16, 0)])
def test_the_scheduler_is_told_the_step_that_is_taken(drafted: int, modelled: int) -> None:
    """It reckons with four drafted tokens in every step, whatever was drafted by whom."""
    costs = made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    assert 4 * costs.draft_s(4) == pytest.approx(0.4)
    verify_s = 1.0 + 0.05 * 8 * (drafted + 1)
    for _ in range(20):
        costs.observe_step(8, drafted, 0.1 * modelled, verify_s, 0.0, modelled)
    assert 4 * costs.draft_s(4) + costs.verify_s == pytest.approx(0.1 * modelled + verify_s, rel=0.05)
    assert costs.draft_s(0) == 0


def test_one_interrupted_step_changes_nothing() -> None:
    costs = made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    for _ in range(3):
        costs.observe_step(1, 4, 0.4, 1.25, 0.01)
    before = costs.step_s(1, 4), costs.step_s(8, 2)
    costs.observe_step(1, 4, 0.4, 30.0, 5.0)
    assert (costs.step_s(1, 4), costs.step_s(8, 2)) == pytest.approx(before, rel=0.15)


def test_what_a_step_waits_is_told_and_changes_no_choice() -> None:
    """The scheduler plans with the time that passes; drafts are chosen by the engine's own work."""
    calm, waiting = (made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.05) for _ in range(2))
    for step in range(30):
        drafted = step % 5
        verify_s = 1.0 + 0.05 * 4 * (drafted + 1)
        busy_s = 0.1 * drafted + verify_s + 0.01
        calm.observe_step(4, drafted, 0.1 * drafted, verify_s, 0.01, passed_s=busy_s)
        waiting.observe_step(4, drafted, 0.1 * drafted, verify_s, 0.01, passed_s=busy_s * 3)
    assert waiting.steps_s(4, 4, 8).tolist() == calm.steps_s(4, 4, 8).tolist()
    assert waiting.verify_s == pytest.approx(3 * calm.verify_s)
    assert waiting.draft_s(4) == pytest.approx(3 * calm.draft_s(4))


def test_an_engine_that_waits_learns_its_own_work(tools: Any, pair: ModelPair) -> None:
    """Waiting, here inside each pass of the target, stretches the steps, and not what the tables say."""
    engine = tools.engine(pair, slots=2, adaptive=True)
    engine.calibrate()
    target = engine._runners[0]
    forward = target.forward

    def late_forward(*arguments: Any) -> Any:
        time.sleep(0.05)
        return forward(*arguments)

    target.forward = late_forward
    engine.add(EngineRequest("a", [5, 6, 7], stopping=StoppingConfig(max_tokens=60, ignore_eos=True)))
    results = [engine.step() for _ in range(9)]
    assert all(result.verify_s >= 0.05 for result in results)
    costs = engine.costs
    # Both come from medians over steps of different sizes, so neither is 0.05 s more or less than the other.
    assert costs.verify_s > 0.03, "what the scheduler is told"
    assert costs.step_s(1, costs.drafted, costs.modelled) < 0.03, "what drafts are chosen by"


def test_longer_contexts_cost_more() -> None:
    costs = made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    costs.held_tokens, costs.kv_s = 128, (1e-4, 1e-5)
    extra_s = 4 * 1000 * (1e-4 + 3e-5)
    assert costs.step_s(4, 2, 0, 1128) == pytest.approx(costs.step_s(4, 2, 0, 128) + extra_s)
    assert costs.steps_s(4, 1, 2, 1128)[0, 2] == pytest.approx(costs.step_s(4, 2, 0, 1128))
    known = costs.verify.estimate(4, 3)
    # A step that took what the length explains says nothing new of the entry.
    costs.observe_step(4, 2, 0.0, known + extra_s, 0.0, 0, 1128)
    assert costs.verify.estimate(4, 3) == pytest.approx(known, rel=1e-6)


def _true_s(rows: int, drafted: int, modelled: int, reach_tokens: int) -> tuple[float, float]:
    """A machine with a cliff at 5 tokens a row, whose calibration was 15 to 40% off by shape."""
    cliff = 1.5 if drafted >= 4 else 1.0
    verify_s = cliff * (2e-3 + 2.5e-4 * rows * (drafted + 1)) + rows * reach_tokens * 2e-7
    return 3e-4 * modelled * (1 + 0.1 * rows), verify_s * (1.15 + 0.25 * ((rows * 7 + drafted) % 5) / 4)


@pytest.mark.parametrize("batch", [1, 4, 8, 16])
def test_step_times_are_foreseen(batch: int) -> None:
    """On a synthetic clock: shapes that vary from step to step, rows that finish, noise of 4%, interruptions,
    and a machine that gets 1.6 times slower on the way. Within 10% in the median, and without a bias.
    """
    generator = random.Random(batch)
    costs = StepCosts()
    for rows in (1, 2, 4, 8, 16):
        for length in (0, 1, 2, 3, 4, 6, 8):
            costs.verify.set(rows, length + 1, 2e-3 + 2.5e-4 * rows * (length + 1))
            if length:
                costs.draft.set(rows, length, 3e-4 * length)
    costs.calibrated = True
    errors = []
    for step in range(300):
        rows = max(1, batch - step % 60 // 12 * batch // 5)
        drafted = generator.choice((2, 2, 4, 4, 4, 8))
        modelled = generator.choice((0, min(drafted, 2)))
        reach_tokens = 40 + 3 * (step % 60)
        draft_s, verify_s = _true_s(rows, drafted, modelled, reach_tokens)
        noise = generator.lognormvariate(0.0, 0.04) * (3.0 if generator.random() < 0.03 else 1.0)
        speed = noise * (1.6 if step >= 150 else 1.0)
        other_s = 3e-4 * generator.lognormvariate(0.0, 0.1)
        taken_s = (draft_s + verify_s) * speed + other_s
        errors.append(costs.step_s(rows, drafted, modelled, reach_tokens) / taken_s - 1.0)
        costs.observe_step(rows, drafted, draft_s * speed, verify_s * speed, other_s, modelled, reach_tokens)
    assert statistics.median(map(abs, errors)) < 0.10
    assert abs(statistics.median(errors)) < 0.05


def test_calibration_fills_the_tables(tools: Any, pair: ModelPair) -> None:
    engine = tools.engine(pair, slots=3, draft_tokens=2, lookup_tokens=5)
    costs = engine.calibrate()
    assert costs is engine.costs
    assert costs.calibrated
    assert [(rows, width) for rows, width, _ in costs.verify] == [
        (r, w) for r in (1, 2, 3) for w in (1, 2, 3, 4, 5, 6)
    ]
    assert [(rows, width) for rows, width, _ in costs.draft] == [(r, w) for r in (1, 2, 3) for w in (1, 2)]
    assert costs.draft_s(2) > 0
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
    prior = made_up_costs(draft_s=0.1, verify_s=1.0, row_s=0.05)
    engine.costs.draft, engine.costs.verify, engine.costs.calibrated = prior.draft, prior.verify, True
    engine.costs.observe_step = lambda *seconds, **passed: None
    wrong = SamplingConfig(temperature=100.0)
    stopping = StoppingConfig(max_tokens=120, ignore_eos=True)
    engine.add(EngineRequest("a", [5, 6], sampling=wrong, stopping=stopping))
    row = engine._rows["a"]
    # What is tested is the reaction; what the draft really achieves is beside the point.
    for _ in range(200):
        row.acceptance.observe(6, 0 if agreement == "none" else 6)
    row.acceptance.observe = lambda drafted, accepted: None
    drafted = []
    while engine.running:
        drafted += engine.step().drafted_counts
    assert drafted[0] == (0 if agreement == "none" else 6)
    assert sum(drafted) <= len(drafted) / 40 + 1 if agreement == "none" else sum(drafted) > 4 * len(drafted)
