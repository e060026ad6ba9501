from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.core.hints import DRAWERS, ROWS_PER_DRAWER, TOLD_AT_ONCE, HintRecords
from scheduler_svc.core.learning import Knowledge

PREDICTED = 100.0


def served(knowledge: Knowledge, predicted: float, tokens: int, steps: int, times: int = 1) -> None:
    for _ in range(times):
        knowledge.add("chat", predicted, True, tokens, steps)


def told(records: HintRecords) -> dict[str, str]:
    """All that is left to tell."""
    stored = dict[str, str]()
    while changes := dict(records.take_changes()):
        assert len(changes) <= TOLD_AT_ONCE
        assert not changes.keys() & stored.keys()
        stored |= changes
    return stored


def test_two_call_sites_with_constants_of_one_size_are_told_apart() -> None:
    knowledge = Knowledge()
    for _ in range(40):
        served(knowledge, 100.0, 50, 50)
        served(knowledge, 101.0, 200, 50)
    short, long = knowledge.length("chat", 100.0, True), knowledge.length("chat", 101.0, True)
    between = knowledge.length("chat", 100.5, True)
    assert short.median_tokens == pytest.approx(50.0, rel=0.3)
    assert long.median_tokens == pytest.approx(200.0, rel=0.3)
    assert between.median_tokens == pytest.approx(100.0, rel=0.2)
    assert max(short.log_sd, long.log_sd) < between.log_sd


def test_a_length_that_is_right_to_the_token_has_the_acceptance_of_the_same_request_before() -> None:
    knowledge = Knowledge()
    for tokens in range(60, 160):
        served(knowledge, float(tokens), tokens, tokens // 2)
    _, of_size, *_ = knowledge.of_request("chat", 100.0, True)
    served(knowledge, 120.0, 120, 12, times=3)
    _, of_repeated, *_ = knowledge.of_request("chat", 120.0, True)
    _, of_neighbour, *_ = knowledge.of_request("chat", 119.0, True)
    assert of_size == pytest.approx(2.0, rel=0.1)
    assert of_repeated > 1.5 * of_neighbour


def test_our_own_guess_is_no_prediction_to_learn_from() -> None:
    knowledge = Knowledge()
    knowledge.add("chat", 256.0, False, 20, 10)
    assert knowledge.hints.get("chat", 256.0) is None


def test_another_class_with_the_same_prediction_is_another() -> None:
    records = HintRecords()
    records.add("chat", PREDICTED, 0.0, 100, 50)
    assert records.get("code", PREDICTED) is None


@given(st.lists(st.integers(1, 3000), max_size=300))
def test_what_is_told_is_what_is_known(predictions: list[int]) -> None:
    records, stored = HintRecords(), dict[str, str]()
    for number, predicted in enumerate(predictions):
        records.add("chat", float(predicted), 0.1, predicted, 1 + number)
        if number % 7 == 0:
            stored |= dict(records.take_changes())
    stored |= told(records)
    again = HintRecords()
    for name in sorted(stored):
        again.restore(stored[name])
    for predicted in set(predictions):
        here, there = records.get("chat", float(predicted)), again.get("chat", float(predicted))
        assert (here is None) == (there is None)
        if here is not None and there is not None:
            assert (here.log_error, here.rate) == (there.log_error, there.rate)
    assert not list(records.take_changes())


def test_no_more_are_kept_than_there_is_room_for_and_the_last_seen_stay() -> None:
    records = HintRecords()
    for predicted in range(1, 3 * DRAWERS * ROWS_PER_DRAWER):
        records.add("chat", PREDICTED, 0.0, 100, 50)
        records.add("chat", 1000.0 + predicted, 0.0, 100, 50)
    stored = [json.loads(text) for text in told(records).values()]
    assert len(stored) == DRAWERS
    assert max(len(rows) for rows in stored) == ROWS_PER_DRAWER
    kept = records.get("chat", PREDICTED)
    assert kept is not None
    assert kept.log_error.count > 500
    assert records.get("chat", 1001.0) is None


@pytest.mark.parametrize(
    "text", ["", "nonsense", "7", "{}", '[{"class": "a"}]', "[[]]", '[{"class": 1, "predicted_tokens": NaN}]']
)
def test_a_damaged_drawer_is_refused_as_a_whole(text: str) -> None:
    records = HintRecords()
    if text == "{}":
        records.restore(text)  # Empty is empty.
    else:
        with pytest.raises(ValueError, match=r"no drawer|number|float|Expecting"):
            records.restore(text)
    assert not list(records.take_changes())


def test_the_newest_errors_count_most() -> None:
    records = HintRecords()
    for _ in range(5000):
        records.add("chat", PREDICTED, 0.0, 100, 50)
    for _ in range(2000):
        records.add("chat", PREDICTED, math.log(2.0), 200, 50)
    record = records.get("chat", PREDICTED)
    assert record is not None
    assert record.log_error.mean > 0.9 * math.log(2.0)
