"""What a pool's own records tell of its workers' costs, in the terms of the replay model."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import Any

from scheduler_svc.store.inspector import EventView
from simulator.prefill import prompt_left
from simulator.replay import simulate
from simulator.result import Result
from simulator.workload import Workload

Fields = dict[str, Any]
"""Typed values of a stored record by name."""

_STOOD_STILL = 20.0
"""A request that took so many times the median time a step was held up by something else than steps: its pool
was away."""
_ROUNDS = 3
"""What is looked for changes what it is found by, but little."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Between a request's first token and its end: when it held a slot of a worker."""

    worker_id: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Served:
    """A request that ended by itself."""

    fields: Fields
    decoding: Sequence[Decoding]
    """Empty: not known, or over with the first step."""

    @property
    def prompt_left(self) -> int:
        return prompt_left(self.fields["prompt_tokens"], self.fields["cached_tokens"])


def served(fields: Fields, events: Iterable[EventView]) -> Served:
    """`events` are its own, and needed only if it was preempted: its record has no times of that."""
    first_s, end_s = fields["first_token_s"], fields["finished_s"]
    if first_s is None or fields["steps"] < 2:
        return Served(fields, ())
    if not fields["preemptions"]:
        return Served(fields, (Decoding(fields["worker_id"], first_s, end_s),))
    decoding: list[Decoding] = []
    begin_s, worker_id, offset_s, leases = first_s, "", None, 0
    for event in events:
        if event.kind == "leased":
            if offset_s is None:
                # They carry the store's clock.
                offset_s = fields["first_scheduled_s"] - event.time_s
            begin_s, worker_id = max(first_s, event.time_s + offset_s), event.worker_id
            leases += 1
        elif event.kind in ("preempted", "requeued") and offset_s is not None and worker_id:
            decoding.append(Decoding(worker_id, begin_s, max(begin_s, event.time_s + offset_s)))
            worker_id = ""
    if leases <= fields["preemptions"] or not worker_id:
        # The first of its events are kept no longer.
        return Served(fields, ())
    return Served(fields, (*decoding, Decoding(worker_id, begin_s, end_s)))


@dataclass(frozen=True, slots=True)
class PoolCosts:
    """Costs of the replay model (`simulator.replay`), in milliseconds."""

    slots: int
    """Of all workers."""
    step_ms: float
    """Drafting and verifying together, for one request alone."""
    row_ms: float
    prefill_ms: float
    switch_ms: float
    start_ms: float

    def options(self, starvation_bound_s: float = 0.0) -> str:
        """As `laps simulate` takes them. With the pool's starvation bound; 0: it has none."""
        return (
            f"--slots {self.slots} --draft-ms 0 --verify-ms {self.step_ms:.3f} --row-ms {self.row_ms:.3f} "
            f"--prefill-ms {self.prefill_ms:.4f} --switch-ms {self.switch_ms:.3f} "
            f"--start-ms {self.start_ms:.3f}{bound_option(starvation_bound_s)}"
        )


def bound_option(starvation_bound_s: float) -> str:
    """What follows other options of `laps simulate`: a pool has a bound unless it is told to have none, a
    replay has none unless it is told to have one."""
    return f" --starvation-bound-s {starvation_bound_s:g}" if starvation_bound_s else ""


def pool_costs(log: Sequence[Served], workload: Workload, workers: Sequence[Fields]) -> PoolCosts | None:
    """`log` and `workload` are of the same requests. `workers`: records of those in session, for what only
    they can measure: a prompt token's prefill and a return to a slot.

    The rest is told by the requests. A step: the time that they decoded, less the prefill of others and the
    returns to slots that fell into it, over their steps; that holds the pauses between steps too, which no
    worker sees. The start of a request: how much longer those that were never preempted took from their
    slot to their first token than in a replay with the other costs. None: there is no worker, or no such
    request.
    """
    log = _without_outages(log)
    whole = [index for index, each in enumerate(log) if each.decoding and not each.fields["preemptions"]]
    if not whole or not workers:
        return None
    prefill_s = fmean([worker["prefill_token_s"] for worker in workers])
    switch_s = fmean([worker["switch_s"] for worker in workers])
    step_s, row_s = _fit(log, prefill_s, switch_s)
    costs = PoolCosts(
        slots=sum(worker["slots"] for worker in workers),
        step_ms=1000.0 * step_s,
        row_ms=1000.0 * row_s,
        prefill_ms=1000.0 * prefill_s,
        switch_ms=1000.0 * switch_s,
        start_ms=0.0,
    )
    starts_s = {
        index: log[index].fields["first_token_s"] - log[index].fields["first_scheduled_s"] for index in whole
    }
    longest_s = _STOOD_STILL * median(starts_s.values())
    whole = [index for index in whole if starts_s[index] <= longest_s]
    first_s = fmean([starts_s[index] for index in whole])
    for _ in range(_ROUNDS):
        result = replay(workload, "fcfs", costs)
        missing_s = first_s - fmean([result.first_steps_s[index] for index in whole])
        costs = replace(costs, start_ms=max(0.0, costs.start_ms + 1000.0 * missing_s))
    return costs


