"""What the console shows, as JSON types. Names are the contract's; no text of a prompt or output is in it."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from laps.client.results import enum_word
from laps.v1 import generation_pb2, queue_pb2

_STATES = queue_pb2.RequestState.DESCRIPTOR
_REASONS = generation_pb2.FinishReason.DESCRIPTOR

ROW = (
    "request_id", "request_class", "priority", "arrival_s", "deadline_s", "prompt_tokens", "max_tokens",
    "output_tokens", "level", "rank", "perceptible", "acceptance_estimate", "predicted_output_tokens",
    "perceived_service_s", "attained_service_s", "num_steps", "num_draft_tokens", "num_accepted_tokens",
    "preemptions", "preempted_because", "worker_id", "slot", "first_scheduled_s", "first_token_s",
    "finished_s", "error", "leased_s",
)  # fmt: skip
"""Of a request."""
POOL = ("pool", "policy", "epoch", "commit_seq", "leader", "waiting", "running", "backlog_s")
WORKER = (
    "worker_id", "device", "last_seen_s", "draining", "draft_ms", "verify_ms", "switch_ms", "num_steps",
    "kv_used_tokens", "kv_capacity_tokens",
)  # fmt: skip
EVENT = ("time_s", "kind", "worker_id", "detail")

Json = dict[str, Any]


def request(info: queue_pb2.RequestInfo) -> Json:
    shown = _fields(info, ROW)
    shown["state"] = enum_word(_STATES, info.state)
    shown["finish_reason"] = enum_word(_REASONS, info.finish_reason)
    return shown


def pool(queues: queue_pb2.PoolQueues) -> Json:
    """Without the heads of the levels: who looks at a level asks for the window that he sees."""
    shown = _fields(queues, POOL)
    shown["levels"] = [_fields(level, ("level", "threshold_s", "waiting")) for level in queues.levels]
    return shown


def worker(info: queue_pb2.WorkerInfo) -> Json:
    shown = _fields(info, WORKER)
    shown["slots"] = [_fields(slot, ("slot", "request_id", "lease_expires_s")) for slot in info.slots]
    return shown


def timeline(answer: queue_pb2.GetTimelineResponse) -> Json:
    shown = request(answer.request)
    shown["acceptance_histogram"] = list(answer.request.acceptance_histogram)
    return {
        "time_s": answer.time_s,
        "request": shown,
        "events": [_fields(event, EVENT) for event in answer.events],
        "events_lost": answer.events_lost,
        "tokens_per_entry": list(answer.tokens_per_entry),
        "position": answer.position if answer.HasField("position") else None,
    }


def _fields(message: Message, names: tuple[str, ...]) -> Json:
    return {name: getattr(message, name) for name in names}
