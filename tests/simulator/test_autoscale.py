"""Simulated workers come and go by the metric, and nothing is lost on the way."""

from __future__ import annotations

from simulator.autoscale import MOST, STARTUP_S, Fleet, bursty, by_backlog, by_requests

JOBS = 60


def test_every_request_ends_and_every_worker_is_paid() -> None:
    workload = bursty(JOBS, seed=1, burst_jobs=15)
    fleet = Fleet(workload, by_backlog(120.0))
    latencies_s = fleet.run()
    assert len(latencies_s) == len(workload)
    assert min(latencies_s) >= 0.0
    assert 1 < fleet.most <= MOST + 1, "it grew; one may still be going while another comes"
    fleet.core.check_invariants()
    span_s = workload[-1].arrival_s
    assert span_s < fleet.paid_s < fleet.most * (span_s + 600)


def test_a_fixed_fleet_costs_its_time_and_the_same_seed_gives_the_same() -> None:
    workload = bursty(JOBS, seed=2, burst_jobs=15)
    one, again = Fleet(workload, by_requests(1e9)), Fleet(workload, by_requests(1e9))
    assert one.run() == again.run()
    assert one.most == 1
    assert one.paid_s == again.paid_s > workload[-1].arrival_s + STARTUP_S
