"""Puts a simulated world under the product's modules: clock, chance, channels, logs."""

from __future__ import annotations

import contextlib
import random
import sys
import time
import uuid
from collections.abc import Iterator, MutableMapping
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import structlog

import gateway.deliveries
import laps.channels
import scheduler_svc.core.steps
import scheduler_svc.deliveries
import scheduler_svc.leader
from simulator.faults.clock import VirtualTime, current_process
from simulator.faults.network import Channel

if TYPE_CHECKING:
    from simulator.faults.world import World


class _Chance:
    """Stands in for the `random` module: every process has chance of its own."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._by_process: dict[str, random.Random] = {}

    def Random(self, *seed: Any) -> random.Random:
        return random.Random(*(seed or ("unseeded",)))

    def uniform(self, low: float, high: float) -> float:
        process = current_process()
        name = "" if process is None else process.name
        if name not in self._by_process:
            self._by_process[name] = random.Random(f"{self._seed} chance {name}")
        return self._by_process[name].uniform(low, high)


@contextlib.contextmanager
def installed(world: World) -> Iterator[None]:
    """The product's modules see this world, and none else, until the end of the block."""
    clock, chance = VirtualTime(world.loop), _Chance(world.knobs.seed)
    ids = random.Random(f"{world.knobs.seed} ids")

    def open_channel(address: str, **_: Any) -> Channel:
        return Channel(world.network, address)

    made_ids = SimpleNamespace(uuid4=lambda: uuid.UUID(int=ids.getrandbits(128)))
    stand_ins: dict[int, tuple[str, Any]] = {
        id(time): ("time", clock),
        id(random): ("random", chance),
        id(uuid): ("uuid", made_ids),
        id(laps.channels.open_channel): ("open_channel", open_channel),
    }
    changes: list[tuple[Any, str, Any]] = [
        (module, name, value)
        for module in _product_modules()
        for original, (name, value) in stand_ins.items()
        if id(vars(module).get(name)) == original
    ]
    changes += [
        (scheduler_svc.leader, "DeliveryHub", world.parts.hub),
        (scheduler_svc.deliveries, "MAX_PENDING_BYTES", world.knobs.pending_bytes),
        (gateway.deliveries, "Feed", world.parts.feed),
        (scheduler_svc.core.steps, "rows_outside", world.parts.rows_outside),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    logs = structlog.get_config()
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        _log_into(world)
        yield
    finally:
        structlog.configure(**logs)
        for module, name, value in before:
            setattr(module, name, value)


def _product_modules() -> list[ModuleType]:
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in ("gateway", "laps", "scheduler_svc", "worker_svc") and module is not None
    ]


def _log_into(world: World) -> None:
    """The services' log lines become lines of the trace; without one they are not even made."""

    def line(_logger: Any, level: str, event: MutableMapping[str, Any]) -> Any:
        process = current_process()
        said = event.pop("event", "")
        error = event.pop("exc_info", None)
        rest = " ".join(f"{name}={value}" for name, value in event.items() if name != "duration_ms")
        mark = "" if level in ("info", "debug") else f"{level}: "
        text = f"{mark}{said} {rest}".rstrip()
        world.trace("?" if process is None else process.name, f"{text} {error!r}" if error else text)
        raise structlog.DropEvent

    least = 20 if world.traced else 50
    structlog.configure(
        processors=[line],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        cache_logger_on_first_use=False,
    )
