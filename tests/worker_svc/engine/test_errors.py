"""What is refused is told in one line."""

from __future__ import annotations

import pytest

from worker_svc import shards
from worker_svc.engine import Engine
from worker_svc.engine.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("CUDA error: out of memory\nCompile with DSA."), "CUDA error: out of memory"),
        (RuntimeError("\n  indented\n"), "indented"),
        (RuntimeError(""), "RuntimeError"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_lead_that_is_gone_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class Follower:
        def follow(self) -> None:
            raise RuntimeError

    monkeypatch.setattr("signal.signal", lambda *given: None)
    follower: Engine = Follower()  # type: ignore[assignment]
    assert shards.follow(follower) == shards.runtime.EXIT_FAILED
