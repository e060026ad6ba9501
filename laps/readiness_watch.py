"""Tells a person which services of a stack do not do their work any more, why, and when they do again.

A service that ends is told of by its `Child`. This is for those that run and cannot go on: a scheduler
without its store, a gateway that finds no scheduler.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from laps.child import Child
from laps.logs import get_logger

INTERVAL_S = 1.0
PATIENCE_S = 3.0
"""What lasts shorter is not told: a standby takes over in less."""


class ReadinessWatch:
    """Of those among `children` that are services. All were ready when it begins."""

    def __init__(self, children: Mapping[str, object]) -> None:
        self._children = children
        self._lost_s: dict[str, float] = {}
        """Since when each is not ready."""
        self._told: set[str] = set()
        self._starts = {child.name: child.starts for child in services(children)}
        """As often as each had been started when it was ready last."""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        watched = services(self._children)
        ready = await asyncio.gather(*(child.spec.is_ready() for child in watched))
        now_s = time.monotonic()
        lost = []
        for child, is_ready in zip(watched, ready, strict=True):
            if not is_ready:
                self._lost_s.setdefault(child.name, now_s)
                lost.append(child)
                continue
            self._starts[child.name] = child.starts
            since_s = self._lost_s.pop(child.name, now_s)
            if child.name in self._told:
                self._told.discard(child.name)
                get_logger().warning("ready again", child=child.name, after_s=round(now_s - since_s))
        for child in causes(lost):
            if child.name in self._told or now_s - self._lost_s[child.name] < PATIENCE_S:
                continue
            self._told.add(child.name)
            if child.pid is not None and child.starts == self._starts[child.name]:
                # Of one that ended it has been told already.
                get_logger().warning(
                    "not ready any more",
                    child=child.name,
                    because=child.last_words() or "its log does not say why",
                    log=str(child.log_path),
                )


def services(children: Mapping[str, object]) -> list[Child]:
    """Those that say whether they are ready: all but the store."""
    return [child for child in children.values() if isinstance(child, Child)]


def causes(waiting: Sequence[Child]) -> Sequence[Child]:
    """Those to ask for the reason: while the scheduler is not ready, all others wait for it."""
    return [child for child in waiting if child.name == "scheduler"] or waiting