def _without_outages(log: Sequence[Served]) -> list[Served]:
    """How long requests that stood still have decoded tells nothing of a step."""
    step_s = [_held_s(each) / (each.fields["steps"] - 1) for each in log if each.decoding]
    if not step_s:
        return list(log)
    longest_s = _STOOD_STILL * median(step_s)
    return [
        replace(each, decoding=())
        if each.decoding and _held_s(each) > longest_s * (each.fields["steps"] - 1)
        else each
        for each in log
    ]


def _held_s(request: Served) -> float:
    return sum(part.end_s - part.begin_s for part in request.decoding)


def replay(workload: Workload, policy: str, costs: PoolCosts) -> Result:
    """With the arrivals as they were."""
    return simulate(
        workload,
        policy,
        costs.slots,
        None,
        draft_ms=0.0,
        verify_ms=costs.step_ms,
        switch_ms=costs.switch_ms,
        prefill_ms=costs.prefill_ms,
        row_ms=costs.row_ms,
        start_ms=costs.start_ms,
    )


def _fit(log: Sequence[Served], prefill_token_s: float, switch_s: float) -> tuple[float, float]:
    """Seconds of a step of one request, and what each further request adds to it: the least squares of
    `time = steps * step + steps * (requests beside it) * row` over the requests, weighted by one over their
    steps, so that the times add up to what they were. Where more run, a second holds fewer steps, so how
    many were beside a request in the mean of its steps depends on the result: it is found in rounds."""
    workers: dict[str, _Work] = defaultdict(_Work)
    decoded = [each for each in log if _held_s(each) > 0.0]
    for each in decoded:
        for part in each.decoding:
            workers[part.worker_id].changes += [(part.begin_s, 1), (part.end_s, -1)]
        first = each.decoding[0]
        workers[first.worker_id].entries.append((first.begin_s, each.prompt_left * prefill_token_s))
        for part in each.decoding[1:]:
            workers[part.worker_id].entries.append((part.begin_s, switch_s))
    step_s, row_s = 1.0, 0.0
    for _ in range(_ROUNDS):
        for work in workers.values():
            work.add_up(step_s, row_s)
        total_steps = total_beside = squares = total_s = product = 0.0
        for each in decoded:
            steps = each.fields["steps"] - 1
            sums = [workers[part.worker_id].between(part) for part in each.decoding]
            held_s = _held_s(each)
            beside = sum(others for _, others, _ in sums) / sum(done for done, _, _ in sums)
            entries_s = sum(entered_s for _, _, entered_s in sums) + switch_s * (len(each.decoding) - 1)
            # Where nearly all of it is the entry of others, what is left says little of the steps.
            decoded_s = max(held_s - entries_s, 0.5 * held_s)
            total_steps += steps
            total_beside += steps * beside
            squares += steps * beside * beside
            total_s += decoded_s
            product += decoded_s * beside
        determinant = total_steps * squares - total_beside * total_beside
        row_s = 0.0
        if determinant > 1e-6 * total_steps * squares:
            row_s = (total_steps * product - total_beside * total_s) / determinant
        # A request more never makes a step shorter, nor longer by more than a step.
        row_s = min(max(row_s, 0.0), total_s / (total_steps + total_beside))
        step_s = (total_s - row_s * total_beside) / total_steps
    return step_s, row_s


class _Work:
    """When requests decoded on one worker, and what entries cost it: prefill, or at a return the switch."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, int]] = []
        """When one more or one less decoded."""
        self.entries: list[tuple[float, float]] = []
        """When one was over, and its seconds."""

    def add_up(self, step_s: float, row_s: float) -> None:
        self.changes.sort()
        self.entries.sort()
        self._instants = [instant_s for instant_s, _ in self.changes]
        running = accumulate(sign for _, sign in self.changes)
        self._others = [max(count - 1, 0) for count in running]
        self._rates = [1.0 / (step_s + row_s * others) for others in self._others]
        spans_s = [until_s - since_s for since_s, until_s in pairwise(self._instants)]
        done = [span_s * rate for span_s, rate in zip(spans_s, self._rates, strict=False)]
        beside = [steps * others for steps, others in zip(done, self._others, strict=False)]
        self._done, self._beside = [0.0, *accumulate(done)], [0.0, *accumulate(beside)]
        self._ends = [end_s for end_s, _ in self.entries]
        self._entered_s = [0.0, *accumulate(seconds for _, seconds in self.entries)]

    def between(self, part: Decoding) -> tuple[float, float, float]:
        """Steps, steps times requests beside it, and seconds of the entries of others. Its own was over when
        the part began."""
        (done, beside), (done_before, beside_before) = self._until(part.end_s), self._until(part.begin_s)
        begin, end = bisect_right(self._ends, part.begin_s), bisect_right(self._ends, part.end_s)
        entered_s = self._entered_s[end] - self._entered_s[begin]
        return done - done_before, beside - beside_before, entered_s

    def _until(self, instant_s: float) -> tuple[float, float]:
        index = bisect_right(self._instants, instant_s) - 1
        done = (instant_s - self._instants[index]) * self._rates[index]
        return self._done[index] + done, self._beside[index] + done * self._others[index]
