"""Why a call failed: every stable reason of every service, in this one place."""

from __future__ import annotations

import enum


@enum.unique
class Reason(enum.Enum):
    """Stable reasons (`ErrorInfo.reason`), each with its gRPC status and what it means."""

    FIELD_INVALID = (
        "INVALID_ARGUMENT",
        "A field of the request has a value that cannot be; BadRequest names it.",
    )
    PROMPT_EMPTY = ("INVALID_ARGUMENT", "The prompt has no tokens.")
    PROMPT_TOO_LONG = (
        "INVALID_ARGUMENT",
        "Prompt and output do not fit the model's context; limit_tokens says it.",
    )
    TOKEN_UNKNOWN = (
        "INVALID_ARGUMENT",
        "A token id lies outside the model's vocabulary; vocabulary_size says it.",
    )
    MODEL_UNKNOWN = ("NOT_FOUND", "No pool serves a model of this name.")
    POOL_UNKNOWN = ("NOT_FOUND", "There is no pool of this name here.")
    REQUEST_UNKNOWN = ("NOT_FOUND", "The request was never accepted, or its retention is over.")
    REQUEST_ID_REUSED = (
        "ALREADY_EXISTS",
        "A request with this request_id and another body was accepted before.",
    )
    OFFSET_BEYOND_OUTPUT = (
        "OUT_OF_RANGE",
        "The offset to resume from lies beyond the output; output_tokens says it.",
    )
    QUEUE_FULL = (
        "RESOURCE_EXHAUSTED",
        "As many requests wait as the pool allows; come back later.",
    )
    QUEUE_TOKENS_FULL = (
        "RESOURCE_EXHAUSTED",
        "With this prompt more prompt tokens would wait than the pool allows; come back later.",
    )
    TENANT_QUEUE_FULL = (
        "RESOURCE_EXHAUSTED",
        "The tenant has as many unfinished requests, or tokens of them, as it may; come back later.",
    )
    RATE_EXCEEDED = ("RESOURCE_EXHAUSTED", "The tenant sends more requests a second than it may.")
    STREAMS_FULL = (
        "RESOURCE_EXHAUSTED",
        "The gateway has as many client streams as it may; come back later.",
    )
    CLIENT_TOO_SLOW = (
        "RESOURCE_EXHAUSTED",
        "The client reads too slowly and lost its stream; it can resume.",
    )
    MESSAGE_TOO_LARGE = ("RESOURCE_EXHAUSTED", "A message is larger than max_message_bytes.")
    STORE_FULL = ("RESOURCE_EXHAUSTED", "The store has no memory for another request; come back later.")
    DEADLINE_PASSED = ("DEADLINE_EXCEEDED", "The deadline had passed before the request was accepted.")
    SCHEDULER_UNREACHABLE = ("UNAVAILABLE", "The gateway has no connection to the pool's scheduler.")
    STORE_UNREACHABLE = ("UNAVAILABLE", "The scheduler has no connection to its store.")
    NOT_LEADER = ("UNAVAILABLE", "This scheduler does not lead the pool; another does or will soon.")
    POOL_STOPPED = (
        "UNAVAILABLE",
        "The pool's store has lost something that it had stored; an operator has to look (laps pool status).",
    )
    SHUTTING_DOWN = ("UNAVAILABLE", "The service is being stopped; another or the next one goes on.")
    NOT_READY = ("UNAVAILABLE", "The service has started and is not ready yet.")
    UNREACHABLE = ("UNAVAILABLE", "There is no connection to the server.")
    STREAM_LOST = ("UNAVAILABLE", "The stream ended before the request did.")
    EPOCH_STALE = ("ABORTED", "The caller acts on the word of a leader that has been replaced.")
    MODEL_MISMATCH = ("FAILED_PRECONDITION", "The worker's models are not the ones that the pool serves.")
    OUTPUT_INCOMPLETE = (
        "DATA_LOSS",
        "The stored output contradicts what was delivered; this must never happen.",
    )
    RECORD_DAMAGED = (
        "DATA_LOSS",
        "What the store holds of the request cannot be read; others are not affected.",
    )
    UNAUTHENTICATED = ("UNAUTHENTICATED", "The call carries no valid credentials.")
    PERMISSION_DENIED = ("PERMISSION_DENIED", "The caller may not do this.")
    CANCELLED = ("CANCELLED", "The call was cancelled by its caller.")
    UNIMPLEMENTED = ("UNIMPLEMENTED", "The server does not know this method.")
    INTERNAL = ("INTERNAL", "The service has a defect; its log has the details.")
    UNKNOWN = ("UNKNOWN", "The call ended with a status that carries no reason.")

    def __init__(self, status: str, sentence: str) -> None:
        self.status = status
        self.sentence = sentence
