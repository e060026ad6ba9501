"""`python -m simulator.faults`, stopped early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from laps.cli import EXIT_INTERRUPTED
from simulator.faults import __main__ as command
from simulator.faults.world import Outcome, play


def test_stopped_early_it_tells_what_was_played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def two_and_ctrl_c(first: int, *_: Any) -> Iterator[Outcome]:
        yield from (play(first), play(first + 1))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_outcomes", two_and_ctrl_c)
    out = tmp_path / "figures.json"
    ended = CliRunner().invoke(command.main, ["--start", "7", "--seeds", "50", "--json", str(out)])
    assert ended.exit_code == EXIT_INTERRUPTED
    figures = json.loads(out.read_text())
    assert (figures["first_seed"], figures["seeds"], figures["failed_seeds"]) == (7, 2, [])
    assert figures["requests"] > 0
