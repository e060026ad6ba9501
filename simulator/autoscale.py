"""Autoscaling on a bursty trace: by the backlog in seconds that the policy perceives, or by requests.

    python -m simulator.autoscale [--jobs 480] [--seeds 1] [--json FILE]

The real scheduler core with simulated workers that come and go as a HorizontalPodAutoscaler would have it:
every `POLL_S` the wanted number is ceil(metric / threshold); more are asked for at once and work `startup_s`
later (models load); fewer only when `DOWN_WINDOW_S` have wanted no more, one each `DOWN_PERIOD_S`, and a
worker that goes finishes what it holds. A worker costs from when it is asked for until it is gone.

The trace has bursts of short requests and bursts of long ones. That is where the two part: ten short requests
are less work than one long one, and a queue's length does not know it.

FILE gets the figures of all traces and of each, with a hash of the code that decides them. The tests say when
those of bench/results/autoscale.json, which docs/kubernetes.md shows, are of other code.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.records import FinishReason, RequestSpec, RowFinish, StepCosts, StepReport, Worker
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from simulator.code_hash import CORE, ROOT, code_hash, policy_files
from simulator.mixes import WIDE_MIX, make_mix
from simulator.result import percentile
from simulator.workload import Job, Workload

POLICY = "laps-sd"
STEP_S = 0.2
DRAFT_TOKENS = 4
SLOTS = 8
STARTUP_S = 90.0
POLL_S = 10.0
DOWN_WINDOW_S = 300.0
DOWN_PERIOD_S = 60.0
LEAST, MOST = 1, 12
BURST_S = 60.0
_FOREVER_S = 1e12

Metric = Callable[[Scheduler, float, int], float]
"""(core, now, workers) -> how many workers are wanted, not rounded."""


def by_backlog(threshold_s: float, guard_s: float | None = None) -> Metric:
    """`threshold_s` of perceived service for each worker; with `guard_s` as in components/keda the longest
    wait counts too."""

    def wanted(core: Scheduler, now_s: float, workers: int) -> float:
        backlog_s = sum(request.perceived_s for request in core.requests.values())
        if guard_s is None:
            return backlog_s / threshold_s
        waits = [now_s - request.arrival_s for request in core.requests.values() if not request.lease_id]
        return max(backlog_s / threshold_s, workers * max(waits, default=0.0) / guard_s)

    return wanted


def by_requests(threshold: float) -> Metric:
    """`threshold` requests, waiting or running, for each worker."""
    return lambda core, now_s, workers: len(core.requests) / threshold


@dataclass(frozen=True)
class Figures:
    """Latencies are of all requests."""

    mean_latency_s: float
    p99_latency_s: float
    worker_s: float
    """Seconds of workers that were paid for."""
    most_workers: int


@dataclass(frozen=True)
class Outcome:
    """What one scaler came to."""

    scaler: str
    together: Figures
    traces: list[Figures]
    """By seed."""


@dataclass
class _Machine:
    """A worker that was asked for."""

    name: str
    asked_s: float
    joined: bool = False
    leaving: bool = False
    released: list[int] = field(default_factory=list)


def bursty(jobs: int, seed: int, burst_jobs: int = 60, quiet_s: float = 20.0) -> Workload:
    """Half of the jobs come one each `quiet_s`, the others in bursts of `burst_jobs` within `BURST_S`: short
    requests, then long ones, in turn."""
    dice = random.Random(seed)
    quiet = make_mix(WIDE_MIX, jobs // 2, seed, DRAFT_TOKENS, length_error=0.5)
    made: list[Job] = [replace(job, arrival_s=job.arrival_s * quiet_s) for job in quiet]
    span_s = made[-1].arrival_s
    bursts = max(2, jobs // 2 // burst_jobs)
    by_kind = {"short": [t for t in WIDE_MIX if t.name == "translation"],
               "long": [t for t in WIDE_MIX if t.name == "reasoning"]}  # fmt: skip
    for number in range(bursts):
        kind = ("short", "long")[number % 2]
        mix = make_mix(tuple(by_kind[kind]), jobs // 2 // bursts, seed * 100 + number, DRAFT_TOKENS, 0.5)
        begin_s = (number + 0.5) * span_s / bursts
        made += [replace(job, arrival_s=begin_s + dice.uniform(0.0, BURST_S)) for job in mix]
    return tuple(sorted(made, key=lambda job: job.arrival_s))


class Fleet:
    """One run. Every worker steps at the same instants, `STEP_S` apart."""

    def __init__(self, workload: Workload, metric: Metric, startup_s: float = STARTUP_S) -> None:
        settings = SchedulerSettings(
            draft_tokens=DRAFT_TOKENS,
            lease_duration_s=_FOREVER_S,
            session_timeout_s=_FOREVER_S,
            max_queued_requests=len(workload) + 1,
            max_queued_tokens=1 << 62,
            max_retained=0,
            record_interval_s=_FOREVER_S,
        )
        self.core = Scheduler("fleet", make_policy(POLICY), settings)
        self.machines: dict[str, _Machine] = {}
        self.paid_s = 0.0
        self.most = 0
        self._workload = workload
        self._metric = metric
        self._startup_s = startup_s
        self._made = 0
        self._progress = [0] * len(workload)
        self._offset = [0] * len(workload)
        self._wanted: deque[tuple[float, int]] = deque()
        self._down_s = 0.0

    def run(self) -> list[float]:
        """Latencies in seconds, by job."""
        latencies_s: list[float] = []
        arrived, now_s, poll_s = 0, 0.0, 0.0
        self._ask(0.0)
        self.machines["w0"].asked_s = -self._startup_s
        while len(latencies_s) < len(self._workload):
            while arrived < len(self._workload) and self._workload[arrived].arrival_s <= now_s:
                self._submit(arrived)
                arrived += 1
            if now_s >= poll_s:
                poll_s += POLL_S
                self._scale(now_s)
            self._come_and_go(now_s)
            for name in [name for name, machine in self.machines.items() if machine.joined]:
                latencies_s += self._step(self.machines[name], now_s)
            self._tick(now_s)
            now_s += STEP_S
        self.paid_s += sum(now_s - machine.asked_s for machine in self.machines.values())
        return latencies_s

    def _submit(self, index: int) -> None:
        job = self._workload[index]
        spec = RequestSpec(
            request_id=str(index),
            prompt=bytes(4 * job.prompt_tokens),
            max_tokens=1 << 20,
            request_class=job.task,
            predicted_output_tokens=job.predicted_output_tokens,
        )
        self.core.submit(spec, job.arrival_s)

    def _scale(self, now_s: float) -> None:
        staying = [machine for machine in self.machines.values() if not machine.leaving]
        wanted = math.ceil(self._metric(self.core, now_s, len(staying)) - 1e-9)
        wanted = min(max(wanted, LEAST), MOST)
        self._wanted.append((now_s, wanted))
        while self._wanted[0][0] < now_s - DOWN_WINDOW_S:
            self._wanted.popleft()
        for _ in range(wanted - len(staying)):
            self._ask(now_s)
        if len(staying) > max(each for _, each in self._wanted) and now_s >= self._down_s + DOWN_PERIOD_S:
            self._down_s = now_s
            last = staying[-1]
            last.leaving = True
            if last.joined:
                self.core.worker_draining(last.name, now_s)
        self.most = max(self.most, len(self.machines))

    def _ask(self, now_s: float) -> None:
        name = f"w{self._made}"
        self._made += 1
        self.machines[name] = _Machine(name, now_s)

    def _come_and_go(self, now_s: float) -> None:
        for machine in list(self.machines.values()):
            if not machine.joined and not machine.leaving and now_s >= machine.asked_s + self._startup_s:
                machine.joined = True
                costs = StepCosts(0.01, STEP_S - DRAFT_TOKENS * 0.01)
                self.core.worker_joined(Worker(machine.name, SLOTS, costs), [], now_s)
            idle = not machine.joined or not (
                any(self.core.workers[machine.name].running) or machine.released
            )
            if machine.leaving and idle:
                if machine.joined:
                    self.core.worker_left(machine.name, now_s)
                self.paid_s += now_s - machine.asked_s
                del self.machines[machine.name]

    def _step(self, machine: _Machine, now_s: float) -> list[float]:
        """One step of one worker; latencies of the requests that it ended."""
        running = [request for request in self.core.workers[machine.name].running if request is not None]
        if not running and not machine.released:
            self.core.heartbeat(machine.name, now_s)
            return []
        ended: list[float] = []
        emitted, offsets, finishes = [], [], {}
        for row, request in enumerate(running):
            index = int(request.request_id)
            job = self._workload[index]
            emitted.append(job.emitted_per_step[self._progress[index]])
            offsets.append(self._offset[index])
            self._progress[index] += 1
            self._offset[index] += emitted[-1]
            if self._progress[index] == job.steps:
                finishes[row] = RowFinish(FinishReason.STOP)
                ended.append(now_s - job.arrival_s)
        report = StepReport(
            worker_id=machine.name,
            lease_ids=[request.lease_id for request in running],
            offsets=offsets,
            emitted_counts=emitted,
            drafted_counts=[DRAFT_TOKENS] * len(running),
            accepted_counts=[max(count - 1, 0) for count in emitted],
            token_ids=bytes(4 * sum(emitted)),
            finishes=finishes,
            released=machine.released,
            step_s=STEP_S,
        )
        machine.released = []
        self.core.report(report, now_s)
        return ended

    def _tick(self, now_s: float) -> None:
        for revoke in self.core.tick(now_s).revokes:
            if revoke.lease_id and revoke.worker_id in self.machines:
                self.machines[revoke.worker_id].released.append(revoke.lease_id)


SCALERS: dict[str, Metric] = {
    **{f"backlog {seconds} s": by_backlog(seconds) for seconds in (120, 240, 480)},
    "backlog 240 s, guard 60 s": by_backlog(240, 60.0),
    **{f"requests {count}": by_requests(count) for count in (2, 4, 8, 16)},
}


SHORT_JOBS, SHORT_SCALER = 120, "backlog 120 s"
"""A run short enough to be repeated by a test: it tells what changed in code that is not in the hash."""


def code() -> str:
    """A hash of the code that decides the figures. Drivers and records of the core are not in it: they change
    often without another outcome, and the short run tells when there is one."""
    ours = (ROOT / "simulator" / f"{name}.py" for name in ("autoscale", "mixes", "workload", "result"))
    return code_hash([*policy_files(POLICY), *ours, CORE / "placement.py"])


def compare(jobs: int, seeds: int, scalers: dict[str, Metric] = SCALERS) -> list[Outcome]:
    """Each scaler on the same traces."""
    outcomes = []
    for name, metric in scalers.items():
        latencies_s: list[float] = []
        traces = []
        for seed in range(seeds):
            fleet = Fleet(bursty(jobs, seed), metric)
            of_trace_s = fleet.run()
            traces.append(_figures(of_trace_s, fleet.paid_s, fleet.most))
            latencies_s += of_trace_s
        paid_s, most = sum(each.worker_s for each in traces), max(each.most_workers for each in traces)
        outcomes.append(Outcome(name, _figures(latencies_s, paid_s, most), traces))
    return outcomes


def short_run() -> Figures:
    return compare(SHORT_JOBS, 1, {SHORT_SCALER: SCALERS[SHORT_SCALER]})[0].together


def _figures(latencies_s: list[float], paid_s: float, most: int) -> Figures:
    ordered = sorted(latencies_s)
    mean_s = sum(ordered) / len(ordered)
    return Figures(round(mean_s, 4), round(percentile(ordered, 0.99), 4), round(paid_s, 1), most)


def table(outcomes: list[Outcome]) -> str:
    """Markdown, as in docs/kubernetes.md."""
    lines = [
        "| scales by, for each worker | mean latency s | p99 s | worker-hours | most workers |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in outcomes:
        its = each.together
        figures = f"{its.mean_latency_s:.1f} | {its.p99_latency_s:.1f} | {its.worker_s / 3600:.2f}"
        lines.append(f"| {each.scaler} | {figures} | {its.most_workers} |")
    return "\n".join(lines)


def load(path: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """What main() wrote: the entries about the run, and the outcomes."""
    about = json.loads(path.read_text(encoding="utf-8"))
    outcomes = [
        Outcome(each["scaler"], Figures(**each["together"]), [Figures(**trace) for trace in each["traces"]])
        for each in about.pop("scalers")
    ]
    return about, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=480)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    # Of the code that runs: the files may be edited meanwhile.
    about = {"jobs": given.jobs, "seeds": given.seeds, "code": code()}
    outcomes = compare(given.jobs, given.seeds)
    print(table(outcomes))
    if given.json:
        written = {
            **about,
            "short_run": asdict(short_run()),
            "scalers": [asdict(each) for each in outcomes],
        }
        given.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
