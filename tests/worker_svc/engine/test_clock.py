"""Marks of the phases of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worker_svc.engine.clock import BusyClock, PhaseClock


def test_marks_are_of_the_clocks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's current device may be another: nothing is said of cuda:0 here."""
    recorded: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any = None) -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    clock = PhaseClock(BusyClock(torch.device("cuda", 1)))
    assert clock.seconds(clock.mark(), clock.mark()) == 0.25
    assert recorded == ["stream of cuda:1"] * 2
