"""Replays a workload through the real scheduler core with one simulated worker.

The replay model: a step takes `draft_tokens * draft_ms + verify_ms`, plus `switch_ms` for each request that
re-enters a slot (its first entry is free); in a step every running request emits its next recorded
count. Decisions fall on step boundaries; an idle worker's next step starts at the next arrival.
Latency is finish minus arrival.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler_svc.core.policies import Policy, make_policy, policies
from scheduler_svc.core.records import (
    FinishReason,
    Grant,
    RequestSpec,
    RowFinish,
    StepCosts,
    StepReport,
    Tick,
    Worker,
)
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from simulator.workload import Job, Workload, rescale, with_length_error

LEAST_MAX_TOKENS = 4096
"""Every request allows so many tokens, or more than the longest of the workload: no policy can tell
a length from it."""

_WORKER = "simulated"
_FOREVER_S = 1e12

Progress = Callable[[int], None]
"""Called with the number of requests that have finished."""


@dataclass(frozen=True, slots=True)
class Stay:
    """A request's stay in a slot, for pictures."""

    slot: int
    job: int
    """Position in the workload."""
    begin_s: float
    end_s: float
    preempted_because: str
    """Empty: it ended."""


@dataclass(slots=True)
class Result:
    """What a replay measured. Latencies by job, in the order of the workload; seconds."""

    policy: str
    latencies_s: list[float]
    slowdowns: list[float]
    """Latency over the seconds that the request's own steps take."""
    switches: int
    """Returns to a slot after a preemption."""
    makespan_s: float
    """From the first arrival to the last finish."""
    steps: int
    """Steps of the worker."""
    stays: list[Stay] = field(default_factory=list)
    first_waits_s: list[float] = field(default_factory=list)
    """Seconds from arrival to the first slot."""

    @property
    def mean_latency_s(self) -> float:
        return sum(self.latencies_s) / len(self.latencies_s)

    def summary(self) -> dict[str, float | int]:
        """What the JSON of `laps simulate` holds for a policy."""
        ordered = sorted(self.latencies_s)
        return {
            "mean_latency_s": self.mean_latency_s,
            "p50_latency_s": percentile(ordered, 0.50),
            "p90_latency_s": percentile(ordered, 0.90),
            "p99_latency_s": percentile(ordered, 0.99),
            "max_latency_s": ordered[-1],
            "mean_slowdown": sum(self.slowdowns) / len(self.slowdowns),
            "max_slowdown": max(self.slowdowns),
            "switches": self.switches,
            "makespan_s": self.makespan_s,
        }


