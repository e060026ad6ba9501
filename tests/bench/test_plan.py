"""What the kill loop does: all of it, soon, and the same for the same seed."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from bench._plan import KINDS, chosen, plan


@pytest.mark.parametrize("seed", range(5))
def test_every_round_has_every_fault_on_every_kind_of_process(seed: int) -> None:
    faults = list(islice(plan(random.Random(seed)), 3 * len(KINDS)))
    rounds = [
        [fault.kind for fault in faults[at : at + len(KINDS)]] for at in range(0, len(faults), len(KINDS))
    ]
    assert all(sorted(each) == sorted(KINDS) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 3, "each in an order of its own"
    assert {"kill leader", "freeze leader", "cut leader", "kill standby", "kill store"} <= set(KINDS)


def test_a_seed_decides_what_and_for_how_long() -> None:
    first, second, other = (list(islice(plan(random.Random(seed)), 20)) for seed in (7, 7, 8))
    assert first == second != other
    assert all(fault.lasts_s > 0.0 and fault.pause_s >= 0.0 for fault in first)


def test_faults_that_are_named_come_in_their_order_and_have_an_end() -> None:
    kinds = ["kill store", "freeze leader", "kill store"]
    assert [fault.kind for fault in chosen(kinds, random.Random(0))] == kinds
