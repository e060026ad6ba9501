"""A seed decides everything: the same seed gives the same trace, byte for byte."""

from __future__ import annotations

import os
import random
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


@pytest.mark.parametrize("seed", [57, 60])
def test_wherever_objects_lie_in_memory(seed: int) -> None:
    """The order of a set of objects is that of their addresses. In these seeds several readers or gateways
    wait for the same thing."""

    def trace(heap: int) -> list[str]:
        chance = random.Random(heap)
        blocks: list[bytearray | None] = [bytearray(chance.randrange(16, 600)) for _ in range(20_000)]
        for place in range(0, len(blocks), chance.choice((2, 3, 5))):
            blocks[place] = None
        return play(seed, traced=True).lines

    first = trace(0)
    assert all(trace(heap) == first for heap in range(1, 3))


def test_in_processes_that_hash_differently() -> None:
    def trace(hash_seed: str) -> bytes:
        command = [sys.executable, "-m", "simulator.faults", "--seed", "11", "--trace"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environment, capture_output=True, check=True, timeout=360).stdout

    assert trace("1") == trace("2")
