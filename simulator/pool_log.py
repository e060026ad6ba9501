"""Makes a workload of what a LAPS pool has served: the finished requests that its store still keeps."""

from __future__ import annotations

import random
from typing import Any

from scheduler_svc.core.records import FinishReason, RequestState
from scheduler_svc.store.inspector import PAGE_LIMIT, Inspector
from simulator.convert import cut_to
from simulator.workload import Job, Workload, WorkloadError, order

ENDED_BY_THEMSELVES = (FinishReason.STOP, FinishReason.LENGTH)


async def from_pool(redis_url: str, pool: str, **connection_options: Any) -> Workload:
    """The requests that ended by themselves, with their true arrivals, classes and client's predictions.

    Raises WorkloadError where there are none, StoreUnavailable where the store does not answer.
    """
    inspector = Inspector.open(redis_url, pool, **connection_options)
    jobs = []
    try:
        token = ""
        while True:
            page = await inspector.list_requests({RequestState.FINISHED}, PAGE_LIMIT, token)
            for view in page.requests:
                if view.fields["finish_reason"] in ENDED_BY_THEMSELVES and view.fields["output_tokens"] > 0:
                    timeline = await inspector.timeline(view.request_id)
                    if timeline is not None:
                        jobs.append(_job(view.request_id, view.fields, timeline.tokens_per_entry))
            token = page.next_page_token
            if not token:
                break
    finally:
        await inspector.close()
    if not jobs:
        raise WorkloadError(f"the store keeps no request of pool {pool!r} that ended by itself")
    first_s = min(arrival_s for arrival_s, _ in jobs)
    return order(
        Job(arrival_s - first_s, job.emitted_per_step, job.prompt_tokens, job.task,
            job.predicted_output_tokens)
        for arrival_s, job in jobs
    )  # fmt: skip


def _job(request_id: str, fields: dict[str, Any], tokens_per_entry: list[int]) -> tuple[float, Job]:
    job = Job(
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
    )
    return fields["arrival_s"], job


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
