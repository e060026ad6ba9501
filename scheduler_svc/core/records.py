"""The scheduler's vocabulary: what comes in, what is decided, what must be stored.

Nothing here does anything. The core fills these records, the store writes them, the
service and the simulator carry them to workers. Instants are seconds since the Unix
epoch (or of a virtual clock), durations are seconds, token ids travel packed as
little-endian unsigned 32-bit integers, so that nobody on the way makes an object per token.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

TOKEN_BYTES = 4
"""Bytes of one packed token id."""
MAX_DRAFTED_TOKENS = 1024
"""A step that claims to have drafted more is not believed; bounds the histogram of a request."""


_SWAP = array("I", [1]).tobytes() != b"\x01\0\0\0"


def unpacked(token_ids: bytes) -> array[int]:
    """Packed tokens as numbers."""
    tokens = array("I", token_ids)
    if _SWAP:
        tokens.byteswap()
    return tokens


class RequestState(enum.StrEnum):
    QUEUED = "queued"
    """Waits, has not run yet."""
    RUNNING = "running"
    """Holds a lease on a worker's slot."""
    PREEMPTED = "preempted"
    """Has run, waits again."""
    FINISHED = "finished"
    """Terminal; the finish reason says how."""


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class RevokeReason(enum.StrEnum):
    PREEMPTED = "preempted"
    """Leave the slot, keep the KV cache while there is room."""
    ENDED = "ended"
    """The request has ended or runs elsewhere: forget it."""


