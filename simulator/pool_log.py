"""Makes a workload of what a LAPS pool has served: the finished requests that its store still keeps."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from scheduler_svc.core.records import FinishReason, RequestState
from scheduler_svc.store.inspector import PAGE_LIMIT, Inspector
from simulator.convert import cut_to
from simulator.pool_costs import PoolCosts, Served, pool_costs, served
from simulator.workload import Job, Workload, WorkloadError

ENDED_BY_THEMSELVES = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class PoolLog:
    """What a pool has served."""

    workload: Workload
    latencies_s: list[float]
    """From arrival to end in the scheduler, by job."""
    costs: PoolCosts | None
    """None: no worker is in session, or every request was preempted."""

    @property
    def mean_latency_s(self) -> float:
        return sum(self.latencies_s) / len(self.latencies_s)


async def from_pool(
    redis_url: str, pool: str, request_class: str | None = None, **connection_options: Any
) -> PoolLog:
    """The requests that ended by themselves, with their true arrivals, classes and client's predictions;
    those of one class, or all.

    Raises WorkloadError where there are none, StoreUnavailable where the store does not answer, StoreError
    where it refuses the credentials.
    """
    inspector = Inspector.open(redis_url, pool, **connection_options)
    found: list[tuple[Served, Job]] = []
    try:
        token = ""
        while True:
            page = await inspector.list_requests({RequestState.FINISHED}, PAGE_LIMIT, token)
            for view in page.requests:
                if _wanted(view.fields, request_class):
                    timeline = await inspector.timeline(view.request_id)
                    if timeline is not None:
                        job = _job(view.request_id, view.fields, timeline.tokens_per_entry)
                        found.append((served(view.fields, timeline.events), job))
            token = page.next_page_token
            if not token:
                break
        workers = [view.fields for view in await inspector.list_workers()]
    finally:
        await inspector.close()
    if not found:
        which = "" if request_class is None else f" of class {request_class!r}"
        raise WorkloadError(f"the store keeps no request{which} of pool {pool!r} that ended by itself")
    found.sort(key=lambda entry: entry[0].fields["arrival_s"])
    log = [each for each, _ in found]
    arrivals_s = [each.fields["arrival_s"] for each in log]
    workload = tuple(
        replace(job, arrival_s=arrival_s - arrivals_s[0])
        for (_, job), arrival_s in zip(found, arrivals_s, strict=True)
    )
    return PoolLog(
        workload=workload,
        latencies_s=[each.fields["finished_s"] - each.fields["arrival_s"] for each in log],
        costs=pool_costs(log, workload, workers),
    )


def _wanted(fields: dict[str, Any], request_class: str | None) -> bool:
    ended = fields["finish_reason"] in ENDED_BY_THEMSELVES and fields["output_tokens"] > 0
    return ended and request_class in (None, fields["request_class"])


def _job(request_id: str, fields: dict[str, Any], tokens_per_entry: list[int]) -> Job:
    return Job(
        arrival_s=0.0,
        emitted_per_step=steps_of(
            request_id,
            fields["steps"],
            fields["output_tokens"],
            fields["acceptance_histogram"],
            tokens_per_entry,
        ),
        prompt_tokens=max(1, fields["prompt_tokens"]),
        task=fields["request_class"],
        predicted_output_tokens=fields["client_predicted_output_tokens"],
        cached_tokens=fields["cached_tokens"],
    )


def steps_of(
    request_id: str, steps: int, output_tokens: int, histogram: list[int], tokens_per_entry: list[int]
) -> tuple[int, ...]:
    """Tokens emitted by each step. The token log has an entry a tick, and mostly a tick a step: then its
    entries are the steps. Where ticks held several, the histogram of accepted tokens tells how many steps
    emitted how much, and their order, which nothing has kept, is drawn by the request's id."""
    if len(tokens_per_entry) == steps:
        return tuple(tokens_per_entry)
    counts = [accepted + 1 for accepted, times in enumerate(histogram) for _ in range(times)]
    # A step without a draft emits one token.
    counts += [1] * (steps - len(counts))
    random.Random(request_id).shuffle(counts)
    # A step that a stop string or the bound has cut emitted less than it accepted.
    return cut_to([*counts, output_tokens], output_tokens)
