"""A seed decides everything: the same seed gives the same trace, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from simulator.faults.world import play


@pytest.mark.parametrize("seed", [3, 11, 17])
def test_twice_in_one_process(seed: int) -> None:
    first, second = play(seed, traced=True), play(seed, traced=True)
    assert first.lines == second.lines
    assert len(first.lines) > 100
    assert first.counts == second.counts == play(seed).counts


def test_in_processes_that_hash_differently() -> None:
    def trace(hash_seed: str) -> bytes:
        command = [sys.executable, "-m", "simulator.faults", "--seed", "11", "--trace"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environment, capture_output=True, check=True, timeout=360).stdout

    assert trace("1") == trace("2")
