"""What goes wrong, and when: faults at random instants while the seed's time of trouble lasts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from laps.history import HistoryPoint
from simulator.faults.clock import Process
from simulator.faults.store_model import Keys

if TYPE_CHECKING:
    from scheduler_svc.leader import Leader
    from simulator.faults.nodes import Node
    from simulator.faults.world import World

KEEPALIVE_S = (5.0, 10.0)
"""Between these many seconds of silence gRPC gives a connection up: an interval and a time to answer."""


class Chaos:
    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = random.Random(f"{world.knobs.seed} chaos")
        self._snapshot: Keys | None = None
        self._snapshot_seq = 0
        self._over = False
        self._stopping: set[Process] = set()

    def begin(self) -> None:
        world = self._world
        if world.knobs.ending == "rollback":
            world.loop.at(None, world.knobs.faults_s * self._rng.uniform(0.1, 0.5), self._take_snapshot)
        if world.knobs.kinds:
            self._plan_next()

    def _plan_next(self) -> None:
        loop = self._world.loop
        in_s = self._rng.expovariate(1.0 / self._world.knobs.fault_interval_s)
        if loop.now_s + in_s < self._world.knobs.faults_s:
            loop.at(None, loop.now_s + in_s, self._strike)

    def _strike(self) -> None:
        if self._over:
            return
        kind = self._rng.choice(self._world.knobs.kinds)
        if self._do(kind):
            self._world.history.counts.fault(kind)
        self._plan_next()

    # --- Faults -----------------------------------------------------------------------------------

    def _do(self, kind: str) -> bool:
        """Whether it could be done."""
        world, rng = self._world, self._rng
        verb, _, what = kind.partition(" ")
        if verb == "store" and what in ("down", "hangs"):
            for_s = rng.choice((0.05, 0.3, 1.0, 6.0)) * rng.uniform(0.5, 1.5)
            world.trace("store", f"{what} for {for_s:.3f} s")
            world.server.down(for_s, hangs=what == "hangs")
            return True
        if kind == "store full":
            for_s = rng.choice((0.1, 2.0)) * rng.random()
            world.trace("store", f"is full for {for_s:.3f} s")
            world.server.full_until_s = world.loop.now_s + for_s
            return True
        if kind == "store clock jumps":
            world.server.clock_offset_s += rng.uniform(-1.0, 1.0) * world.knobs.clock_skew_s
            return True
        of_kind = [node for node in world.nodes if node.kind == what] or world.nodes
        alive = [node for node in of_kind if node.process.alive and not node.process.frozen]
        if not alive:
            return False
        node = rng.choice(alive)
        if verb == "crash":
            world.crash(node)
            world.loop.at(None, world.loop.now_s + rng.choice((0.02, 0.2, 1.5)), world.restart, node)
        elif verb == "stop":
            world.trace(node.name, "is stopped")
            self._stopping.add(node.process)
            world.loop.spawn(node.process, node.stop(), f"{node.name} stop")
            world.loop.at(
                None, world.loop.now_s + rng.choice((0.5, 4.0)), self._stop_hard, node, node.process
            )
        elif verb == "freeze":
            self._freeze(node)
        elif kind == "clock jumps":
            node.process.wall_offset_s += rng.uniform(-1.0, 1.0) * world.knobs.clock_skew_s
            world.trace(node.name, f"clock is {node.process.wall_offset_s:+.3f} s off")
        else:
            others = [other for other in world.nodes if other.kind != node.kind and other.process.alive]
            if not others:
                return False
            self._break(kind, node, rng.choice(others))
        return True

    def _stop_hard(self, node: Node, process: Process) -> None:
        if node.process is process and not self._world.history.lossy:
            self._world.crash(node)
            self._world.restart(node)

    def _freeze(self, node: Node) -> None:
        world, rng = self._world, self._rng
        for_s = rng.choice((0.1, 1.0, 4.0, 12.0)) * rng.uniform(0.5, 1.5)
        world.trace(node.name, f"FREEZES for {for_s:.3f} s")
        process, since_s = node.process, world.loop.now_s
        world.loop.freeze(process)
        world.loop.at(None, since_s + for_s, self._thaw, node, process)
        world.loop.at(None, since_s + rng.uniform(*KEEPALIVE_S), self._give_up, process, since_s)

    def _thaw(self, node: Node, process: Process) -> None:
        if process.frozen:
            self._world.trace(node.name, "wakes")
            self._world.loop.thaw(process)

    def _give_up(self, process: Process, since_s: float) -> None:
        if process.frozen and process.frozen_s == since_s:
            self._world.network.break_links(process, None, lambda: 0.0)

    def _break(self, kind: str, node: Node, other: Node) -> None:
        world, rng = self._world, self._rng
        if kind == "break links":
            world.network.break_links(
                node.process, other.process, lambda: rng.choice((0.001, 0.3)) * rng.random()
            )
            world.trace(node.name, f"loses its connections to {other.name}")
            return
        until_s = world.loop.now_s + rng.choice((0.2, 2.0, 12.0)) * rng.uniform(0.5, 1.5)
        world.network.cut(node.process, other.process, until_s)
        world.trace(node.name, f"is cut off from {other.name} until {until_s:.3f}")
        silent_s = rng.uniform(*KEEPALIVE_S)
        if world.loop.now_s + silent_s < until_s:
            late_s = world.loop.now_s + silent_s
            world.loop.at(
                None,
                late_s,
                world.network.break_links,
                node.process,
                other.process,
                lambda: rng.uniform(0.0, 1.0),
            )

    def lose(self, process: Process) -> None:
        """A process is gone: its peers hear it from their kernel, or from their keepalive."""
        late = self._rng.random() < 0.3 and not self._over
        late_s = self._rng.uniform(*KEEPALIVE_S) if late else 0.0
        self._world.network.break_links(process, None, lambda: late_s + self._rng.uniform(0.0002, 0.005))

    # --- The end of trouble --------------------------------------------------------------------------

    def heal(self) -> None:
        """From here on nothing goes wrong any more."""
        world = self._world
        self._over = True
        world.trace("chaos", "is over")
        world.network.heal()
        server = world.server
        server.lost_share = server.fails_after_share = server.late_share = server.detour_share = 0.0
        server.down_until_s = server.full_until_s = 0.0
        for node in world.nodes:
            if node.process.frozen:
                self._thaw(node, node.process)
            world.restart(node)

    def _take_snapshot(self) -> None:
        self._snapshot = self._world.server.copy()
        self._snapshot_seq = self._world.history.seq

    def spoil_store(self) -> bool:
        """The store loses something that it had acknowledged; False where it has nothing to lose."""
        world, keys = self._world, self._world.server.model.keys
        leads = [
            node
            for node in world.schedulers
            if node.process.alive and not node.process.frozen and node.terms.leader is not None
        ]
        if not leads or not world.server.answers:
            return False
        leader = leads[0].terms.leader
        assert leader is not None
        if world.knobs.ending == "rollback":
            dying = {"": [], "leader": leads, "schedulers": world.schedulers}[world.knobs.at_once]
            if self._snapshot is None or not self._is_remembered(dying):
                return False
            world.trace("store", f"COMES BACK OLDER: commit {self._snapshot_seq} is its last")
            world.server.come_back_as(self._snapshot)
            world.history.rolled_back = True
            world.history.adopt(self._snapshot)
            for node in dying:
                world.crash(node)
            return True
        if not self._still_leads(leader):
            return False
        running = [name for name in keys.leases if keys.tokens.get(name) and name in leader.core.requests]
        if not running:
            return False
        request_id = self._rng.choice(running)
        log = keys.tokens[request_id]
        log.pop()
        tokens = log[-1].offset + len(log[-1].tokens.split()) if log else 0
        keys.request[request_id] |= {"log_entries": str(len(log)), "output_tokens": str(tokens)}
        world.trace("store", f"LOSES the last entry of the log of {request_id}")
        world.history.damaged.add(request_id)
        return True

    def _still_leads(self, leader: Leader) -> bool:
        """Whether it commits again before anybody can succeed it: only it knows how long each log was."""
        world = self._world
        model = world.server.model
        stored_epoch = int(model.keys.leader.get("epoch", "0"))
        return stored_epoch == leader.epoch and model.claim_left_s() > world.knobs.leader_ttl_s / 2

    def _is_remembered(self, dying: Sequence[Node]) -> bool:
        """Whether somebody who lives on has seen more than what was put aside."""
        assert self._snapshot is not None
        stored = HistoryPoint(
            int(self._snapshot.meta.get("timeline", "1")),
            int(self._snapshot.leader.get("epoch", "0")),
            self._snapshot_seq + self._rng.choice((0, 5, 20)),
        )
        return any(
            stored < node.seen
            for node in self._world.nodes
            if node.process.alive and node not in dying and node.process not in self._stopping
        )

    def must_alarm(self) -> bool:
        """A damaged log is noticed when it goes on; its request may end before that."""
        damaged = self._world.history.damaged
        return self._world.history.rolled_back or any(
            not self._world.history.lives[name].ended for name in damaged
        )
