"""Between the wire (protos) and the engine's own types."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from laps.v1 import generation_pb2, worker_pb2
from worker_svc.engine import (
    EngineRequest,
    FinishReason,
    SamplingConfig,
    StepCosts,
    StepResult,
    StoppingConfig,
    TokenLogprob,
)

FINISH_TO_PROTO = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


def unpack_tokens(packed: bytes) -> array[int]:
    """Little-endian unsigned 32-bit integers as an array."""
    tokens = array("I", packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def engine_request(grant: worker_pb2.LeaseGrant) -> EngineRequest:
    """The request of a grant with context, without its output."""
    sampling, stopping = grant.sampling, grant.stopping
    return EngineRequest(
        request_id=grant.request_id,
        prompt_token_ids=unpack_tokens(grant.prompt_token_ids),
        sampling=SamplingConfig(
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=(
                sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
            ),
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            seed=sampling.seed if sampling.HasField("seed") else None,
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        ),
        stopping=StoppingConfig(
            max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
            min_tokens=stopping.min_tokens,
            stop=tuple(stopping.stop),
            stop_token_ids=tuple(stopping.stop_token_ids),
            ignore_eos=stopping.ignore_eos,
        ),
    )


def resumed(
    request: EngineRequest, output: Sequence[int], draft_tokens: int, run_order: tuple[float, ...]
) -> EngineRequest:
    """The same request, to go on after `output`."""
    return replace(request, output_token_ids=output, draft_tokens=draft_tokens, run_order=run_order)


def run_order(order: worker_pb2.RunOrder) -> tuple[float, ...]:
    """Lower runs earlier."""
    return (-float(order.priority), float(order.level), order.rank)


def step_report(result: StepResult, lease_ids: Sequence[int]) -> worker_pb2.StepReport:
    """A step as the wire has it; `lease_ids[i]` is the lease of row i. What else a report has is the
    caller's to fill in."""
    report = worker_pb2.StepReport(
        lease_ids=lease_ids,
        offsets=result.offsets,
        emitted_counts=result.emitted_counts,
        drafted_counts=result.drafted_counts,
        accepted_counts=result.accepted_counts,
        token_ids=result.token_ids.astype("<u4").tobytes(),
        timings=worker_pb2.StepTimings(
            prefill_s=result.prefill_s,
            draft_s=result.draft_s,
            verify_s=result.verify_s,
            step_s=result.step_s,
            switched_rows=result.switched,
            switch_s=result.switch_s,
        ),
        kv_used_tokens=result.kv.tokens,
        cached_tokens=result.cached_tokens,
    )
    for row, finish in enumerate(result.finish):
        if finish is not None:
            report.finishes.append(_row_finish(row, finish, result.matched_stop[row]))
    for row, logprobs in enumerate(result.logprobs):
        if logprobs is not None:
            report.logprobs[row].logprobs.extend(map(_token_logprob, logprobs))
    return report


class Costs(NamedTuple):
    """The engine's measured times for a scheduler that takes every step to draft the same number of tokens;
    `switch_s` is one request's return to a slot.
    """

    draft_token_s: float
    verify_s: float
    prefill_token_s: float
    switch_s: float

    @classmethod
    def measured(cls, costs: StepCosts, draft_tokens: int, switch_s: float) -> Costs:
        return cls(costs.draft_s(draft_tokens), costs.verify_s, costs.prefill_s_per_token, switch_s)

    def to_proto(self) -> worker_pb2.StepCosts:
        return worker_pb2.StepCosts(**self._asdict())


def _row_finish(row: int, reason: FinishReason, matched: str | int | None) -> worker_pb2.RowFinish:
    finish = worker_pb2.RowFinish(row=row, reason=FINISH_TO_PROTO[reason])
    if isinstance(matched, str):
        finish.matched_stop = matched
    elif matched is not None:
        finish.matched_stop_token_id = matched
    return finish


def _token_logprob(entry: TokenLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        logprob=entry.logprob,
        top=[generation_pb2.TopLogprob(token_id=token, logprob=value) for token, value in entry.alternatives],
    )
