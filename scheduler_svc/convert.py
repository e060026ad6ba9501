"""Between the wire (protos) and the core's records. The only place that knows both."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from google.protobuf import json_format

from laps.v1 import generation_pb2, queue_pb2, scheduler_pb2, worker_pb2
from scheduler_svc.core.records import (
    FinishReason,
    Grant,
    Request,
    RequestSpec,
    RequestState,
    Resident,
    Revoke,
    RevokeReason,
    RowFinish,
    StepCosts,
    StepReport,
    TenantQuota,
    Worker,
)

FINISH_TO_PROTO = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: generation_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: generation_pb2.FINISH_REASON_ERROR,
}
FINISH_FROM_PROTO = {number: reason for reason, number in FINISH_TO_PROTO.items()}

STATE_TO_PROTO = {
    RequestState.QUEUED: queue_pb2.REQUEST_STATE_QUEUED,
    RequestState.RUNNING: queue_pb2.REQUEST_STATE_RUNNING,
    RequestState.PREEMPTED: queue_pb2.REQUEST_STATE_PREEMPTED,
    RequestState.FINISHED: queue_pb2.REQUEST_STATE_FINISHED,
}

FINISHED = queue_pb2.REQUEST_STATE_FINISHED

REVOKE_TO_PROTO = {
    RevokeReason.PREEMPTED: worker_pb2.REVOKE_REASON_PREEMPTED,
    RevokeReason.ENDED: worker_pb2.REVOKE_REASON_ENDED,
}


# --- In ------------------------------------------------------------------------------------


def request_spec(spec: scheduler_pb2.RequestSpec) -> RequestSpec:
    """The gateway's spec as a record; sampling and stopping become readable JSON."""
    hint = spec.predicted_output_tokens if spec.HasField("predicted_output_tokens") else None
    return RequestSpec(
        request_id=spec.request_id,
        prompt=spec.prompt_token_ids,
        max_tokens=spec.stopping.max_tokens,
        params_json=_params_json(spec.sampling.SerializeToString(), spec.stopping.SerializeToString()),
        request_class=spec.request_class,
        priority=spec.priority,
        predicted_output_tokens=None if hint is None else float(hint),
        deadline_s=spec.deadline_s or None,
        cancel_on_disconnect=spec.cancel_on_disconnect,
        disconnect_grace_s=spec.disconnect_grace_s,
        digest=spec.digest.hex(),
        traceparent=spec.traceparent,
    )


@lru_cache(maxsize=256)
def _params_json(sampling: bytes, stopping: bytes) -> str:
    """Of serialised messages. Most requests of a pool have the same few, and the library takes 0.1 ms."""
    params = {
        "sampling": json_format.MessageToDict(
            generation_pb2.SamplingParams.FromString(sampling), preserving_proto_field_name=True
        ),
        "stopping": json_format.MessageToDict(
            generation_pb2.StoppingParams.FromString(stopping), preserving_proto_field_name=True
        ),
    }
    return json.dumps(params, separators=(",", ":"), sort_keys=True)


def tenant_quota(request: scheduler_pb2.SubmitRequest) -> TenantQuota | None:
    """The bounds of the request's tenant; None: it has none of its own."""
    if not request.HasField("quota"):
        return None
    quota = request.quota
    return TenantQuota(
        quota.max_queued_requests if quota.HasField("max_queued_requests") else None,
        quota.max_queued_tokens if quota.HasField("max_queued_tokens") else None,
    )


def step_costs(costs: worker_pb2.StepCosts) -> StepCosts:
    return StepCosts(costs.draft_token_s, costs.verify_s, costs.prefill_token_s, costs.switch_s)


def worker(hello: worker_pb2.WorkerHello) -> Worker:
    return Worker(
        worker_id=hello.worker_id,
        slots=hello.slots,
        costs=step_costs(hello.costs),
        device=hello.device,
        target=hello.target,
        draft=hello.draft,
        model_fingerprint=hello.model_fingerprint,
        vocabulary_size=hello.vocabulary_size,
        context_tokens=hello.context_tokens,
    )


def residents(hello: worker_pb2.WorkerHello) -> list[Resident]:
    return [Resident(r.request_id, r.output_tokens, r.output_crc32) for r in hello.resident]


def step_report(worker_id: str, report: worker_pb2.StepReport) -> StepReport:
    # [:] makes a list, a third faster than list() does. To index a repeated field costs several times more.
    # What a report mostly lacks is asked for its length first: to go through an empty map runs Python code of
    # the library, and that of each kind is cold.
    timings, finishes, errors = report.timings, report.finishes, report.errors
    logprobs, cached_tokens = report.logprobs, report.cached_tokens
    return StepReport(
        worker_id=worker_id,
        lease_ids=report.lease_ids[:],
        offsets=report.offsets[:],
        emitted_counts=report.emitted_counts[:],
        drafted_counts=report.drafted_counts[:],
        accepted_counts=report.accepted_counts[:],
        token_ids=report.token_ids,
        finishes={finish.row: _row_finish(finish) for finish in finishes} if finishes else {},
        released=report.released_lease_ids[:],
        missing=report.missing_lease_ids[:],
        errors={error.lease_id: error.message for error in errors} if errors else {},
        evicted=report.evicted_request_ids[:],
        logprobs={row: value.SerializeToString() for row, value in logprobs.items()} if logprobs else {},
        step_s=timings.step_s,
        costs=step_costs(timings.costs) if timings.HasField("costs") else None,
        kv_used_tokens=report.kv_used_tokens,
        kv_capacity_tokens=report.kv_capacity_tokens,
        cached_tokens=dict(cached_tokens) if cached_tokens else {},
    )


