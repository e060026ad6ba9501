"""Replays a workload through the real scheduler core with one simulated worker.

The replay model: a step takes `draft_tokens * draft_ms + verify_ms`, plus `switch_ms` for each request that
re-enters a slot (its first entry is free); in a step every running request emits its next recorded
count. Decisions fall on step boundaries; an idle worker's next step starts at the next arrival.
Latency is finish minus arrival.

Three terms more, all 0 unless they are asked for, make it what a stack does:

- `row_ms` for each request in a step beyond the first. On a GPU a step of a few requests takes hardly longer
  than one of a single request, on a CPU much.
- `prefill_ms` for each prompt token but the last, at a request's first entry. As in the engine, prompts are
  computed at the beginning of a step, in order of entry, and what they take makes that step longer for all;
  a request whose prompt is done takes part in the same step. While other requests decode, a step computes
  prompts for no longer than a share of itself (`simulator.prefill`), so a long one is computed over several
  steps, in which its request emits nothing. A step in which no request decodes lasts as long as its prefill.
- `start_ms`: what the scheduler decides takes effect so much later, for it is stored, sent, and waits for the
  end of a step: at the worker's first step boundary from then on, and what that is too late, the next one is
  earlier, so that the mean is kept. A slot whose request ended stands empty until then, and one whose request
  is preempted goes on with it. An arrival in the middle of a step is decided on at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from scheduler_svc.core.policies import Policy, make_policy, policies
from scheduler_svc.core.records import (
    TOKEN_BYTES,
    FinishReason,
    Grant,
    Request,
    RequestSpec,
    RowFinish,
    StepCosts,
    StepReport,
    Tick,
    Worker,
)
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from simulator.prefill import Prefill, prompt_left
from simulator.result import Result, Stay
from simulator.workload import Job, Workload, rescale, with_length_error

LEAST_MAX_TOKENS = 4096
"""Every request allows so many tokens, or more than the longest of the workload: no policy can tell
a length from it."""

_WORKER = "simulated"
_FOREVER_S = 1e12

Progress = Callable[[int], None]
"""Called with the number of requests that have finished."""


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
    prefill_ms: float = 0.0,
    row_ms: float = 0.0,
    start_ms: float = 0.0,
    length_error: float | None = None,
    starvation_bound_s: float | None = None,
    progress: Progress | None = None,
    record_stays: bool = False,
    every_step: bool = False,
) -> Result:
    """Replays `workload` under a policy.

    `load` None leaves the arrivals as they are; a load is of decoding alone, in steps with all slots taken.
    `length_error` replaces the predicted lengths by the true ones with that log-error, drawn from `seed`
    (the only randomness there is). `every_step` reports every single step to the core instead of skipping
    those that cannot change a decision: the same result, several times slower.
    Raises ValueError for an unknown policy or a workload that cannot be rescaled.
    """
    costs = Costs(
        step_s=(draft_tokens * draft_ms + verify_ms) / 1000.0,
        row_s=row_ms / 1000.0,
        switch_s=switch_ms / 1000.0,
        prefill_token_s=prefill_ms / 1000.0,
        start_s=start_ms / 1000.0,
    )
    if length_error is not None:
        workload = with_length_error(workload, length_error, seed)
    if load is not None:
        workload = rescale(workload, slots, load, costs.of(slots))
    measured = StepCosts(
        draft_token_s=draft_ms / 1000.0,
        verify_s=verify_ms / 1000.0 + costs.row_s * (slots - 1),
        prefill_token_s=costs.prefill_token_s,
        switch_s=costs.switch_s,
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
        learnt_interval_s=_FOREVER_S,
    )
    core = Scheduler("replay", policy, settings)
    core.worker_joined(Worker(_WORKER, slots, measured), [], 0.0)
    return Replay(core, workload, slots, costs, draft_tokens, progress, record_stays).run(every_step)


def _policy(name: str, workload: Workload) -> Policy:
    if not policies().get(name, Policy).servable:
        return make_policy(name, true_steps={f"r{index}": job.steps for index, job in enumerate(workload)})
    return make_policy(name)


@dataclass(frozen=True, slots=True)
class Costs:
    """Of the simulated worker, in seconds; see the head of this file."""

    step_s: float
    """Of one request alone."""
    row_s: float
    switch_s: float
    prefill_token_s: float
    start_s: float

    def of(self, rows: int) -> float:
        """Of a step in which so many requests decode, at least one."""
        return self.step_s + self.row_s * (rows - 1)


class _Slot:
    """What the simulated worker knows about a lease."""

    __slots__ = (
        "begin_s",
        "emitted",
        "job",
        "lease_id",
        "offset",
        "offsets",
        "prompt_left",
        "request",
        "step",
        "steps",
    )

    def __init__(self, index: int, job: Job, request: Request) -> None:
        self.job = index
        self.emitted = job.emitted_per_step
        self.request = request
        self.offsets = (0, *accumulate(self.emitted))
        """Tokens emitted before each step, and in all."""
        self.steps = len(self.emitted)
        self.prompt_left = prompt_left(job.prompt_tokens, job.cached_tokens)
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
        costs: Costs,
        draft_tokens: int,
        progress: Progress | None = None,
        record_stays: bool = False,
    ) -> None:
        self._core = core
        self._workload = workload
        self._costs = costs
        self._prefill = Prefill(costs.prefill_token_s)
        self._progress = progress
        self._record_stays = record_stays
        longest_step = max(max(job.emitted_per_step) for job in workload)
        self._drafted = max(draft_tokens, longest_step - 1)
        self._max_tokens = max(LEAST_MAX_TOKENS, max(job.output_tokens for job in workload) + 1)
        self._slots: list[_Slot | None] = [None] * slots
        self._known: dict[str, _Slot] = {}
        self._released: list[int] = []
        self._on_the_way: deque[tuple[float, float, Tick]] = deque()
        """What the worker does not know yet: when it was decided, when it is due, and what."""
        self._late_s = 0.0
        """By how much in all decisions have taken effect later than they should."""
        self._returns = 0
        self._switches = 0
        self._step_duration_s = 0.0
        self._finished_s: list[float] = [0.0] * len(workload)
        self._started_s: list[float] = [-1.0] * len(workload)
        self._granted_s: list[float] = [-1.0] * len(workload)
        self._first_step_s: list[float] = [-1.0] * len(workload)
        self._stays: list[Stay] = []

    def run(self, every_step: bool = False) -> Result:
        """To the end of the last request; once only. Raises RuntimeError where the core would let one wait
        for ever."""
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
                # What only an arrival has caused was decided when it arrived.
                because_of_it = arrived > arrived_before and not (ended or released)
                self._send(core.tick(now_s), workload[arrived_before].arrival_s if because_of_it else now_s)
            self._deliver(now_s)
            if any(self._slots):
                duration_s = self._begin_step(now_s)
                worker_steps += 1
                now_s += duration_s
                if not (every_step or self._released or self._on_the_way or self._prefill):
                    until_s = workload[arrived].arrival_s if arrived < total else _FOREVER_S
                    now_s, skipped = self._skip(now_s, duration_s, until_s)
                    worker_steps += skipped
            elif self._on_the_way:
                next_s = workload[arrived].arrival_s if arrived < total else _FOREVER_S
                now_s = min(self._on_the_way[0][1], next_s)
            elif arrived < total:
                now_s = workload[arrived].arrival_s
                core.heartbeat(_WORKER, now_s)
            elif finished < total:
                raise RuntimeError("requests are left, but nothing runs and nothing will arrive")
        return self._result(worker_steps, now_s)

    def _begin_step(self, now_s: float) -> float:
        """Seconds that the next step lasts. Whatever has entered since the last one passes through here."""
        running = sum(entry is not None for entry in self._slots)
        duration_s = 0.0
        if self._prefill:
            decoding = running - len(self._prefill)
            duration_s = self._prefill.compute(decoding, self._costs.of(decoding) if decoding else 0.0)
        if running > len(self._prefill):
            duration_s += self._costs.of(running - len(self._prefill))
        duration_s += self._costs.switch_s * self._returns
        self._returns = 0
        self._step_duration_s = duration_s
        for entry in self._slots:
            if entry is not None and self._first_step_s[entry.job] < 0.0 and entry not in self._prefill:
                self._first_step_s[entry.job] = now_s + duration_s
        return duration_s

    def _skip(self, now_s: float, duration_s: float, until_s: float) -> tuple[float, int]:
        """Lets steps pass in which nothing arrives, ends or is decided, without reporting each of them.

        A step that lasts `duration_s` has just ended at `now_s` and is not reported yet; the next
        request arrives at `until_s`. Afterwards the same holds, some steps later. Returns the instant
        and the number of steps that were skipped.
        """
        entries = [entry for entry in self._slots if entry is not None]
        core, policy, step_s = self._core, self._core.policy, self._costs.of(len(entries))
        # The last step of a request is reported, and so is the first one past an arrival or a timer.
        most = min(entry.steps - entry.step for entry in entries) - 1
        until_s = min(until_s, core.next_timer_s() or _FOREVER_S)
        watched = policy.preemptive and not policy.settled and core.waiting_requests > 0
        requests = [entry.request for entry in entries]
        skipped = 0
        if watched or not policy.settled:
            while skipped < most and now_s < until_s:
                for entry in entries:
                    self._advance(entry, 1, duration_s)
                policy.stepped(requests)
                if watched and core.would_preempt(now_s):
                    # This step's outcome is in; the decision is taken as if it had been reported.
                    self._send(core.tick(now_s), now_s)
                    self._deliver(now_s)
                    return now_s + self._begin_step(now_s), skipped + 1
                skipped += 1
                duration_s = step_s
                now_s += duration_s
        else:
            attained_s = 0.0
            while skipped < most and now_s < until_s:
                skipped += 1
                attained_s += duration_s
                duration_s = step_s
                now_s += duration_s
            if skipped:
                for entry in entries:
                    self._advance(entry, skipped, attained_s)
                policy.stepped(requests)
        self._step_duration_s = duration_s
        return now_s, skipped

    def _advance(self, entry: _Slot, steps: int, attained_s: float) -> None:
        """What the core keeps of a request's steps, as its report would have changed it."""
        request = entry.request
        end = entry.step + steps
        emitted = entry.offsets[end] - entry.offset
        request.steps += steps
        request.attained_s += attained_s
        request.drafted_tokens += self._drafted * steps
        histogram = request.acceptance_histogram
        for count in entry.emitted[entry.step : end]:
            accepted = count - 1 if count else 0
            request.accepted_tokens += accepted
            while len(histogram) <= accepted:
                histogram.append(0)
            histogram[accepted] += 1
        request.output += bytes(TOKEN_BYTES * emitted)
        entry.step = end
        entry.offset += emitted

    def _arrive(self, index: int, job: Job) -> None:
        request_id = f"r{index}"
        spec = RequestSpec(
            request_id=request_id,
            prompt=bytes(4 * job.prompt_tokens),
            max_tokens=self._max_tokens,
            request_class=job.task,
            predicted_output_tokens=job.predicted_output_tokens,
        )
        request, _ = self._core.submit(spec, job.arrival_s)
        assert request is not None, "a replayed request is new"
        self._known[request_id] = _Slot(index, job, request)

    def _send(self, tick: Tick, decided_s: float) -> None:
        if tick.grants or tick.revokes:
            due_s = decided_s + max(0.0, self._costs.start_s - self._late_s)
            self._on_the_way.append((decided_s, due_s, tick))

    def _deliver(self, now_s: float) -> None:
        """The worker takes note of what has come, as it does between two steps."""
        while self._on_the_way and self._on_the_way[0][1] <= now_s:
            decided_s, _, tick = self._on_the_way.popleft()
            if self._costs.start_s:
                self._late_s += now_s - decided_s - self._costs.start_s
            self._apply(tick, now_s)
            for grant in tick.grants:
                job = self._known[grant.request.request_id].job
                if self._granted_s[job] < 0.0:
                    self._granted_s[job] = decided_s

    def _apply(self, tick: Tick, now_s: float) -> None:
        slots = self._slots
        for revoke in tick.revokes:
            held = self._known[revoke.request_id]
            for slot, holder in enumerate(slots):
                if holder is held:
                    slots[slot] = None
                    self._released.append(revoke.lease_id)
                    self._prefill.leave(held)
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
        self._prefill.enter(entry)
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
            if entry is None or entry in self._prefill:
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
        if not leases and not self._released:
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
                latency_s / (job.steps * self._costs.step_s)
                for latency_s, job in zip(latencies_s, workload, strict=True)
            ],
            switches=self._switches,
            makespan_s=now_s - workload[0].arrival_s,
            steps=worker_steps,
            stays=self._stays,
            first_waits_s=[
                started_s - job.arrival_s for started_s, job in zip(self._started_s, workload, strict=True)
            ],
            first_steps_s=[
                ended_s - granted_s
                for ended_s, granted_s in zip(self._first_step_s, self._granted_s, strict=True)
            ],
        )
