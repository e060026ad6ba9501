"""One seed's world: who is in it, what runs, and what must be true when all is over."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler_svc.store.errors import Alarm
from simulator.faults.chaos import Chaos
from simulator.faults.clients import Client
from simulator.faults.clock import Process, VirtualLoop
from simulator.faults.endings import check_end, read_again, unrest
from simulator.faults.handlers import Serve
from simulator.faults.history import Counts, History, Violation
from simulator.faults.knobs import Knobs, knobs_of
from simulator.faults.network import Network
from simulator.faults.nodes import SCHEDULER, GatewayNode, Node, SchedulerNode, WorkerNode
from simulator.faults.parts import Parts
from simulator.faults.stage import installed
from simulator.faults.store_server import StoreServer
from simulator.faults.wire import Exchange, ServerContext

DRAIN_S = 180.0
"""Virtual seconds without faults in which everything must come to its end."""
REST_S = 40.0
"""Virtual seconds in which connections must be back and bookkeeping empty."""
STOPPED_S = 5.0
"""Virtual seconds that a stopped pool is watched, before and after everything is started anew."""
ALARM_S = 30.0
"""Virtual seconds in which a store that has lost something must be noticed."""
MAX_EVENTS = 3_000_000


@dataclass
class Outcome:
    """What a seed came to. `violation` is empty where nothing went wrong."""

    seed: int
    violation: str
    counts: Counts
    virtual_s: float
    knobs: Knobs
    lines: list[str] = field(default_factory=list)


class World:
    def __init__(self, knobs: Knobs, parts: Parts, traced: bool) -> None:
        self.knobs = knobs
        self.parts = parts
        self.traced = traced
        self.lines: list[str] = []
        self.loop = VirtualLoop()  # type: ignore[abstract]
        self.history = History(self.loop.time, self.trace)
        self.network = Network(self.loop, knobs.seed)
        self.network.mean_latency_s = knobs.latency_s
        self.network.slow_share = knobs.slow_share
        self.network.window_messages = knobs.window_messages
        self.network.resolve = self._resolve
        self.server = StoreServer(self.loop, self.history, knobs.seed, parts.store_checks)
        self.server.mean_latency_s = knobs.store_latency_s
        self.server.lost_share = knobs.store_lost_share
        self.server.fails_after_share = knobs.store_fails_after_share
        self.server.late_share = knobs.store_late_share
        self.server.detour_share = knobs.store_detour_share
        self.schedulers = [SchedulerNode(self, f"scheduler-{n}") for n in range(knobs.schedulers)]
        self.workers = [WorkerNode(self, n) for n in range(knobs.workers)]
        self.gateways = [GatewayNode(self, f"gateway-{n}") for n in range(knobs.gateways)]
        self.clients = [
            Client(self, n, random.Random(f"{knobs.seed} client {n}")) for n in range(knobs.clients)
        ]
        twins = random.Random(f"{knobs.seed} twins")
        for client in list(self.clients):
            if client.request.request_id and twins.random() < 0.15:
                number = len(self.clients)
                self.clients.append(
                    Client(self, number, random.Random(f"{knobs.seed} client {number}"), client)
                )
        self.chaos = Chaos(self)
        self._looked_s = 0.0

    @property
    def nodes(self) -> list[Node]:
        return [*self.schedulers, *self.workers, *self.gateways]

    def trace(self, who: str, what: str) -> None:
        if self.traced:
            self.lines.append(f"{self.loop.now_s:12.6f}  {who:<12} {what}")

    # --- Who serves what --------------------------------------------------------------------------

    def _resolve(self, address: str, rng: random.Random) -> tuple[Process, Serve] | None:
        nodes: list[Node] = list(self.schedulers if address == SCHEDULER else self.gateways)
        alive = [node for node in nodes if node.process.alive]
        if address == SCHEDULER and rng.random() < 0.9:
            # Traffic goes to whoever says that it leads; it may be one that has been succeeded since.
            leading = [
                node for node in self.schedulers if node.process.alive and node.terms.leader is not None
            ]
            alive = list(leading) or alive
        if not alive:
            return None
        node = rng.choice(alive)

        async def serve(exchange: Exchange, context: ServerContext) -> None:
            await node.serves[exchange.path](exchange, context)

        return node.process, serve

    # --- What happens to nodes ----------------------------------------------------------------------

    def crash(self, node: Node) -> None:
        if node.process.alive:
            self.trace(node.name, "CRASHES")
            self.loop.crash(node.process)
            self.chaos.lose(node.process)

    def restart(self, node: Node) -> None:
        if not node.process.alive:
            self.trace(node.name, "starts")
            node.start()

    def alarmed(self, node: Node, alarm: Alarm) -> None:
        self.history.counts.alarms += 1
        self.trace(node.name, f"ALARM: the pool stops: {alarm}")
        assert isinstance(node, SchedulerNode)
        node.alarm = str(alarm)
        self.history.require(self.history.lossy, f"alarm without a cause: {alarm}")

    # --- Running --------------------------------------------------------------------------------------

    def run(self) -> None:
        """Plays the seed. Raises Violation."""
        for node in self.nodes:
            node.start()
        for client in self.clients:
            client.start()
        self.chaos.begin()
        spoilt = self._trouble()
        self.chaos.heal()
        if spoilt:
            self._until(lambda: any(node.alarm for node in self.schedulers), ALARM_S)
            if any(node.alarm for node in self.schedulers):
                self._stay_stopped()
                self._resume()
                return
            self.history.require(
                not self.chaos.must_alarm(), "the store has lost something and nobody noticed"
            )
        self._until(self._drained, DRAIN_S)
        if not self._drained():
            self.history.violated(f"did not come to an end in {DRAIN_S:g} s: {self._undone()}")
        readers = read_again(self)
        self._until(lambda: all(reader.done() for reader in readers), DRAIN_S)
        self._until(self._at_rest, REST_S)
        check_end(self, readers)

    def _stay_stopped(self) -> None:
        """After an alarm nobody leads or writes, whoever is started anew."""
        counts = self.history.counts
        self._until(lambda: bool(self.server.model.keys.stopped), ALARM_S)
        self.history.require(bool(self.server.model.keys.stopped), "an alarm left no mark in the store")
        before = counts.commits, counts.terms
        self._until(lambda: False, STOPPED_S)
        for node in self.nodes:
            self.crash(node)
            self.restart(node)
        self._until(lambda: False, STOPPED_S)
        self.history.require((counts.commits, counts.terms) == before, "a stopped pool has gone on")

    def _resume(self) -> None:
        """An operator accepts what is left; the pool serves that to its end."""
        keys = self.server.model.keys
        self.history.rolled_back = True
        self.server.execute("laps_resume", ("operator",))
        self.history.adopt(keys)
        self.trace("store", f"is accepted as it is: timeline {keys.meta['timeline']}")
        self._until(self._drained, DRAIN_S)
        if not self._drained():
            self.history.violated(f"after its resumption the pool did not come to an end: {self._undone()}")
        self.history.require(keys.meta["timeline"] == "2", "resumed, and in the timeline of before")

    def _trouble(self) -> bool:
        """The time of faults. Whether it ended early, with a store that has lost something."""
        faults_s = self.knobs.faults_s
        if self.knobs.ending:
            self._until(lambda: False, faults_s * 0.3)
            while self.loop.now_s < faults_s:
                if self.chaos.spoil_store():
                    return True
                self._until(lambda: False, 0.1)
        self._until(lambda: False, max(0.0, faults_s - self.loop.now_s))
        return False

    def _until(self, done: Callable[[], bool], for_s: float) -> None:
        """Runs until `done` or for so long."""
        loop, history, until_s = self.loop, self.history, self.loop.now_s + for_s
        commits, checked_s = -1, loop.now_s
        while not done():
            due_s = loop.next_s()
            if due_s is None or due_s > until_s:
                loop.now_s = max(loop.now_s, until_s)
                return
            loop.run_one()
            if history.violation:
                raise Violation(history.violation)
            if loop.errors:
                history.violated(loop.errors[0])
            if history.counts.commits != commits or loop.now_s > checked_s + 0.05:
                commits, checked_s = history.counts.commits, loop.now_s
                self._check_cores()
            if loop.events > MAX_EVENTS:
                history.violated(f"{MAX_EVENTS} events and no end")

    def _check_cores(self) -> None:
        for node in self.schedulers:
            leader = node.terms.leader
            if leader is None or not node.process.alive:
                continue
            core, settings = leader.core, self.knobs.core
            try:
                core.check_invariants()
            except AssertionError as error:
                self.history.violated(f"{node.name}: {error}")
            waiting = core.waiting_requests
            # Those that were running come back to the queue without asking for room.
            most = settings.max_queued_requests + self.knobs.workers * self.knobs.slots * 2
            self.history.require(waiting <= most or core.epoch > 1, f"{waiting} requests wait, {most} may")
        for worker in self.workers:
            self.history.require(
                worker.driver.held_leases <= self.knobs.slots, f"{worker.name} runs more than its slots"
            )

    def _at_rest(self) -> bool:
        """Looked at four times a second."""
        if self.loop.now_s < self._looked_s + 0.25:
            return False
        self._looked_s = self.loop.now_s
        return not unrest(self)

    def _drained(self) -> bool:
        # Asked after every event: what fails most often comes first.
        return not self.server.model.keys.live and all(c.outcome for c in self.clients)

    def _undone(self) -> str:
        waiting = [c.name for c in self.clients if not c.outcome]
        live = sorted(self.server.model.keys.live)
        return f"clients {', '.join(waiting) or 'none'}; live requests {', '.join(live) or 'none'}"


def play(seed: int, *, parts: Parts | None = None, traced: bool = False) -> Outcome:
    """Runs one seed in a world of its own; the same seed always does the same."""
    world = World(knobs_of(seed), parts or Parts(), traced)
    violation = ""
    # What the collector ends, it ends at an instant that no seed decides.
    collecting = gc.isenabled()
    gc.disable()
    asyncio._set_running_loop(world.loop)
    try:
        with installed(world):
            try:
                world.run()
            except Violation as found:
                violation = str(found)
                world.trace("checker", f"VIOLATION: {violation}")
            world.traced = False
            world.network.closed = True
            world.loop.bury()
    finally:
        asyncio._set_running_loop(None)
        if collecting:
            gc.enable()
    counts = world.history.counts
    counts.events = world.loop.events
    return Outcome(seed, violation, counts, world.loop.now_s, world.knobs, world.lines)
