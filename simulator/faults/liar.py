"""A worker that sometimes says what is not so.

Beside its honest reports it sends false ones, each of a kind that a scheduler can tell: those are refused or
ignored, and only requests that it lied about may suffer. What it does not do is invent plausible
tokens, which nobody but another worker could tell from the model's.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from laps.v1 import generation_pb2, worker_pb2
from simulator.faults.model import VOCABULARY
from worker_svc.reports import Report

if TYPE_CHECKING:
    from simulator.faults.world import World

LIE_SHARE = 0.04
"""Of its reports, those that a false one follows."""
LIES = (
    "counts that do not fit",
    "impossible counts",
    "a gap",
    "a rewrite",
    "a token outside the vocabulary",
    "leases of others",
    "a report again",
    "an impossible time",
)
REFUSED = LIES[:5]
"""Lies about a lease that it holds: what the scheduler answers by taking the request away."""


@dataclass(slots=True)
class FalseReport(Report):
    """Goes out as `message` says, when the honest one of `result` would."""

    message: worker_pb2.StepReport = field(default_factory=worker_pb2.StepReport)

    def to_proto(self) -> worker_pb2.StepReport:
        return self.message


class Liar:
    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._rng = random.Random(f"{world.knobs.seed} {name} lies")

    def lie(self, report: Report) -> FalseReport | None:
        """What follows an honest report; None: nothing. It has the step of the honest one once more."""
        honest = report.to_proto()
        world, rng = self._world, self._rng
        if world.loop.now_s > world.knobs.faults_s or rng.random() >= LIE_SHARE:
            return None
        kind = rng.choice(LIES)
        # Rows that ended a request are of no lease any more.
        ended = {finish.row for finish in honest.finishes}
        rows = [row for row in range(len(honest.lease_ids)) if row not in ended]
        if kind in REFUSED and not rows:
            return None
        false = worker_pb2.StepReport(epoch=honest.epoch, step=honest.step)
        if kind == "a report again":
            false.CopyFrom(honest)
        elif kind == "an impossible time":
            false.timings.step_s = rng.choice((math.nan, -1.0, math.inf))
        elif kind == "leases of others":
            self._of_others(false)
        else:
            row = rng.choice(rows)
            lease_id = honest.lease_ids[row]
            self._about(false, kind, lease_id, honest.offsets[row] + honest.emitted_counts[row])
            for node in world.schedulers:
                if node.terms.leader is not None and node.process.alive:
                    request = node.terms.leader.core._board.leases.get(lease_id)
                    if request is not None:
                        world.history.lied_about[request.request_id] += 1
        world.trace(self._name, f"LIES: {kind}")
        world.history.counts.lie(kind)
        return FalseReport(report.epoch, report.step, report.result, message=false)

    def _about(self, false: worker_pb2.StepReport, kind: str, lease_id: int, next_offset: int) -> None:
        """A row of a lease that it holds."""
        columns = {"offset": next_offset, "emitted": 1, "drafted": 0, "accepted": 0}
        tokens = [1]
        if kind == "counts that do not fit":
            columns["emitted"] = self._rng.choice((0, 2, 1 << 20))
        elif kind == "impossible counts":
            columns["accepted"] = 3
        elif kind == "a gap":
            columns["offset"] += self._rng.choice((1, 100))
        elif kind == "a rewrite":
            columns["offset"], tokens = 0, [VOCABULARY - 1, VOCABULARY - 1]
            columns["emitted"], columns["drafted"], columns["accepted"] = 2, 1, 1
        else:
            tokens = [self._rng.choice((VOCABULARY, 0xFFFFFFFF))]
        false.lease_ids.append(lease_id)
        false.offsets.append(columns["offset"])
        false.emitted_counts.append(columns["emitted"])
        false.drafted_counts.append(columns["drafted"])
        false.accepted_counts.append(columns["accepted"])
        false.token_ids = array("I", tokens).tobytes()

    def _of_others(self, false: worker_pb2.StepReport) -> None:
        """All that can be said of leases, about those that other workers hold."""
        for node in self._world.schedulers:
            leader = node.terms.leader
            if leader is None or not node.process.alive:
                continue
            for lease_id, request in sorted(leader.core._board.leases.items()):
                if request.worker_id == self._name or lease_id in false.lease_ids:
                    continue
                false.finishes.add(row=len(false.lease_ids), reason=generation_pb2.FINISH_REASON_STOP)
                false.lease_ids.append(lease_id)
                false.offsets.append(request.output_tokens)
                false.emitted_counts.append(1)
                false.drafted_counts.append(0)
                false.accepted_counts.append(0)
                false.token_ids += array("I", [7]).tobytes()
                false.released_lease_ids.append(lease_id)
                false.missing_lease_ids.append(lease_id)
                false.errors.add(lease_id=lease_id, message="a lie")
                false.evicted_request_ids.append(request.request_id)
