from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.policies.laps_sd import LapsSd
from scheduler_svc.core.records import FinishReason, Recovered, StepCosts, StepReport
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings

from .house import FakeWorker, Store, spec, worker


def core_with(policy: LapsSd, **settings: Any) -> Scheduler:
    return Scheduler("pool", policy, SchedulerSettings(**settings))


def teach(core: Scheduler, fake: FakeWorker, requests: int, tokens: int, predicted: float) -> float:
    """Serves so many requests of the class "chat", two tokens a step; the instant afterwards."""
    now_s = 0.0
    for number in range(requests):
        name = f"taught {number}"
        core.submit(
            spec(name, max_tokens=4000, predicted_output_tokens=predicted, request_class="chat"), now_s
        )
        for step in range(1, tokens // 2 + 1):
            fake.apply(core.tick(now_s))
            now_s += 0.032
            core.report(fake.step(2, finish={name: FinishReason.STOP} if step == tokens // 2 else {}), now_s)
    return now_s


def test_it_has_an_estimate_from_the_first_moment() -> None:
    core = core_with(LapsSd())
    core.worker_joined(worker(), [], 0.0)
    request, _ = core.submit(spec("a", max_tokens=4000, predicted_output_tokens=200.0), 0.0)
    assert request is not None
    assert request.predicted_output_tokens == 200.0
    assert request.perceived_s == pytest.approx(200 / 2 * 0.032, rel=0.1)
    assert request.level == 3, "3.2 s lies between 2 and 4"
    assert request.perceptible


def test_it_learns_that_a_class_is_shorter_than_predicted_and_remembers() -> None:
    policy = LapsSd()
    core, fake = core_with(policy), FakeWorker("w", 1)
    core.worker_joined(worker(), [], 0.0)
    fake.apply(core.tick(0.0))
    now_s = teach(core, fake, 40, tokens=50, predicted=200.0)
    core.heartbeat("w", now_s + 2.0)
    learnt = core.tick(now_s + 2.0).commit.learnt
    record = json.loads(learnt["laps-sd/class/chat"])
    assert record["requests"] == 40
    assert record["tokens_per_step"] == pytest.approx(2.0)

    again = core_with(LapsSd())
    broken = {"laps-sd/class/x": "nonsense", "other": "1"}
    again.restore(Recovered(learnt={**learnt, **broken}), now_s)
    told, _ = again.submit(
        spec("a", max_tokens=4000, predicted_output_tokens=200.0, request_class="chat"), now_s
    )
    assert told is not None
    assert told.predicted_output_tokens == pytest.approx(50.0, rel=0.2)


def test_preemption_weighs_its_price() -> None:
    for switch_s, preempts in ((0.0005, True), (5.0, False)):
        core, fake = core_with(LapsSd()), FakeWorker("w", 1)
        core.worker_joined(
            worker(costs=StepCosts(draft_token_s=0.002, verify_s=0.024, switch_s=switch_s)), [], 0.0
        )
        core.submit(spec("long", max_tokens=4000, predicted_output_tokens=900.0), 0.0)
        fake.apply(core.tick(0.0))
        core.submit(spec("short", max_tokens=4000, predicted_output_tokens=30.0), 0.1)
        tick = core.tick(0.1)
        assert bool(tick.grants) is preempts
        if preempts:
            long = core.get("long")
            assert long is not None
            assert "short needs" in long.preempted_because
            assert "switching costs" in long.preempted_because


def test_a_request_that_outlives_its_prediction_is_not_perceptible_and_keeps_its_slot_for_a_while() -> None:
    core, fake = core_with(LapsSd()), FakeWorker("w", 1)
    core.worker_joined(worker(), [], 0.0)
    outlived, _ = core.submit(spec("a", max_tokens=4000, predicted_output_tokens=10.0), 0.0)
    assert outlived is not None
    fake.apply(core.tick(0.0))
    for step in range(10):
        core.report(fake.step(2), step * 0.032)
    core.tick(0.5)
    assert not outlived.perceptible
    core.submit(spec("b", max_tokens=4000, predicted_output_tokens=5.0), 1.0)
    assert not core.tick(1.0).grants
    for step in range(200):
        core.report(fake.step(2), 1.1 + step * 0.032)
    core.submit(spec("c", max_tokens=4000, predicted_output_tokens=5.0), 9.0)
    assert core.tick(9.0).grants, "40 times its prediction: nobody knows how long it will be"


def measured(core: Scheduler, step_s: float) -> None:
    """The worker tells that its steps take so long, from now on."""
    core.report(StepReport("w", costs=StepCosts(0.0, step_s)), 0.0)
    core.tick(0.0)


def test_ranks_are_of_one_step_time_until_another_one_is_measured() -> None:
    policy = LapsSd()
    core = core_with(policy)
    core.worker_joined(worker(costs=StepCosts(0.0, 0.010)), [], 0.0)
    core.submit(spec("running", max_tokens=4000, predicted_output_tokens=10.0), 0.0)
    ranks = {}
    for name, step_s in (("a", 0.010), ("b", 0.012), ("c", 0.0085)):
        measured(core, step_s)
        request, _ = core.submit(spec(name, max_tokens=4000, predicted_output_tokens=400.0), 0.0)
        assert request is not None
        ranks[name] = request.rank
    assert ranks["a"] == ranks["b"] == ranks["c"]
    measured(core, 0.020)
    assert core.requests["a"].rank == core.requests["c"].rank == pytest.approx(2 * ranks["a"])


def test_a_step_time_survives_a_restart_with_the_ranks_that_were_made_with_it() -> None:
    before = LapsSd()
    core = core_with(before)
    core.worker_joined(worker(costs=StepCosts(0.0, 0.010)), [], 0.0)
    request, _ = core.submit(spec("a", max_tokens=4000, predicted_output_tokens=400.0), 0.0)
    assert request is not None
    policy = LapsSd()
    core = core_with(policy)
    core.restore(Recovered(requests=[], learnt=dict(before.learnt())), 0.0)
    again, _ = core.submit(spec("b", max_tokens=4000, predicted_output_tokens=400.0), 0.0)
    assert again is not None
    assert again.rank == request.rank, "though no worker has told its own yet"
    damaged = LapsSd()
    damaged.restore_learnt({"laps-sd/step_s": "nonsense"})
    assert damaged.learnt() == {}


def test_a_takeover_during_a_long_ranking_leaves_no_ranks_of_two_step_times() -> None:
    """A long queue takes turns: ranks of both are in the store, and it must not tell of the new one only."""
    bounds = {"max_queued_requests": 2000}
    core, store = core_with(LapsSd(), **bounds), Store()
    core.restore(Recovered(), 0.0)
    for number in range(600):
        core.submit(spec(f"r{number}", max_tokens=4000, predicted_output_tokens=400.0), 0.0)
    store.apply(core.tick(0.0).commit)
    [old_rank] = {request.rank for request in core.requests.values()}
    core.worker_joined(worker(costs=StepCosts(0.0, 0.320)), [], 1.0)
    for turn in range(3):
        core.heartbeat("w", 2.0 + turn)
        store.apply(core.tick(2.0 + turn).commit)
    ranks = {rank for _, rank in store.waiting.values()}
    assert len(ranks) == 2, "the ranking has begun and has not come to its end"
    policy = LapsSd()
    after = core_with(policy, **bounds)
    after.restore(store.recover(), 5.0)
    after.worker_joined(worker(costs=StepCosts(0.0, 0.320)), [], 5.0)
    now_s = 5.0
    while policy.next_due_s() is not None or now_s == 5.0:
        now_s += 0.01
        after.heartbeat("w", now_s)
        store.apply(after.tick(now_s).commit)
    after.heartbeat("w", now_s + 2.0)
    store.apply(after.tick(now_s + 2.0).commit)
    ranks = {request.rank for request in after.requests.values() if not request.lease_id}
    assert list(ranks) == [pytest.approx(10 * old_rank)]
    assert float(store.learnt["laps-sd/step_s"]) == pytest.approx(0.320)


def test_well_accepted_requests_go_first() -> None:
    core, fake = core_with(LapsSd()), FakeWorker("w", 2)
    core.worker_joined(worker(slots=2), [], 0.0)
    fast, _ = core.submit(spec("fast", max_tokens=4000, predicted_output_tokens=1000.0), 0.0)
    slow, _ = core.submit(spec("slow", max_tokens=4000, predicted_output_tokens=1000.0), 0.0)
    assert fast is not None
    assert slow is not None
    fake.apply(core.tick(0.0))
    for step in range(60):
        core.report(fake.step({"fast": 4, "slow": 1}), step * 0.032)
    core.tick(3.0)
    assert fast.acceptance_estimate > 0.4 > slow.acceptance_estimate
    assert fast.rank < slow.rank


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from((8.0, 40.0, 400.0)), st.integers(1, 4)), min_size=1
    )
)
def test_the_worst_of_the_running_is_the_one_with_the_greatest_key(
    lives: list[tuple[int, float, int]],
) -> None:
    """Of requests that did so many steps, are predicted to become so long, and emit so much a step."""
    policy = LapsSd()
    core = core_with(policy)
    core.worker_joined(worker(slots=len(lives)), [], 0.0)
    running = []
    for number, (steps, predicted, per_step) in enumerate(lives):
        request, _ = core.submit(spec(f"r{number}", max_tokens=4000, predicted_output_tokens=predicted), 0.0)
        assert request is not None
        running.append(request)
        request.lease_id = number + 1
        request.steps, request.output = steps, bytearray(4 * steps * per_step)
    assert policy.worst(running) is max(running, key=policy.victim_key)


@pytest.mark.parametrize(
    "wrong",
    [
        {"first_threshold_s": 0.0},
        {"levels": 0},
        {"caution": -1.0},
        {"overrun": -1.0},
        {"threshold_growth": 1.0},
    ],
)
def test_parameters_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_policy("laps-sd", **wrong)


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="laps-sd-paper"):
        make_policy("best")