def _row_finish(finish: worker_pb2.RowFinish) -> RowFinish:
    stop_token = finish.matched_stop_token_id if finish.HasField("matched_stop_token_id") else None
    reason = FINISH_FROM_PROTO.get(finish.reason, FinishReason.ERROR)
    return RowFinish(reason, finish.matched_stop, stop_token)


# --- Out -----------------------------------------------------------------------------------


def stopping_params(spec: RequestSpec) -> generation_pb2.StoppingParams:
    """The stopping part of the stored parameters. Not to be changed."""
    return _params(spec.params_json)[1]


def wants_logprobs(spec: RequestSpec) -> bool:
    return _params(spec.params_json)[0].HasField("logprobs")


@lru_cache(maxsize=256)
def _params(params_json: str) -> tuple[generation_pb2.SamplingParams, generation_pb2.StoppingParams]:
    """What `_params_json` was made of."""
    params: dict[str, Any] = json.loads(params_json)
    return (
        json_format.ParseDict(params.get("sampling", {}), generation_pb2.SamplingParams()),
        json_format.ParseDict(params.get("stopping", {}), generation_pb2.StoppingParams()),
    )


def grant(decided: Grant, output_crc32: int, traceparent: str = "") -> worker_pb2.LeaseGrant:
    request = decided.request
    sampling, stopping = _params(request.spec.params_json)
    message = worker_pb2.LeaseGrant(
        lease_id=decided.lease_id,
        request_id=request.request_id,
        slot=decided.slot,
        output_tokens=request.output_tokens,
        output_crc32=output_crc32,
        has_context=decided.has_context,
        draft_tokens=decided.draft_tokens,
        traceparent=traceparent,
        run_order=_run_order(request),
    )
    message.sampling.CopyFrom(sampling)
    message.stopping.CopyFrom(stopping)
    if decided.has_context:
        message.prompt_token_ids = request.spec.packed_prompt
        message.output_token_ids = bytes(request.output)
    return message


def revoke(decided: Revoke) -> worker_pb2.LeaseRevoke:
    return worker_pb2.LeaseRevoke(
        lease_id=decided.lease_id,
        request_id=decided.request_id,
        reason=REVOKE_TO_PROTO[decided.reason],
        run_order=_run_order(decided.request) if decided.request is not None else None,
    )


def _run_order(request: Request) -> worker_pb2.RunOrder:
    return worker_pb2.RunOrder(priority=request.spec.priority, level=request.level, rank=request.rank)


def complete(request: Request) -> generation_pb2.Complete:
    """The last message of a finished request's stream."""
    assert request.finish_reason is not None
    assert request.finished_s is not None
    output_tokens = request.output_tokens
    message = generation_pb2.Complete(
        finish_reason=FINISH_TO_PROTO[request.finish_reason],
        matched_stop=request.matched_stop,
        usage=generation_pb2.Usage(
            prompt_tokens=request.spec.prompt_tokens,
            completion_tokens=output_tokens,
            cached_tokens=request.cached_tokens,
        ),
        timing=_timing(request, output_tokens),
        speculation=generation_pb2.SpeculationStats(
            num_steps=request.steps,
            num_draft_tokens=request.drafted_tokens,
            num_accepted_tokens=request.accepted_tokens,
            mean_acceptance_length=output_tokens / request.steps if request.steps else 0.0,
            draft_acceptance_rate=(
                request.accepted_tokens / request.drafted_tokens if request.drafted_tokens else 0.0
            ),
            acceptance_histogram=request.acceptance_histogram,
        ),
        error=request.error,
    )
    if request.matched_stop_token_id is not None:
        message.matched_stop_token_id = request.matched_stop_token_id
    return message


def _timing(request: Request, output_tokens: int) -> generation_pb2.Timing:
    finished_s = request.finished_s or request.arrival_s
    # A request that never ran waited for its whole life.
    first_scheduled_s = finished_s if request.first_scheduled_s is None else request.first_scheduled_s
    timing = generation_pb2.Timing(
        queue_time_ms=(first_scheduled_s - request.arrival_s) * 1e3,
        total_time_ms=(finished_s - request.arrival_s) * 1e3,
        preemptions=request.preemptions,
    )
    if request.first_token_s is not None:
        timing.time_to_first_token_ms = (request.first_token_s - request.arrival_s) * 1e3
        if request.last_token_s is not None and output_tokens > 1:
            span_s = request.last_token_s - request.first_token_s
            timing.mean_itl_ms = span_s * 1e3 / (output_tokens - 1)
    return timing
