"""What the kill loop does, and when: every kind of fault on every kind of process, round after round."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

VERBS = ("kill", "freeze", "cut")
TARGETS = ("leader", "standby", "gateway", "worker", "store")
KINDS = tuple(f"{verb} {target}" for target in TARGETS for verb in VERBS)
PAUSE_S = 2.5
"""Mean time between the end of a fault and the next one."""
OVERLAP_SHARE = 0.25
"""Of the faults, those that do not wait for the one before to be over."""

CHOSEN_LAST_S = {"kill": 1.0, "freeze": 6.0, "cut": 4.0}
"""Of faults that are asked for by name: so long that nobody could fail to notice. A leader that is frozen is
succeeded meanwhile."""


@dataclass(frozen=True)
class Planned:
    pause_s: float
    """Before it."""
    overlaps: bool
    verb: str
    target: str
    which: float
    """In [0, 1): of several processes of the kind, this one."""
    lasts_s: float
    resets: bool
    """Connections that were cut break when they are healed."""

    @property
    def kind(self) -> str:
        return f"{self.verb} {self.target}"


def chosen(kinds: Iterable[str], rng: random.Random) -> Iterator[Planned]:
    """These faults, each soon after the one before is over, and each longer than nobody would notice."""
    for kind in kinds:
        verb, target = kind.split()
        yield Planned(
            pause_s=0.5,
            overlaps=False,
            verb=verb,
            target=target,
            which=rng.random(),
            lasts_s=CHOSEN_LAST_S[verb],
            resets=rng.random() < 0.5,
        )


def plan(rng: random.Random) -> Iterator[Planned]:
    """Faults without end. Each round has every pair of fault and target once, in an order of its own."""
    while True:
        pairs = list(itertools.product(VERBS, TARGETS))
        rng.shuffle(pairs)
        for verb, target in pairs:
            yield Planned(
                pause_s=rng.expovariate(1.0 / PAUSE_S),
                overlaps=rng.random() < OVERLAP_SHARE,
                verb=verb,
                target=target,
                which=rng.random(),
                lasts_s=rng.uniform(0.2, 3.0) if verb == "kill" else rng.uniform(0.5, 8.0),
                resets=rng.random() < 0.5,
            )