class LatePrompt(Protocol):
    """A prompt that is packed when somebody needs it."""

    @property
    def tokens(self) -> int: ...

    def packed(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """An accepted request as the gateway validated it. `params_json` is opaque to the core."""

    request_id: str
    prompt: bytes | LatePrompt
    """Packed token ids, or what makes them: `packed_prompt`."""
    max_tokens: int
    params_json: str = "{}"
    """Sampling and stopping parameters for the worker, as JSON."""
    request_class: str = ""
    priority: int = 0
    """Higher runs before lower, whatever the policy thinks."""
    predicted_output_tokens: float | None = None
    """The client's estimate of the output length."""
    deadline_s: float | None = None
    cancel_on_disconnect: bool = True
    disconnect_grace_s: float = 0.0
    digest: str = ""
    """Hex digest of the client's request: the same id with another digest is refused."""
    traceparent: str = ""
    """W3C trace context, for whoever watches; empty: none."""

    @property
    def prompt_tokens(self) -> int:
        prompt = self.prompt
        return len(prompt) // TOKEN_BYTES if isinstance(prompt, bytes) else prompt.tokens

    @property
    def packed_prompt(self) -> bytes:
        prompt = self.prompt
        return prompt if isinstance(prompt, bytes) else prompt.packed()

    @property
    def tenant(self) -> str:
        """The part of the id before the colon; empty: it belongs to none."""
        return self.request_id.rpartition(":")[0]


@dataclass(frozen=True, slots=True)
class TenantQuota:
    """What the unfinished requests of one tenant may come to; None: no bound."""

    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    """Prompt tokens and output bounds together."""


@dataclass(slots=True, eq=False)
class Bookkeeping:
    """What the scheduler keeps about a live request for itself; not stored."""

    logged_tokens: int = 0
    """Output tokens that are in its log. Those beyond are in the journal."""
    written_s: float = float("-inf")
    written_tick: int = 0
    """The tick that wrote its record last, and with it all of its output to its log."""
    unwritten: bool = False
    """Did a step since its record was written."""
    refused_rows: int = 0
    short_prefix: bool = False
    """The worker holds the KV cache of only a part of the output, so context must be sent."""
    overdue: bool = False
    """Past the starvation bound."""


@dataclass(slots=True, eq=False)
class Request:
    """A request and everything that the scheduler knows and believes about it."""

    spec: RequestSpec
    arrival_s: float
    arrival_seq: int = 0
    """Order of acceptance; breaks every tie."""
    state: RequestState = RequestState.QUEUED

    # What has happened.
    output: bytearray = field(default_factory=bytearray)
    """Packed output tokens."""
    log_entries: int = 0
    """Entries of the stored token log."""
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    """Entry a counts the steps in which a drafted tokens were accepted."""
    attained_s: float = 0.0
    """Seconds of decoding that it has had."""
    preemptions: int = 0
    preempted_because: str = ""
    first_scheduled_s: float | None = None
    leased_s: float | None = None
    """When it got the slot that it holds, or held last."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    finish_reason: FinishReason | None = None
    matched_stop: str = ""
    matched_stop_token_id: int | None = None
    error: str = ""
    cached_tokens: int = 0

    # What the policy believes. Written by policies only.
    level: int = 0
    """Queue level, 0 is the highest."""
    rank: float = 0.0
    """Order inside the level, lower runs earlier."""
    perceptible: bool = False
    acceptance_estimate: float = 0.0
    """Expected share of drafted tokens that the target accepts."""
    predicted_output_tokens: float = 0.0
    perceived_s: float = 0.0
    """Estimated seconds of service still needed."""
    policy_data: Any = None
    """Whatever else the policy in force keeps about this request; not stored."""

    # Where it is.
    worker_id: str = ""
    """The worker that runs it or was last seen with its KV cache."""
    slot: int = 0
    lease_id: int = 0
    """0: no lease."""
    releasing: bool = False
    """Preempted, but the worker has not yet said that it let go."""
    kv_resident: bool = False
    """Whether `worker_id` is believed to hold its KV cache."""
    book: Bookkeeping = field(default_factory=Bookkeeping, repr=False)
    """The scheduler's own; not stored."""

    @property
    def request_id(self) -> str:
        return self.spec.request_id

    @property
    def output_tokens(self) -> int:
        return len(self.output) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Measured times of a worker's engine, in seconds."""

    draft_token_s: float
    """One drafted token (T_ssm)."""
    verify_s: float
    """One verification (T_llm)."""
    prefill_token_s: float = 0.0
    switch_s: float = 0.0
    """One request's return to a slot."""

    def step_s(self, draft_tokens: int) -> float:
        """Seconds of one iteration: n * T_ssm + T_llm (LAPS-SD, arXiv 2505.17074)."""
        return draft_tokens * self.draft_token_s + self.verify_s


@dataclass(frozen=True, slots=True)
class Resident:
    """A request whose KV cache a worker holds when its session begins."""

    request_id: str
    output_tokens: int
    output_crc32: int


@dataclass(slots=True, eq=False)
class Worker:
    """A worker in session with the scheduler."""

    worker_id: str
    slots: int
    costs: StepCosts
    device: str = ""
    target: str = ""
    draft: str = ""
    model_fingerprint: str = ""
    vocabulary_size: int = 0
    context_tokens: int = 0
    draining: bool = False
    last_seen_s: float = 0.0
    steps: int = 0
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    running: list[Request | None] = field(default_factory=list)
    """By slot."""
    expected_rows: list[Request] = field(default_factory=list, repr=False)
    """Of its last report, those that go on, in their order. Their leases may have ended since."""


@dataclass(frozen=True, slots=True)
class RowFinish:
    reason: FinishReason
    matched_stop: str = ""
    matched_stop_token_id: int | None = None


@dataclass(slots=True)
class StepReport:
    """What one step did to the leases of one worker. Entry i of each column is one lease."""

    worker_id: str
    lease_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Output tokens before the step."""
    emitted_counts: list[int] = field(default_factory=list)
    drafted_counts: list[int] = field(default_factory=list)
    accepted_counts: list[int] = field(default_factory=list)
    token_ids: bytes = b""
    """All emitted tokens, packed, in the order of the columns."""
    finishes: dict[int, RowFinish] = field(default_factory=dict)
    """By row."""
    released: Sequence[int] = ()
    """Leases whose revocation is done."""
    missing: Sequence[int] = ()
    """Leases granted without context whose KV cache the worker does not hold."""
    errors: dict[int, str] = field(default_factory=dict)
    """By lease."""
    evicted: Sequence[str] = ()
    """Requests whose KV cache the worker has dropped."""
    logprobs: dict[int, bytes] = field(default_factory=dict)
    """By row, opaque."""
    step_s: float = 0.0
    """Seconds of the whole step."""
    costs: StepCosts | None = None
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)
    """By row: prompt tokens whose KV cache was there already, in a request's first row."""


# --- Decisions ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    worker_id: str
    lease_id: int
    slot: int
    request: Request
    has_context: bool
    """Whether prompt and output must be sent along."""
    draft_tokens: int


@dataclass(frozen=True, slots=True)
class Revoke:
    worker_id: str
    lease_id: int
    request_id: str
    reason: RevokeReason
    request: Request | None = None
    """The preempted request, whose place in the order of running goes along."""


# --- What must be stored -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Emitted:
    """Output of several requests, by columns: mostly all that one report has added, as it came. A request
    has one row at most."""

    request_ids: Sequence[str]
    offsets: Sequence[int]
    """Output tokens before these."""
    counts: Sequence[int]
    token_ids: bytes
    """Packed tokens of all rows, one behind another."""
    drafted: Sequence[int] = ()
    """Tokens that were drafted in the step that each row is of; empty: the rows are of no step, or it is not
    known."""
    accepted: Sequence[int] = ()
    """Those of them that the target accepted."""
    step_s: float = 0.0
    """Seconds of that step."""

    def rows(self) -> Iterator[tuple[str, int, bytes]]:
        """Request, offset and packed tokens of each."""
        end = 0
        for request_id, offset, count in zip(self.request_ids, self.offsets, self.counts, strict=True):
            begin, end = end, end + count * TOKEN_BYTES
            yield request_id, offset, self.token_ids[begin:end]

    def count_of(self, request_id: str) -> int:
        """Tokens of one request; 0: it has no row."""
        ids = self.request_ids
        return self.counts[ids.index(request_id)] if request_id in ids else 0

    def of(self, request_ids: Container[str]) -> Emitted:
        """The rows of these requests alone."""
        return emitted_of(row for row in self.rows() if row[0] in request_ids)


def emitted_of(rows: Iterable[tuple[str, int, bytes]]) -> Emitted:
    """By columns what came as rows (request, offset, packed tokens)."""
    ids, offsets, pieces = [], [], []
    for request_id, offset, token_ids in rows:
        ids.append(request_id)
        offsets.append(offset)
        pieces.append(token_ids)
    return Emitted(ids, offsets, [len(piece) // TOKEN_BYTES for piece in pieces], b"".join(pieces))


@dataclass(frozen=True, slots=True)
class Append:
    """Entry `entry` (from 1) of a request's token log."""

    request_id: str
    entry: int
    offset: int
    """Output tokens before these."""
    token_ids: bytes
    logprobs: bytes = b""


@dataclass(frozen=True, slots=True)
class QueueMove:
    """Where a request waits now; `level` None: it waits no longer."""

    request_id: str
    level: int | None
    rank: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the pool's readable history."""

    kind: str
    request_id: str = ""
    worker_id: str = ""
    detail: str = ""


@dataclass(slots=True)
class Commit:
    """Everything durable that one tick changed. Written in one atomic call."""

    tick: int = 0
    """Number of the tick, from 1 in each leadership; 0: not known."""
    logged_tick: int = -1
    """With this commit, all output of the ticks up to this one is in the token logs; -1: not known."""
    submitted: list[Request] = field(default_factory=list)
    emitted: list[Emitted] = field(default_factory=list)
    """All output of this tick. What of it is not appended to its log yet, the journal keeps until it is."""
    logprobs: dict[int, bytes] = field(default_factory=dict)
    """Log probabilities of entries of `emitted` with one row each, by their place in it."""
    appended: list[Append] = field(default_factory=list)
    """Of requests whose record is written, or that have log probabilities."""
    changed: list[Request] = field(default_factory=list)
    """Live requests whose record is to be written anew (not those submitted or finished)."""
    moves: list[QueueMove] = field(default_factory=list)
    leased: list[tuple[str, float]] = field(default_factory=list)
    """(request_id, expiry): new and renewed leases."""
    unleased: list[str] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    """Finished requests past retention."""
    workers: list[tuple[Worker, float]] = field(default_factory=list)
    """(worker, expiry of its session)."""
    workers_gone: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    learnt: dict[str, str] = field(default_factory=dict)
    """What the policy has learnt, by name; merged into what is stored."""

    def __bool__(self) -> bool:
        return bool(
            self.submitted
            or self.emitted
            or self.appended
            or self.changed
            or self.moves
            or self.leased
            or self.unleased
            or self.finished
            or self.forgotten
            or self.workers
            or self.workers_gone
            or self.events
            or self.learnt
        )


@dataclass(slots=True)
class Tick:
    """What the core decided since the last tick. The commit comes first; only when it is
    stored may tokens, acknowledgements, grants and revokes be seen by anyone."""

    commit: Commit
    grants: list[Grant] = field(default_factory=list)
    revokes: list[Revoke] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Retained:
    """A finished request that is still kept for readers and for joins by its id."""

    request_id: str
    digest: str
    finished_s: float


@dataclass(slots=True)
class Recovered:
    """What the store held when a leader took over."""

    requests: list[Request] = field(default_factory=list)
    """Live ones, with prompt, output and counters; all without lease."""
    retained: list[Retained] = field(default_factory=list)
    learnt: dict[str, str] = field(default_factory=dict)


# --- Refusals -------------------------------------------------------------------------------


class Refused(Exception):
    """A submission that was not accepted. Nothing was stored."""

    def __init__(self, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        """Stable, upper case, for machines: QUEUE_FULL, QUEUE_TOKENS_FULL, TENANT_QUEUE_FULL,
        ID_CONFLICT, DEADLINE_PASSED, TOO_LONG."""
        self.retry_after_s = retry_after_s
