"""What a world is assembled from, and the assembly with one safeguard taken out.

A checker that never fails proves nothing. Each of the mutants here lacks one thing that keeps a promise;
the tests show that some seed notices, for every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gateway.admission import unpack
from gateway.streams import Feed
from laps.history import HistoryPoint
from scheduler_svc.core.records import StepReport
from scheduler_svc.core.steps import rows_outside
from scheduler_svc.deliveries import DeliveryHub
from scheduler_svc.store.errors import StoreError
from simulator.faults.store_model import ALL_CHECKS
from simulator.faults.store_server import SimulatedStore


@dataclass(frozen=True)
class Parts:
    store: Callable[..., SimulatedStore] = SimulatedStore
    store_checks: frozenset[str] = ALL_CHECKS
    hub: type[DeliveryHub] = DeliveryHub
    feed: type[Feed] = Feed
    rows_outside: Callable[[StepReport, int], frozenset[int]] = rows_outside


class HastyStore(SimulatedStore):
    """Says that a commit is stored when it has only been sent."""

    def send(self, encoded: bytes, on_stored: Callable[[StoreError | None], None]) -> None:
        super().send(encoded, lambda error: None)
        on_stored(None)


class DeafStore(SimulatedStore):
    """Does not care what its peers have seen."""

    async def witness(self, seen: HistoryPoint) -> None:
        return None


class ForgetfulHub(DeliveryHub):
    """Never cancels what nobody follows."""

    def take_abandoned(self, now_s: float) -> list[str]:
        super().take_abandoned(now_s)
        return []


class CarelessFeed(Feed):
    """Takes whatever tokens come for the next ones."""

    def extend(self, offset: int, packed: bytes, logprobs: Any = ()) -> None:
        super().extend(len(self.tokens), unpack(packed).tobytes(), logprobs)


def believed(report: StepReport, vocabulary_size: int) -> frozenset[int]:
    """Takes whatever tokens a worker reports."""
    return frozenset()


MUTANTS: dict[str, Parts] = {
    "no epoch fence": replace(Parts(), store_checks=ALL_CHECKS - {"fence"}),
    "no log gap check": replace(Parts(), store_checks=ALL_CHECKS - {"log"}),
    "no idempotent commit": replace(Parts(), store_checks=ALL_CHECKS - {"digest"}),
    "sends before it is stored": replace(Parts(), store=HastyStore),
    "no mark of an alarm": replace(Parts(), store_checks=ALL_CHECKS - {"stopped"}),
    "no name of a term": replace(Parts(), store_checks=ALL_CHECKS - {"term"}),
    "no peer is asked what it has seen": replace(Parts(), store=DeafStore),
    "no orphan is cancelled": replace(Parts(), hub=ForgetfulHub),
    "no offset check in the gateway": replace(Parts(), feed=CarelessFeed),
    "no vocabulary check": replace(Parts(), rows_outside=believed),
}
