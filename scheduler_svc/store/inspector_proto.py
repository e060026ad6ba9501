"""What the store and the inspector read, as messages of `laps.v1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laps.v1 import generation_pb2, queue_pb2, scheduler_pb2
from scheduler_svc.core.records import FinishReason, Request, RequestState
from scheduler_svc.store import codec
from scheduler_svc.store.inspector import (
    NOT_READABLE,
    Page,
    QueuesView,
    RequestView,
    Snapshot,
    Timeline,
    WorkerView,
)

STATES = {
    RequestState.QUEUED: queue_pb2.REQUEST_STATE_QUEUED,
    RequestState.RUNNING: queue_pb2.REQUEST_STATE_RUNNING,
    RequestState.PREEMPTED: queue_pb2.REQUEST_STATE_PREEMPTED,
    RequestState.FINISHED: queue_pb2.REQUEST_STATE_FINISHED,
}
REASONS = {
    None: generation_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: generation_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: generation_pb2.FINISH_REASON_ERROR,
}


def request_info_to_proto(request_id: str, fields: Mapping[str, Any], pool: str) -> queue_pb2.RequestInfo:
    """`fields`: typed values of `layout.REQUEST_FIELDS` by name."""
    return queue_pb2.RequestInfo(
        request_id=request_id,
        pool=pool,
        state=STATES[fields["state"]],
        finish_reason=REASONS[fields["finish_reason"]],
        request_class=fields["request_class"],
        priority=fields["priority"],
        arrival_s=fields["arrival_s"],
        deadline_s=fields["deadline_s"] or 0.0,
        prompt_tokens=fields["prompt_tokens"],
        max_tokens=fields["max_tokens"],
        output_tokens=fields["output_tokens"],
        level=fields["level"],
        rank=fields["rank"],
        perceptible=fields["perceptible"],
        acceptance_estimate=fields["acceptance_estimate"],
        predicted_output_tokens=fields["predicted_output_tokens"],
        perceived_service_s=fields["perceived_s"],
        attained_service_s=fields["attained_s"],
        num_steps=fields["steps"],
        num_draft_tokens=fields["drafted_tokens"],
        num_accepted_tokens=fields["accepted_tokens"],
        preemptions=fields["preemptions"],
        preempted_because=fields["preempted_because"],
        worker_id=fields["worker_id"],
        slot=fields["slot"],
        first_scheduled_s=fields["first_scheduled_s"] or 0.0,
        first_token_s=fields["first_token_s"] or 0.0,
        finished_s=fields["finished_s"] or 0.0,
        error=fields["error"],
        leased_s=fields.get("leased_s") or 0.0,
        acceptance_histogram=fields["acceptance_histogram"],
    )


def request_to_proto(request: Request, pool: str) -> queue_pb2.RequestInfo:
    """A request with its prompt and output, as `Store.read_request` returns it."""
    return request_info_to_proto(request.request_id, codec.request_values(request), pool)


def view_to_proto(view: RequestView, pool: str) -> queue_pb2.RequestInfo:
    try:
        return request_info_to_proto(view.request_id, view.fields, pool)
    except (ValueError, OverflowError):
        # A number that no message can hold. It must not hide the others either.
        return queue_pb2.RequestInfo(request_id=view.request_id, pool=pool, error=NOT_READABLE)


def pool_queues_to_proto(queues: QueuesView) -> queue_pb2.PoolQueues:
    return queue_pb2.PoolQueues(
        pool=queues.pool,
        policy=queues.policy,
        epoch=queues.epoch,
        commit_seq=queues.commit_seq,
        leader=queues.leader,
        waiting=queues.waiting,
        running=queues.running,
        backlog_s=queues.backlog_s,
        levels=[
            queue_pb2.QueueLevel(
                level=level.level,
                threshold_s=level.threshold_s,
                waiting=level.waiting,
                head=[view_to_proto(view, queues.pool) for view in level.head],
            )
            for level in queues.levels
        ],
    )


def worker_info_to_proto(worker: WorkerView, pool: str) -> queue_pb2.WorkerInfo:
    fields = worker.fields
    return queue_pb2.WorkerInfo(
        worker_id=worker.worker_id,
        pool=pool,
        device=fields["device"],
        slots=[
            queue_pb2.SlotInfo(
                slot=slot.slot, request_id=slot.request_id, lease_expires_s=slot.lease_expires_s
            )
            for slot in worker.slots
        ],
        last_seen_s=fields["last_seen_s"],
        draining=fields["draining"],
        draft_ms=fields["draft_token_s"] * 1e3,
        verify_ms=fields["verify_s"] * 1e3,
        switch_ms=fields["switch_s"] * 1e3,
        num_steps=fields["steps"],
        kv_used_tokens=fields["kv_used_tokens"],
        kv_capacity_tokens=fields["kv_capacity_tokens"],
    )


def timeline_to_proto(timeline: Timeline, pool: str) -> queue_pb2.GetTimelineResponse:
    response = queue_pb2.GetTimelineResponse(
        time_s=timeline.time_s,
        request=view_to_proto(timeline.request, pool),
        events=[
            queue_pb2.RequestEvent(
                time_s=event.time_s, kind=event.kind, worker_id=event.worker_id, detail=event.detail
            )
            for event in timeline.events
        ],
        events_lost=timeline.events_lost,
        tokens_per_entry=timeline.tokens_per_entry,
    )
    if timeline.position is not None:
        response.position = timeline.position
    return response


def page_to_proto(page: Page, pool: str) -> queue_pb2.ListRequestsResponse:
    return queue_pb2.ListRequestsResponse(
        requests=[view_to_proto(view, pool) for view in page.requests], next_page_token=page.next_page_token
    )


def snapshot_to_proto(snapshot: Snapshot) -> queue_pb2.WatchResponse:
    pool = snapshot.queues.pool
    return queue_pb2.WatchResponse(
        time_s=snapshot.time_s,
        pools=[pool_queues_to_proto(snapshot.queues)],
        workers=[worker_info_to_proto(worker, pool) for worker in snapshot.workers],
        running=[view_to_proto(view, pool) for view in snapshot.running],
    )


def without_first_logprobs(logprobs: bytes, tokens: int) -> bytes:
    """A serialized `TokenLogprobs` without its first entries."""
    message = scheduler_pb2.TokenLogprobs.FromString(logprobs)
    del message.logprobs[:tokens]
    return message.SerializeToString()
