"""A slice of the comparison, as a gate: ratios on fixed seeds, so that noise does not matter.
The whole table is made by bench/policies.py."""

from __future__ import annotations

import statistics

import pytest

from simulator.mixes import CHAT_MIX, Task, make_mix, with_coarse_predictions
from simulator.replay import simulate

BASELINES = ("fcfs", "sjf", "srpt", "las", "fastserve", "laps-sd-paper")
NARROW = (Task("chat", 0.7, 180.0, 0.8, 0.45, 0.06), Task("summary", 0.3, 110.0, 0.4, 0.5, 0.06))
MIXES = {"wide": make_mix(jobs=500, seed=31), "narrow": make_mix(NARROW, jobs=500, seed=32)}


@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize(("slots", "load", "switch_ms", "error"), [(4, 0.9, 0.5, 0.0), (8, 1.05, 5.0, 0.3)])
def test_laps_sd_keeps_up_with_the_best(
    mix: str, slots: int, load: float, switch_ms: float, error: float
) -> None:
    def mean_s(policy: str) -> float:
        return simulate(
            MIXES[mix], policy, slots, load, switch_ms=switch_ms, length_error=error, seed=1
        ).mean_latency_s

    assert mean_s("laps-sd") <= 1.02 * min(mean_s(policy) for policy in BASELINES)


def test_acceptance_closes_most_of_the_gap_where_it_differs_and_lengths_are_known() -> None:
    shares = []
    for seed in (31, 41, 51):
        mix = make_mix(jobs=600, seed=seed)
        means = {
            policy: simulate(mix, policy, 1, 0.9, switch_ms=0.5, length_error=0.0).mean_latency_s
            for policy in ("fcfs", "las", "srpt", "oracle", "laps-sd")
        }
        shares.append((means["srpt"] - means["laps-sd"]) / (means["srpt"] - means["oracle"]))
        assert means["laps-sd"] <= 0.61 * min(means["fcfs"], means["las"])
    assert statistics.median(shares) >= 0.6


def test_it_learns_what_a_coarse_predictor_does_not_know() -> None:
    """Predictions blind to the task, as classifiers in use make them."""
    mix = with_coarse_predictions(make_mix(jobs=700, seed=61), seed=61)
    means = {
        policy: simulate(mix, policy, 4, 0.95, switch_ms=0.5).mean_latency_s
        for policy in ("sjf", "srpt", "oracle", "laps-sd")
    }
    best_s = min(means["sjf"], means["srpt"])
    assert best_s - means["laps-sd"] >= 0.2 * (best_s - means["oracle"])


def test_long_tails_that_nobody_foretells_do_not_hold_up_the_others() -> None:
    mix = with_coarse_predictions(make_mix(CHAT_MIX, jobs=600, seed=81), seed=81)
    means = {
        policy: simulate(mix, policy, 4, 0.9, switch_ms=0.5).mean_latency_s
        for policy in ("sjf", "srpt", "las", "fastserve", "laps-sd")
    }
    assert means["laps-sd"] <= min(means[policy] for policy in means if policy != "laps-sd")


def test_bad_predictions_are_mended_by_what_their_class_is_like() -> None:
    mix = make_mix(jobs=500, seed=42)
    means = {
        policy: simulate(mix, policy, 1, 0.9, switch_ms=0.5, length_error=0.8, seed=1).mean_latency_s
        for policy in ("sjf", "srpt", "laps-sd")
    }
    assert means["laps-sd"] <= 0.95 * min(means["sjf"], means["srpt"])


def test_costly_switches_with_long_queues_do_not_make_it_thrash() -> None:
    mix = make_mix(CHAT_MIX, jobs=700, seed=62)
    means = {
        policy: simulate(mix, policy, 8, 1.05, switch_ms=20.0, length_error=0.8, seed=1).mean_latency_s
        for policy in ("sjf", "srpt", "laps-sd")
    }
    assert means["laps-sd"] <= 1.02 * means["sjf"] < means["srpt"]
