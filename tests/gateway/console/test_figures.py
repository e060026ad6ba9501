"""Throughput, acceptance and percentiles from what the store tells."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.console.figures import BUCKET_S, MAX_FOLLOWED, WINDOW_S, Figures, latencies_s, quantile
from laps.v1 import generation_pb2, queue_pb2

NOW_S = 1_700_000_000.0


def info(request_id="a", output=0, drafted=0, accepted=0, **more):
    given = {"arrival_s": NOW_S, "output_tokens": output, "num_draft_tokens": drafted}
    return queue_pb2.RequestInfo(request_id=request_id, num_accepted_tokens=accepted, **(given | more))


def ended(request_id="a", finished_s=NOW_S + 1, reason=generation_pb2.FINISH_REASON_STOP, **more):
    return info(request_id, finished_s=finished_s, finish_reason=reason, **more)


def tokens(figures, now_s):
    """All tokens that the curve has counted, the bucket in progress left out."""
    return sum(value or 0 for value in figures.summary(now_s)["tokens_per_s"]) * BUCKET_S


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed(values, q):
    values.sort()
    found = quantile(values, q)
    assert found in values
    assert sum(value <= found for value in values) >= q * len(values)
    assert sum(value < found for value in values) < q * len(values)


def test_no_quantile_of_nothing():
    assert quantile([], 0.5) is None
    summary = Figures().summary(NOW_S)
    assert summary["latency_s"] == dict.fromkeys(("queue", "first_token", "per_token", "total"), [None] * 3)
    assert set(summary["tokens_per_s"]) == {None}


def test_what_ran_before_anyone_looked_is_not_counted():
    figures = Figures()
    figures.observe(NOW_S, 0, [info(output=100, drafted=80, accepted=60, arrival_s=NOW_S - 50)])
    figures.observe(NOW_S + 1, 0, [info(output=110, drafted=88, accepted=62, arrival_s=NOW_S - 50)])
    assert tokens(figures, NOW_S + 10) == 10
    assert [each for each in figures.summary(NOW_S + 10)["acceptance"] if each is not None] == [0.25]


def test_growth_while_preempted_is_counted_when_it_is_seen_again():
    figures = Figures()
    figures.observe(NOW_S, 0, [])
    figures.observe(NOW_S + 1, 0, [info(output=5)])
    figures.observe(NOW_S + 3, 1, [])
    figures.observe(NOW_S + 5, 0, [info(output=12)])
    figures.ended(NOW_S + 7, [ended(output=20, finished_s=NOW_S + 7)])
    assert tokens(figures, NOW_S + 20) == 20


def test_one_that_came_and_went_between_two_pictures_counts_once():
    figures = Figures()
    figures.observe(NOW_S, 0, [])
    figures.ended(
        NOW_S + 1, [ended("b", output=7, arrival_s=NOW_S + 0.1), ended("old", output=9, arrival_s=NOW_S - 9)]
    )
    assert tokens(figures, NOW_S + 10) == 7
    assert figures.summary(NOW_S + 10)["finished"] == 2


def test_quiet_times_are_zero_and_the_past_before_is_unknown():
    figures = Figures()
    figures.observe(NOW_S, 3, [])
    figures.observe(NOW_S + 20 * BUCKET_S, 4, [info(output=4)])
    summary = figures.summary(NOW_S + 21 * BUCKET_S)
    known = [value for value in summary["tokens_per_s"] if value is not None]
    assert known == [0.0] * 20 + [4 / BUCKET_S]
    assert summary["tokens_per_s"][0] is None
    assert [value for value in summary["waiting"] if value is not None] == [3] * 20 + [4]
    assert len(summary["tokens_per_s"]) == WINDOW_S / BUCKET_S


def test_latency_of_the_window_alone():
    figures = Figures()
    for n in range(100):
        figures.ended(NOW_S, [ended(f"r{n}", finished_s=NOW_S + (n + 1) / 10)])
    figures.ended(NOW_S, [ended("ancient", finished_s=NOW_S - 2 * WINDOW_S, arrival_s=NOW_S - 3 * WINDOW_S)])
    summary = figures.summary(NOW_S + 10)
    assert summary["finished"] == 100
    assert summary["latency_s"]["total"] == pytest.approx([5.0, 9.0, 9.9])
    assert summary["finish_reasons"] == {"stop": 100}


def test_latencies_of_one_request():
    found = latencies_s(
        ended(output=11, first_scheduled_s=NOW_S + 0.5, first_token_s=NOW_S + 1, finished_s=NOW_S + 3)
    )
    assert found == pytest.approx({"total": 3.0, "queue": 0.5, "first_token": 1.0, "per_token": 0.2})
    assert latencies_s(ended(finished_s=NOW_S + 2)) == {"total": 2.0}


def test_memory_is_bounded():
    figures = Figures()
    for start in range(0, 3 * MAX_FOLLOWED, MAX_FOLLOWED):
        figures.observe(NOW_S + start, 0, [info(f"r{start + n}", output=1) for n in range(MAX_FOLLOWED)])
    assert len(figures._seen) == MAX_FOLLOWED
    assert len(figures._buckets) <= WINDOW_S / BUCKET_S + 2
