"""CPU of one worker-step in the scheduler's own code: no gRPC, no Redis, no clock. About 40 seconds.

    python bench/core.py [--policy laps-sd] [--workers 20] [--reports-per-tick 3] [--steps 2000] [--json OUT]

    python bench/core.py --compare-compiled [--rounds 5]     # after `make compiled`: both in turns

Parsing, deciding, packing the commit, and the gateways' message; by length of the queue, the lengths in turn.
Of another working tree: `PYTHONPATH=FOLDER python bench/core.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from laps.v1 import worker_pb2
from scheduler_svc import compiled, convert
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.records import RequestSpec, StepCosts, Worker
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.deliveries import DeliveryHub, Follower
from scheduler_svc.store.packing import CommitPacker

SLOTS, EMITTED, DRAFTED = 64, 3, 4
STEPS_PER_S = 600.0
QUEUES = (1_000, 100_000)
TOKEN = struct.pack("<I", 1234)
STARTED_S = 1000.0


class Bed:
    """A scheduler full of requests, and workers that step in turn."""

    def __init__(self, policy: str, workers: int, queued: int) -> None:
        settings = SchedulerSettings(max_queued_requests=1 << 30, max_queued_tokens=1 << 40)
        self.core = Scheduler("bench", make_policy(policy), settings)
        self.cpu_s = dict.fromkeys(("report", "tick", "pack", "publish"), 0.0)
        self.now_s = STARTED_S
        self._packer, self._hub, self._follower = CommitPacker(1, 0), DeliveryHub(5.0), Follower()
        self._chance = random.Random(0)
        self._submitted = 0
        self._leases: dict[str, dict[str, list[int]]] = {f"w{n}": {} for n in range(workers)}
        """By worker and request: lease, output tokens, max_tokens."""
        self._released: dict[str, list[int]] = {name: [] for name in self._leases}
        for name in self._leases:
            costs = StepCosts(0.002, 0.025, 0.0001, 0.001)
            worker = Worker(name, SLOTS, costs, vocabulary_size=32_000, context_tokens=1 << 20)
            worker.last_seen_s = self.now_s
            self.core.worker_joined(worker, [], self.now_s)
        for _ in range(workers * SLOTS + queued):
            self._submit()
        self.tick([])
        gc.collect()
        gc.freeze()
        self._order = list(self._leases)

    def run(self, steps: int, reports_per_tick: int) -> float:
        """Microseconds of CPU per step."""
        self.cpu_s = dict.fromkeys(self.cpu_s, 0.0)
        for _ in range(steps // reports_per_tick):
            names, self._order = self._order[:reports_per_tick], self._order[reports_per_tick:]
            self._order += names
            self.now_s += reports_per_tick / STEPS_PER_S
            self.tick([(name, self._step(name)) for name in names])
        return sum(self.cpu_s.values()) / (steps // reports_per_tick * reports_per_tick) * 1e6

    def tick(self, reports: list[tuple[str, bytes]]) -> None:
        at = time.process_time
        began_s = at()
        for name, data in reports:
            message = worker_pb2.SessionRequest.FromString(data)
            self.core.report(convert.step_report(name, message.report), self.now_s)
        reported_s = at()
        tick = self.core.tick(self.now_s)
        ticked_s = at()
        if tick.commit:
            self._packer.pack(tick.commit, self.now_s)
        packed_s = at()
        self._hub.published(tick.commit.emitted)
        self._hub.finished(tick.commit.finished)
        for request in tick.commit.submitted:
            self._hub.follow(self._follower, request, 0, 0)
        if reports:
            _now(self._follower.next_message()).SerializeToString()
        spent = (reported_s - began_s, ticked_s - reported_s, packed_s - ticked_s, at() - packed_s)
        for part, spent_s in zip(self.cpu_s, spent, strict=True):
            self.cpu_s[part] += spent_s
        for revoke in tick.revokes:
            self._leases[revoke.worker_id].pop(revoke.request_id, None)
            if revoke.lease_id:
                self._released[revoke.worker_id].append(revoke.lease_id)
        for grant in tick.grants:
            request = grant.request
            lease = [grant.lease_id, request.output_tokens, request.spec.max_tokens]
            self._leases[grant.worker_id][request.request_id] = lease
        for _ in tick.commit.finished:
            self._submit()

    def _submit(self) -> None:
        self._submitted += 1
        most = EMITTED * self._chance.randint(85, 600)
        self.core.submit(
            RequestSpec(f"bench-{self._submitted:08d}", TOKEN * 128, most, digest="00" * 32), self.now_s
        )

    def _step(self, name: str) -> bytes:
        leases, released = self._leases[name], self._released[name]
        rows = len(leases)
        report = worker_pb2.StepReport(
            step=1,
            lease_ids=[lease[0] for lease in leases.values()],
            offsets=[lease[1] for lease in leases.values()],
            emitted_counts=[EMITTED] * rows,
            drafted_counts=[DRAFTED] * rows,
            accepted_counts=[EMITTED - 1] * rows,
            token_ids=TOKEN * (EMITTED * rows),
            released_lease_ids=released,
            timings=worker_pb2.StepTimings(step_s=1 / 30, costs=worker_pb2.StepCosts(verify_s=0.033)),
        )
        released.clear()
        for lease in leases.values():
            lease[1] += EMITTED
        ended = [request_id for request_id, lease in leases.items() if lease[1] >= lease[2]]
        for request_id in ended:
            del leases[request_id]
        return worker_pb2.SessionRequest(report=report).SerializeToString()


def _now(coroutine):  # type: ignore[no-untyped-def]
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


def compare(rounds: int) -> dict[str, Any]:
    """Plain Python and the compiled build in turns, each in a process of its own: CPU of a worker-step, and
    what the plain one takes over the compiled one, by part; medians of the rounds."""
    ratios: dict[str, list[float]] = {}
    us_per_step: dict[str, list[float]] = {"plain": [], "compiled": []}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        for _ in range(rounds):
            found = []
            for name, variable in (("plain", "0"), ("compiled", "1")):
                command = [sys.executable, __file__, "--queues", "1000", "--json", str(out)]
                environment = os.environ | {compiled.VARIABLE: variable}
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                result = json.loads(out.read_text())
                found.append({"all": result["us_per_step"]["1000"]} | result["parts_us"]["1000"])
                us_per_step[name].append(found[-1]["all"])
            for part, plain_us in found[0].items():
                ratios.setdefault(part, []).append(plain_us / found[1][part])
    for part, values in ratios.items():
        print(f"{part}: {statistics.median(values):.2f} times ({min(values):.2f} to {max(values):.2f})")
    return {
        "us_per_step": {name: statistics.median(values) for name, values in us_per_step.items()},
        "plain_over_compiled": {part: statistics.median(values) for part, values in ratios.items()},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="laps-sd")
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--reports-per-tick", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="of each of three rounds")
    parser.add_argument("--queues", type=int, nargs="+", default=QUEUES, help="waiting requests")
    parser.add_argument(
        "--compare-compiled", action="store_true", help="plain Python over the compiled build"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.compare_compiled:
        compared = compare(arguments.rounds)
        if arguments.json:
            arguments.json.write_text(json.dumps(compared, indent=1) + "\n")
        return
    print(compiled.running().why)
    beds = {queued: Bed(arguments.policy, arguments.workers, queued) for queued in arguments.queues}
    best: dict[int, float] = {}
    parts: dict[int, dict[str, float]] = {}
    for _ in range(3):
        for queued, bed in beds.items():
            us_per_step = bed.run(arguments.steps, arguments.reports_per_tick)
            if us_per_step < best.get(queued, float("inf")):
                best[queued] = us_per_step
                parts[queued] = {n: round(s / arguments.steps * 1e6, 1) for n, s in bed.cpu_s.items()}
    for queued, us_per_step in best.items():
        print(f"{queued} waiting: {us_per_step:.0f} us per worker-step of {SLOTS} slots, {parts[queued]}")
    if len(best) > 1:
        print(f"ratio {best[max(best)] / best[min(best)]:.3f}")
    if arguments.json:
        result = {"us_per_step": best, "parts_us": parts}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    from _processes import end_on_sigterm

    end_on_sigterm()
    main()
