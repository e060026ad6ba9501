"""Five times the capacity, at its short setting: what is admitted is served, the rest is told when to come
back, memory stays flat, and who does not read harms nobody. Latencies are for the long setting to judge."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import overload

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("overhead_s", "really_per_s"),
    [(0.0, 200.0), (0.001, 200.0), (0.02, 50.0)],
    ids=["none", "made up for", "more than there is time"],
)
def test_the_rate_is_offered_whatever_sleeping_takes_or_the_figures_say_which(
    monkeypatch: pytest.MonkeyPatch, overhead_s: float, really_per_s: float
) -> None:
    now_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += max(seconds, 0.0) + overhead_s

    async def one(load: overload.Load, client: Any) -> None:
        load.offered += 1

    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(overload.Load, "one", one)
    client: Any = None
    load = asyncio.run(overload.offer(client, 200.0, 60.0, random.Random(0)))
    assert load.offered == pytest.approx(60 * really_per_s, rel=0.03)
    assert load.figures()["offered_requests_per_s"] == pytest.approx(really_per_s, rel=0.03)
    assert now_s == pytest.approx(60.0, abs=0.1)


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(600)
def test_overload(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench.overload", "--seconds", "3", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert figures["5x"]["refused"] > 0
    assert figures["5x"]["admitted"] + figures["5x"]["refused"] == figures["5x"]["offered"]
    wanted_per_s = 5 * figures["capacity_requests_per_s"]
    assert figures["5x"]["offered_requests_per_s"] == pytest.approx(wanted_per_s, rel=0.3)
    assert figures["latency_ratio"]["p50"] > 0
    assert figures["slow_reader_tokens"] == 600
