"""What goes out at once, and what may wait for the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_svc import reports
from worker_svc.engine import FinishReason, StepResult
from worker_svc.reports import Report, Reports

INTERVAL_S = 0.03


class Time:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Sent:
    """Reports that are added at given instants, and the messages that came of them: (instant, steps)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interval_s: float = INTERVAL_S) -> None:
        self.time = Time()
        monkeypatch.setattr(reports, "time", self.time)
        self.messages: list[tuple[float, list[int]]] = []
        self.reports = Reports(self._send, interval_s)
        self._step = 0

    def _send(self, sent: Sequence[Report]) -> None:
        self.messages.append((self.time.now_s, [report.step for report in sent]))

    def step(self, step_s: float, **fields: Any) -> None:
        self.reports.send_due()
        self.time.now_s += step_s
        self._step += 1
        of_result = {name: fields.pop(name) for name in ("offsets", "finish", "prefill_s") if name in fields}
        result = StepResult(**{"step_s": step_s, "offsets": (5,), "finish": (None,)} | of_result)
        self.reports.add(Report(1, self._step, result, [7], **fields))

    @property
    def steps(self) -> list[list[int]]:
        return [steps for _, steps in self.messages]


def test_short_steps_go_together_and_long_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Sent(monkeypatch)
    for _ in range(11):
        short.step(0.006)
    assert len(short.reports) == 5, "what is due goes out while the next step computes"
    short.reports.send_due()
    assert short.steps == [[1], [2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]
    long = Sent(monkeypatch)
    for _ in range(4):
        long.step(0.021)
    long.reports.send_due()
    assert long.steps == [[1], [2], [3], [4]]


@pytest.mark.parametrize(
    "news",
    [
        {"offsets": (0,)},
        {"finish": (FinishReason.STOP,)},
        {"released_lease_ids": [3]},
        {"missing_lease_ids": [3]},
        {"errors": [(3, "no")]},
        {"evicted_request_ids": ["a"]},
        {"prefill_s": 0.001},
    ],
)
def test_news_wait_for_nothing(monkeypatch: pytest.MonkeyPatch, news: dict[str, Any]) -> None:
    sent = Sent(monkeypatch)
    sent.step(0.001)
    sent.step(0.001)
    sent.step(0.001, **news)
    assert sent.steps == [[1], [2, 3]]
    assert not sent.reports


def test_without_an_interval_each_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(monkeypatch, interval_s=0.0)
    for _ in range(3):
        sent.step(0.0001)
    assert sent.steps == [[1], [2], [3]]


@given(steps_s=st.lists(st.floats(0.0005, 0.2), min_size=1, max_size=60))
def test_all_go_in_order_and_none_waits_longer_than_the_interval_and_a_step(steps_s: list[float]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        sent = Sent(monkeypatch)
        ended_s = []
        for step_s in steps_s:
            sent.step(step_s)
            ended_s.append(sent.time.now_s)
        sent.reports.flush()
    assert [step for steps in sent.steps for step in steps] == list(range(1, len(steps_s) + 1))
    longest_s = max(steps_s)
    for at_s, steps in sent.messages:
        assert at_s - ended_s[steps[0] - 1] < INTERVAL_S + longest_s
    # No message comes sooner after the one before than the interval less half a step.
    for (before_s, _), (at_s, steps) in zip(sent.messages[:-2], sent.messages[1:-1], strict=False):
        assert at_s - before_s >= INTERVAL_S - steps_s[steps[-1] - 1] / 2.0 - 1e-6