def percentile(ordered: list[float], share: float) -> float:
    """With linear interpolation between neighbours. `ordered` ascends and is not empty."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def simulate(
    workload: Workload,
    policy_name: str,
    slots: int = 8,
    load: float | None = 0.9,
    draft_tokens: int = 4,
    draft_ms: float = 2.0,
    verify_ms: float = 24.0,
    switch_ms: float = 1.0,
    seed: int = 0,
    *,
    length_error: float | None = None,
    starvation_bound_s: float | None = None,
    progress: Progress | None = None,
    record_stays: bool = False,
) -> Result:
    """Replays `workload` under a policy.

    `load` None leaves the arrivals as they are. `length_error` replaces the predicted lengths by
    the true ones with that log-error, drawn from `seed` (the only randomness there is).
    Raises ValueError for an unknown policy or a workload that cannot be rescaled.
    """
    step_s = (draft_tokens * draft_ms + verify_ms) / 1000.0
    if length_error is not None:
        workload = with_length_error(workload, length_error, seed)
    if load is not None:
        workload = rescale(workload, slots, load, step_s)
    costs = StepCosts(
        draft_token_s=draft_ms / 1000.0, verify_s=verify_ms / 1000.0, switch_s=switch_ms / 1000.0
    )
    policy = _policy(policy_name, workload)
    settings = SchedulerSettings(
        draft_tokens=draft_tokens,
        lease_duration_s=_FOREVER_S,
        session_timeout_s=_FOREVER_S,
        max_queued_requests=len(workload) + 1,
        max_queued_tokens=1 << 62,
        max_retained=0,
        starvation_bound_s=starvation_bound_s,
        record_interval_s=_FOREVER_S,
    )
    core = Scheduler("replay", policy, settings)
    core.worker_joined(Worker(_WORKER, slots, costs), [], 0.0)
    return Replay(
        core, workload, slots, step_s, switch_ms / 1000.0, draft_tokens, progress, record_stays
    ).run()


def _policy(name: str, workload: Workload) -> Policy:
    if not policies().get(name, Policy).servable:
        return make_policy(name, true_steps={f"r{index}": job.steps for index, job in enumerate(workload)})
    return make_policy(name)


class _Slot:
    """What the simulated worker knows about a lease."""

    __slots__ = ("begin_s", "emitted", "job", "lease_id", "offset", "step", "steps")

    def __init__(self, job: int, emitted: tuple[int, ...]) -> None:
        self.job = job
        self.emitted = emitted
        self.steps = len(emitted)
        self.step = 0
        self.offset = 0
        self.lease_id = 0
        self.begin_s = 0.0


class Replay:
    """One worker, one virtual clock, the real core."""

    def __init__(
        self,
        core: Scheduler,
        workload: Workload,
        slots: int,
        step_s: float,
        switch_s: float,
        draft_tokens: int,
        progress: Progress | None = None,
        record_stays: bool = False,
    ) -> None:
        self._core = core
        self._workload = workload
        self._step_s = step_s
        self._switch_s = switch_s
        self._progress = progress
        self._record_stays = record_stays
        longest_step = max(max(job.emitted_per_step) for job in workload)
        self._drafted = max(draft_tokens, longest_step - 1)
        self._max_tokens = max(LEAST_MAX_TOKENS, max(job.output_tokens for job in workload) + 1)
        self._slots: list[_Slot | None] = [None] * slots
        self._known: dict[str, _Slot] = {}
        self._released: list[int] = []
        self._returns = 0
        self._switches = 0
        self._step_duration_s = 0.0
        self._finished_s: list[float] = [0.0] * len(workload)
        self._started_s: list[float] = [-1.0] * len(workload)
        self._stays: list[Stay] = []

    def run(self) -> Result:
        core, workload = self._core, self._workload
        now_s = workload[0].arrival_s
        arrived = finished = worker_steps = 0
        total = len(workload)
        preemptive = core.policy.preemptive
        while finished < total:
            arrived_before = arrived
            while arrived < total and workload[arrived].arrival_s <= now_s:
                self._arrive(arrived, workload[arrived])
                arrived += 1
            released = bool(self._released)
            report, ended = self._take_report(now_s)
            if report is not None:
                core.report(report, now_s)
                for job in ended:
                    self._finished_s[job] = now_s
                if ended:
                    finished += len(ended)
                    if self._progress is not None:
                        self._progress(finished)
            # Where nothing has come or gone and nobody may be preempted, there is nothing to decide.
            if arrived > arrived_before or ended or (preemptive and core.waiting_requests) or released:
                self._apply(core.tick(now_s), now_s)
            if any(self._slots):
                duration_s = self._step_s + self._switch_s * self._returns
                self._returns = 0
                self._step_duration_s = duration_s
                worker_steps += 1
                now_s += duration_s
            elif arrived < total:
                now_s = workload[arrived].arrival_s
                core.heartbeat(_WORKER, now_s)
            elif finished < total:
                raise RuntimeError("requests are left, but nothing runs and nothing will arrive")
        return self._result(worker_steps, now_s)

    def _arrive(self, index: int, job: Job) -> None:
        request_id = f"r{index}"
        self._known[request_id] = _Slot(index, job.emitted_per_step)
        spec = RequestSpec(
            request_id=request_id,
            prompt=bytes(4 * job.prompt_tokens),
            max_tokens=self._max_tokens,
            request_class=job.task,
            predicted_output_tokens=job.predicted_output_tokens,
        )
        self._core.submit(spec, job.arrival_s)

    def _apply(self, tick: Tick, now_s: float) -> None:
        slots = self._slots
        for revoke in tick.revokes:
            held = self._known[revoke.request_id]
            for slot, holder in enumerate(slots):
                if holder is held:
                    slots[slot] = None
                    self._released.append(revoke.lease_id)
                    if self._record_stays:
                        request = self._core.get(revoke.request_id)
                        because = "" if request is None else request.preempted_because
                        self._stays.append(Stay(slot, held.job, held.begin_s, now_s, because))
        for grant in tick.grants:
            self._enter(grant, now_s)

    def _enter(self, grant: Grant, now_s: float) -> None:
        entry = self._known[grant.request.request_id]
        if entry.lease_id:
            self._returns += 1
            self._switches += 1
        else:
            self._started_s[entry.job] = now_s
        entry.lease_id = grant.lease_id
        entry.begin_s = now_s
        assert self._slots[grant.slot] is None, "granted a slot that is taken"
        self._slots[grant.slot] = entry

    def _take_report(self, now_s: float) -> tuple[StepReport | None, list[int]]:
        """What the step that has just ended did."""
        leases, offsets, emitted_counts, accepted = [], [], [], []
        finishes: dict[int, RowFinish] = {}
        ended: list[int] = []
        slots = self._slots
        total = 0
        for slot, entry in enumerate(slots):
            if entry is None:
                continue
            count = entry.emitted[entry.step]
            entry.step += 1
            leases.append(entry.lease_id)
            offsets.append(entry.offset)
            emitted_counts.append(count)
            accepted.append(count - 1 if count else 0)
            entry.offset += count
            total += count
            if entry.step == entry.steps:
                finishes[len(leases) - 1] = RowFinish(FinishReason.STOP)
                ended.append(entry.job)
                slots[slot] = None
                if self._record_stays:
                    self._stays.append(Stay(slot, entry.job, entry.begin_s, now_s, ""))
        if not leases:
            return None, ended
        report = StepReport(
            worker_id=_WORKER,
            lease_ids=leases,
            offsets=offsets,
            emitted_counts=emitted_counts,
            drafted_counts=[self._drafted] * len(leases),
            accepted_counts=accepted,
            token_ids=bytes(4 * total),
            finishes=finishes,
            released=self._released,
            step_s=self._step_duration_s,
        )
        self._released = []
        return report, ended

    def _result(self, worker_steps: int, now_s: float) -> Result:
        workload, finished_s = self._workload, self._finished_s
        latencies_s = [done_s - job.arrival_s for done_s, job in zip(finished_s, workload, strict=True)]
        return Result(
            policy=self._core.policy.name,
            latencies_s=latencies_s,
            slowdowns=[
                latency_s / (job.steps * self._step_s)
                for latency_s, job in zip(latencies_s, workload, strict=True)
            ],
            switches=self._switches,
            makespan_s=now_s - workload[0].arrival_s,
            steps=worker_steps,
            stays=self._stays,
            first_waits_s=[
                started_s - job.arrival_s for started_s, job in zip(self._started_s, workload, strict=True)
            ],
        )
