from __future__ import annotations

import json
import math
import random

import pytest

from scheduler_svc.core import class_records, hints, learning
from scheduler_svc.core.class_records import ClassRecord, prediction_level
from scheduler_svc.core.learning import Knowledge, mean_excess_tokens


def taught(error: float = 0.0, bias: float = 1.0, requests: int = 300) -> Knowledge:
    knowledge, dice = Knowledge(), random.Random(0)
    for _ in range(requests):
        predicted = dice.uniform(50.0, 400.0)
        tokens = max(1, round(predicted * bias * math.exp(error * dice.gauss(0, 1))))
        knowledge.add("chat", predicted, True, tokens, max(1, tokens // 2))
    return knowledge


def test_nothing_learnt_leaves_the_prediction_as_it_is() -> None:
    belief = Knowledge().length("chat", 100.0, True)
    assert belief.median_tokens == 100.0
    assert belief.log_sd == pytest.approx(learning.PRIOR_LOG_SD)
    assert Knowledge().tokens_per_step("chat") == learning.PRIOR_TOKENS_PER_STEP


def test_a_bias_is_corrected_and_the_error_is_known() -> None:
    belief = taught(error=0.4, bias=0.5).length("chat", 200.0, True)
    assert belief.median_tokens == pytest.approx(100.0, rel=0.15)
    assert belief.log_sd == pytest.approx(0.4, rel=0.2)
    exact = taught().length("chat", 200.0, True)
    assert exact.median_tokens == pytest.approx(200.0, rel=0.02)
    assert exact.log_sd < 0.05


def test_the_longest_predictions_of_a_class_are_mostly_too_long() -> None:
    """Lengths of log-sd 0.5 around 100, predicted with log-error 0.8: what a prediction tells is known."""
    knowledge, dice = Knowledge(), random.Random(2)
    for _ in range(300):
        tokens = max(1, round(100.0 * math.exp(0.5 * dice.gauss(0, 1))))
        knowledge.add("chat", max(1.0, tokens * math.exp(0.8 * dice.gauss(0, 1))), True, tokens, tokens)
    share = 0.5**2 / (0.5**2 + 0.8**2)
    for predicted in (25.0, 100.0, 400.0, 1600.0):
        belief = knowledge.length("chat", predicted, True)
        assert belief.median_tokens == pytest.approx(100.0 * (predicted / 100.0) ** share, rel=0.25)
        assert belief.log_sd == pytest.approx(0.8 * math.sqrt(share), rel=0.2)


def test_guesses_of_our_own_do_not_bend_the_first_prediction() -> None:
    knowledge = Knowledge()
    for number in range(100):
        knowledge.add("other", 50.0 + 10 * number, True, 500, 250)
        knowledge.add("chat", 256.0, False, 256, 128)
    assert knowledge.length("chat", 20.0, True).median_tokens == pytest.approx(20.0, rel=0.3)


def test_an_unknown_class_takes_after_all_requests() -> None:
    knowledge = taught(bias=0.5)
    assert knowledge.length("new", 200.0, True).median_tokens == pytest.approx(100.0, rel=0.1)
    assert knowledge.tokens_per_step("new") == pytest.approx(2.0, rel=0.05)


def test_the_slope_finds_that_well_accepted_requests_are_longer() -> None:
    longer, same = Knowledge(), Knowledge()
    dice = random.Random(1)
    for _ in range(300):
        rate = math.exp(dice.gauss(0.7, 0.3))
        steps = round(50 * math.exp(dice.gauss(0, 0.2)))
        longer.add("chat", 100.0, True, max(1, round(rate * steps)), steps)
        same.add("chat", 100.0, True, 100, max(1, round(100 / rate)))
    assert longer.rate_slope() == pytest.approx(1.0, abs=0.2)
    assert same.rate_slope() == pytest.approx(0.0, abs=0.05)


def by_size(error: float) -> tuple[float, float]:
    """Tokens per step believed of short and of long predictions, where long outputs are accepted four times
    as well."""
    knowledge, dice = Knowledge(), random.Random(3)
    for number in range(400):
        tokens = 1024 if number % 2 else 64
        predicted = tokens * math.exp(error * dice.gauss(0, 1))
        knowledge.add("chat", predicted, True, tokens, tokens // (8 if number % 2 else 2))
    return knowledge.of_request("chat", 64.0, True)[1], knowledge.of_request("chat", 1024.0, True)[1]


def test_acceptance_is_learnt_by_the_size_of_good_predictions() -> None:
    short, long = by_size(error=0.0)
    assert short == pytest.approx(2.0, rel=0.1)
    assert long == pytest.approx(8.0, rel=0.1)


def test_the_size_of_a_vague_prediction_says_little_about_acceptance() -> None:
    short, long = by_size(error=1.0)
    assert 1.0 < long / short < 1.2


def test_a_guess_of_our_own_has_no_size_to_learn_by() -> None:
    knowledge = Knowledge()
    for _ in range(100):
        knowledge.add("chat", 1024.0, True, 1024, 128)
        knowledge.add("chat", 256.0, False, 64, 32)
    assert knowledge.of_request("chat", 1024.0, False)[1] == knowledge.tokens_per_step("chat")
    assert knowledge.classes["chat"].rates.keys() == set(class_records.rate_levels(1024.0))


def test_a_record_survives_json() -> None:
    record = taught(error=0.3).classes["chat"]
    again = ClassRecord.from_json(record.to_json())
    assert again == record
    assert json.loads(record.to_json())["requests"] == 300


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tokens": "x"}', "null"])
def test_what_is_not_a_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        ClassRecord.from_json(text)


def test_old_requests_fade_and_classes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_records, "FADE_AT", 100.0)
    monkeypatch.setattr(hints, "FADE_AT", 100.0)
    monkeypatch.setattr(learning, "MAX_CLASSES", 3)
    knowledge = Knowledge()
    for number in range(1000):
        knowledge.add(f"class {number % 10}", 100.0, True, 100 if number < 500 else 200, 50)
    assert set(knowledge.classes) == {"class 0", "class 1", "class 2", learning.OTHER_CLASSES}
    assert knowledge.everything.log_error.count < 100.0
    assert knowledge.length("class 9", 100.0, True).median_tokens > 180.0


def test_guesses_are_kept_apart_from_predictions() -> None:
    assert prediction_level(250.0, True) == "~256"
    assert prediction_level(250.0, False) == "guess 256"


def test_mean_excess() -> None:
    assert mean_excess_tokens(100.0, 0.0, 40) == 60.0
    assert mean_excess_tokens(100.0, 0.5, 0) == pytest.approx(100.0 * math.exp(0.125))
    dice = random.Random(0)
    lengths = [100.0 * math.exp(0.5 * dice.gauss(0, 1)) for _ in range(200_000)]
    beyond = [length - 120 for length in lengths if length > 120]
    assert mean_excess_tokens(100.0, 0.5, 120) == pytest.approx(sum(beyond) / len(beyond), rel=0.02)
    far = [mean_excess_tokens(100.0, 0.1, emitted) for emitted in range(50, 1000)]
    assert all(math.isfinite(excess) and excess >= 1.0 for excess in far)
