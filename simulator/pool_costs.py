"""What a pool's own records tell of its workers' costs, in the terms of the replay model."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simulator.prefill import Prefill

Fields = dict[str, Any]
"""Typed values of a stored record by name."""


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


def pool_costs(finished: Sequence[Fields], workers: Sequence[Fields]) -> PoolCosts | None:
    """`finished`: records of requests that ended by themselves. `workers`: those in session, for what only
    they can measure: a prompt token's prefill and a return to a slot.

    What a step takes, and how late a decision takes effect, is told by the requests that were never
    preempted: their time from the first token to the end, less the prefill of others that fell into it, over
    their steps; and their time from the slot to the first token, less prefill and steps of their own. That
    holds the pauses between steps too, which no worker sees. None: there is no worker, or no such request.
    """
    whole = [
        each for each in finished if not each["preemptions"] and each["first_token_s"] and each["steps"] > 1
    ]
    if not whole or not workers:
        return None
    prefill_s = _mean([worker["prefill_token_s"] for worker in workers])
    by_worker: dict[str, list[Fields]] = defaultdict(list)
    for each in whole:
        by_worker[each["worker_id"]].append(each)
    decoding = {worker_id: _Intervals(requests) for worker_id, requests in by_worker.items()}
    held_s = sum(each["finished_s"] - each["first_token_s"] for each in whole)
    steps = sum(each["steps"] - 1 for each in whole)
    others_s = sum(
        _prompt_left(each) * prefill_s * decoding[each["worker_id"]].at(each["first_token_s"])
        for each in finished
        if each["first_token_s"] and each["worker_id"] in decoding
    )
    # Where prefill is most of it, its measured cost times its share says little of the rest.
    step_s = max(held_s - others_s, 0.5 * held_s) / steps
    starts_s = []
    for each in whole:
        others = decoding[each["worker_id"]].at(each["first_scheduled_s"])
        first_s = each["first_token_s"] - each["first_scheduled_s"]
        starts_s.append(first_s - _first_token_s(_prompt_left(each), others, prefill_s, step_s))
    return PoolCosts(
        slots=sum(worker["slots"] for worker in workers),
        step_ms=1000.0 * step_s,
        prefill_ms=1000.0 * prefill_s,
        switch_ms=1000.0 * _mean([worker["switch_s"] for worker in workers]),
        start_ms=1000.0 * max(0.0, _mean(starts_s)),
    )


class _Intervals:
    """When the requests of one worker decoded."""

    def __init__(self, requests: Sequence[Fields]) -> None:
        self._begins = sorted(each["first_token_s"] for each in requests)
        self._ends = sorted(each["finished_s"] for each in requests)

    def at(self, instant_s: float) -> int:
        """How many had begun before and ended no earlier."""
        return bisect_left(self._begins, instant_s) - bisect_left(self._ends, instant_s)


@dataclass(slots=True)
class _Prompt:
    prompt_left: int


def _prompt_left(request: Fields) -> int:
    prompt_tokens: int = request["prompt_tokens"]
    cached_tokens: int = request["cached_tokens"]
    return max(0, prompt_tokens - 1 - cached_tokens)


def _first_token_s(prompt_left: int, others: int, prefill_token_s: float, step_s: float) -> float:
    """Seconds from a request's entry to the end of its first step, beside others that decode."""
    prefill = Prefill(prefill_token_s, step_s)
    prefill.enter(_Prompt(prompt_left))
    seconds = step_s
    while prefill:
        seconds += prefill.compute(1 + others)
        if prefill:
            seconds += step_s
    return seconds


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
