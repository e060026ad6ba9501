"""What a pool's own records tell of its workers' costs, in the terms of the replay model."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from simulator.prefill import prompt_left
from simulator.replay import simulate
from simulator.result import Result
from simulator.workload import Workload

Fields = dict[str, Any]
"""Typed values of a stored record by name."""

_ROUNDS = 3
"""The start of one request changes beside whom the next ones start, but little."""


@dataclass(frozen=True, slots=True)
class PoolCosts:
    """Costs of the replay model (`simulator.replay`), in milliseconds."""

    slots: int
    """Of all workers."""
    step_ms: float
    """Drafting and verifying together."""
    prefill_ms: float
    switch_ms: float
    start_ms: float

    def options(self) -> str:
        """As `laps simulate` takes them."""
        return (
            f"--slots {self.slots} --draft-ms 0 --verify-ms {self.step_ms:.3f} "
            f"--prefill-ms {self.prefill_ms:.4f} --switch-ms {self.switch_ms:.3f} "
            f"--start-ms {self.start_ms:.3f}"
        )


def pool_costs(served: Sequence[Fields], workload: Workload, workers: Sequence[Fields]) -> PoolCosts | None:
    """`served`: records of requests that ended by themselves; `workload`: the same requests. `workers`: those
    in session, for what only they can measure: a prompt token's prefill and a return to a slot.

    The rest is told by the requests that were never preempted. A step: their time from the first token to
    the end, less the prefill of others that fell into it, over the steps; that holds the pauses between
    steps too, which no worker sees. The start of a request: how much longer it was from its slot to its
    first token than in a replay with the other costs. None: there is no worker, or no such request.
    """
    whole = [
        index
        for index, each in enumerate(served)
        if not each["preemptions"] and each["first_token_s"] and each["steps"] > 1
    ]
    if not whole or not workers:
        return None
    costs = PoolCosts(
        slots=sum(worker["slots"] for worker in workers),
        step_ms=0.0,
        prefill_ms=1000.0 * _mean([worker["prefill_token_s"] for worker in workers]),
        switch_ms=1000.0 * _mean([worker["switch_s"] for worker in workers]),
        start_ms=0.0,
    )
    costs = replace(costs, step_ms=_step_ms(served, [served[index] for index in whole], costs.prefill_ms))
    first_s = _mean([served[index]["first_token_s"] - served[index]["first_scheduled_s"] for index in whole])
    for _ in range(_ROUNDS):
        result = replay(workload, "fcfs", costs)
        missing_s = first_s - _mean([result.first_steps_s[index] for index in whole])
        costs = replace(costs, start_ms=max(0.0, costs.start_ms + 1000.0 * missing_s))
    return costs


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
        start_ms=costs.start_ms,
    )


def _step_ms(served: Sequence[Fields], whole: Sequence[Fields], prefill_ms: float) -> float:
    by_worker: dict[str, list[Fields]] = defaultdict(list)
    for each in whole:
        by_worker[each["worker_id"]].append(each)
    decoding = {worker_id: _Intervals(requests) for worker_id, requests in by_worker.items()}
    decoded_ms: float = 1000.0 * sum(each["finished_s"] - each["first_token_s"] for each in whole)
    others_ms = sum(
        prompt_left(each["prompt_tokens"], each["cached_tokens"])
        * prefill_ms
        * decoding[each["worker_id"]].at(each["first_token_s"])
        for each in served
        if each["first_token_s"] and each["worker_id"] in decoding
    )
    # Where nearly all of it is prefill, what is left says little of the steps.
    steps: int = sum(each["steps"] - 1 for each in whole)
    return max(decoded_ms - others_ms, 0.5 * decoded_ms) / steps


class _Intervals:
    """When the requests of one worker decoded."""

    def __init__(self, requests: Sequence[Fields]) -> None:
        self._begins = sorted(each["first_token_s"] for each in requests)
        self._ends = sorted(each["finished_s"] for each in requests)

    def at(self, instant_s: float) -> int:
        """How many had begun before and ended no earlier."""
        return bisect_left(self._begins, instant_s) - bisect_left(self._ends, instant_s)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
