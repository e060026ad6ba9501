from __future__ import annotations

import os
from pathlib import Path

import pytest

from scheduler_svc.core.policies import policies
from simulator.mixes import make_mix
from simulator.replay import simulate
from simulator.result import percentile
from simulator.workload import Workload, read_workload

from .reference import replay

DATA = Path(os.environ.get("LAPS_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "workloads"

PUBLISHED = [
    ("specbench_draft68m_poisson", 8, 1.05, "sjf", 14.966),
    ("specbench_draft68m_azure_arrivals", 1, 0.7, "oracle", 4.904),
    ("specbench_draft68m_azure_arrivals", 8, 0.9, "srpt", 8.771),
    ("mtbench_mixed_drafters", 8, 0.9, "fcfs", 6.435),
]
"""A slice of the figures of an independent simulator; `bench/policies.py --agreement` checks all."""
COMPARED = ("fcfs", "sjf", "srpt", "oracle")


def as_dicts(workload: Workload) -> list[dict[str, object]]:
    return [
        {
            "arrival_s": job.arrival_s,
            "emitted_per_step": job.emitted_per_step,
            "predicted_output_tokens": job.predicted_output_tokens,
        }
        for job in workload
    ]


@pytest.mark.parametrize("policy", COMPARED)
@pytest.mark.parametrize(("slots", "switch_ms"), [(1, 1.0), (3, 0.0), (8, 20.0)])
def test_the_replay_agrees_with_an_independent_one(policy: str, slots: int, switch_ms: float) -> None:
    workload = make_mix(jobs=150, seed=slots, length_error=0.5)
    result = simulate(workload, policy, slots=slots, load=1.0, switch_ms=switch_ms)
    mean_s, switches = replay(as_dicts(workload), policy, slots, 1.0, switch_ms=switch_ms)
    assert result.mean_latency_s == pytest.approx(mean_s, rel=1e-9)
    assert result.switches == switches


@pytest.mark.parametrize(("name", "slots", "load", "policy", "mean_s"), PUBLISHED)
def test_the_replay_agrees_with_the_published_table(
    name: str, slots: int, load: float, policy: str, mean_s: float
) -> None:
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no workload at {path}; set LAPS_TEST_DATA to the folder that holds workloads/")
    result = simulate(read_workload(path), policy, slots, load)
    assert result.mean_latency_s == pytest.approx(mean_s, rel=0.005)


@pytest.mark.parametrize("policy", list(policies()))
def test_same_seed_same_result(policy: str) -> None:
    workload = make_mix(jobs=80)
    first = simulate(workload, policy, slots=2, seed=3, length_error=0.4)
    again = simulate(workload, policy, slots=2, seed=3, length_error=0.4)
    assert first == again
    assert min(first.latencies_s) > 0.0
    assert min(first.slowdowns) >= 0.999


@pytest.mark.parametrize("policy", [name for name in policies() if name != "fcfs"])
def test_the_starvation_bound_holds(policy: str) -> None:
    """Nobody gets a slot before a request that arrived earlier and is past the bound."""
    bound_s = 8.0
    workload = make_mix(jobs=200, seed=1, length_error=0.3)
    result = simulate(
        workload, policy, slots=2, load=1.1, starvation_bound_s=bound_s, record_stays=True, length_error=0.3
    )
    begins: dict[int, list[float]] = {}
    for stay in result.stays:
        begins.setdefault(stay.job, []).append(stay.begin_s)
    arrivals = [begins[job][0] - wait_s for job, wait_s in enumerate(result.first_waits_s)]
    held = sorted((stay.begin_s, stay.end_s, stay.job) for stay in result.stays)
    for begin_s, _, job in held:
        for earlier in range(job):
            if arrivals[earlier] + bound_s < begin_s - 1e-9:
                holds = any(
                    stay_begin <= begin_s + 1e-9 and stay_end >= begin_s - 1e-9
                    for stay_begin, stay_end, other in held
                    if other == earlier
                )
                over = arrivals[earlier] + result.latencies_s[earlier] <= begin_s + 1e-9
                assert holds or over, f"{job} got a slot at {begin_s} before {earlier}"


def test_percentiles_interpolate() -> None:
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert percentile([5.0], 0.99) == 5.0
