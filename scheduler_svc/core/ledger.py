"""Collects what one tick must store and send."""

from __future__ import annotations

from heapq import heappop, heappush

from scheduler_svc.core.records import (
    TOKEN_BYTES,
    Append,
    Commit,
    Emitted,
    Event,
    Grant,
    QueueMove,
    Request,
    RequestState,
    Revoke,
    Tick,
    Worker,
    emitted_of,
)

MAX_RECORDS_PER_S = 500.0
"""Records of running requests that are written per second at most because they have become old: with many
running requests each is written less often."""
MAX_RECORDS_AT_ONCE = 16
"""What one tick may make up for of that. Requests that got their slots together grow old together: to write
each as soon as that is due would be a train of long ticks and long commits, in which nobody is answered."""
_RECORDS_PAUSE_S = 0.005
"""Until the next tick where some were left for it and nothing else happens."""


class Ledger:
    """Entries about the same thing within one tick merge: the last word counts."""

    def __init__(self, record_interval_s: float) -> None:
        self._record_interval_s = record_interval_s
        self._running = 0
        self._allowed = float(MAX_RECORDS_AT_ONCE)
        """Records that may be written now."""
        self._asked_s = float("-inf")
        """When it was last asked for records."""
        self._unwritten: list[tuple[int, int, Request]] = []
        """Heap of (tick that wrote the record, arrival, request): did steps since then, and the record was
        not old enough to be written again. Entries of records that were written since are dead."""
        self.tick = 1
        """Number of the tick that is being collected."""
        self.logged_tick = -1
        """All output of the ticks up to this one is in the token logs."""
        self._reset()

    def _reset(self) -> None:
        self.events: list[Event] = []
        self.forgotten: list[str] = []
        self.grants: dict[int, Grant] = {}
        self.learnt: dict[str, str] = {}
        self._revokes: list[Revoke] = []
        self._submitted: dict[str, Request] = {}
        self._changed: dict[str, Request] = {}
        self._finished: dict[str, Request] = {}
        self.emitted: list[Emitted] = []
        self._logprobs: dict[int, bytes] = {}
        self._appended: list[Append] = []
        self._moves: dict[str, QueueMove] = {}
        self._leases: dict[str, float | None] = {}
        self._workers: dict[str, tuple[Worker, float] | None] = {}

    # --- What happened ------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        self._submitted[request.request_id] = request

    def changed(self, request: Request) -> None:
        """Its record is to be written in any case."""
        self._changed[request.request_id] = request

    def aged(self, request: Request) -> None:
        """It has done a step, the first one since its record was written: the record is written again when it
        has become old."""
        book = request.book
        book.unwritten = True
        heappush(self._unwritten, (book.written_tick, request.arrival_seq, request))

    def emitted_with_logprobs(self, request: Request, offset: int, logprobs: bytes) -> None:
        """What `request` grew by from `offset` on, and what belongs to that. Log probabilities are opaque to
        us, so each such row becomes a log entry of its own, at once: the journal has no place for them."""
        self._logprobs[len(self.emitted)] = logprobs
        self.emitted.append(
            emitted_of([(request.request_id, offset, bytes(request.output[offset * TOKEN_BYTES :]))])
        )
        self._flush(request, until=offset)
        self._flush(request, logprobs=logprobs)
        self.changed(request)

    def finished(self, request: Request) -> None:
        self._flush(request)
        self._finished[request.request_id] = request
        self.event("finished", request, detail=_ending(request))

    def moved(self, request: Request) -> None:
        """It waits, at its present level and rank."""
        self._moves[request.request_id] = QueueMove(request.request_id, request.level, request.rank)

    def left_queue(self, request: Request) -> None:
        self._moves[request.request_id] = QueueMove(request.request_id, None)

    def leased(self, request: Request, expiry_s: float) -> None:
        self._leases[request.request_id] = expiry_s

    def unleased(self, request: Request) -> None:
        self._leases[request.request_id] = None

    def revoke(self, revoke: Revoke) -> None:
        # Only a grant that is sent for the second time can be pending here: the worker knows the lease.
        self.grants.pop(revoke.lease_id, None)
        self._revokes.append(revoke)

    def worker(self, worker: Worker, expiry_s: float) -> None:
        self._workers[worker.worker_id] = (worker, expiry_s)

    def worker_gone(self, worker_id: str) -> None:
        self._workers[worker_id] = None
        self._revokes = [revoke for revoke in self._revokes if revoke.worker_id != worker_id]
        self.grants = {lease: grant for lease, grant in self.grants.items() if grant.worker_id != worker_id}

    def event(self, kind: str, request: Request | None = None, worker_id: str = "", detail: str = "") -> None:
        request_id = "" if request is None else request.request_id
        if request is not None and not worker_id:
            worker_id = request.worker_id
        self.events.append(Event(kind, request_id, worker_id, detail))

    # --- The tick -----------------------------------------------------------------------

    def records_due(self, now_s: float, running: int) -> list[Request]:
        """Running requests whose record must be written in this tick. `running`: how many requests hold a
        slot."""
        self._running = running
        written_until_s = now_s - self._interval_s()
        earned = (now_s - self._asked_s) * MAX_RECORDS_PER_S
        self._asked_s = now_s
        self._allowed = min(self._allowed + earned, MAX_RECORDS_AT_ONCE)
        due: list[Request] = []
        while (
            len(due) < int(self._allowed)
            and (oldest := self._oldest_unwritten()) is not None
            and oldest.book.written_s <= written_until_s
        ):
            heappop(self._unwritten)
            oldest.book.unwritten = False
            due.append(oldest)
        self._allowed -= len(due)
        return due

    def next_record_s(self) -> float | None:
        """When the next record must be written even if nothing happens until then: what is stored is not
        older than the record interval, and as much more as many of one age take."""
        oldest = self._oldest_unwritten()
        if oldest is None:
            return None
        return max(oldest.book.written_s + self._interval_s(), self._asked_s + _RECORDS_PAUSE_S)

    def _oldest_unwritten(self) -> Request | None:
        unwritten = self._unwritten
        while unwritten and _is_dead(unwritten[0]):
            heappop(unwritten)
        return unwritten[0][2] if unwritten else None

    def _interval_s(self) -> float:
        return max(self._record_interval_s, self._running / MAX_RECORDS_PER_S)

    def take(self, now_s: float) -> Tick:
        """Everything collected; the ledger is empty afterwards."""
        new_or_ended = self._submitted.keys() | self._finished.keys()
        changed = [request for request_id, request in self._changed.items() if request_id not in new_or_ended]
        for request in (*self._submitted.values(), *changed):
            # What a record tells of its log is so: it is written together with it.
            self._flush(request)
            book = request.book
            book.written_s = now_s
            book.written_tick = self.tick
            book.unwritten = False
        oldest = self._oldest_unwritten()
        self.logged_tick = self.tick if oldest is None else oldest.book.written_tick
        commit = Commit(
            tick=self.tick,
            logged_tick=self.logged_tick,
            submitted=list(self._submitted.values()),
            emitted=self.emitted,
            logprobs=self._logprobs,
            appended=self._appended,
            changed=changed,
            moves=list(self._moves.values()),
            leased=[(name, expiry) for name, expiry in self._leases.items() if expiry is not None],
            unleased=[name for name, expiry in self._leases.items() if expiry is None],
            finished=list(self._finished.values()),
            forgotten=self.forgotten,
            workers=[entry for entry in self._workers.values() if entry is not None],
            workers_gone=[worker_id for worker_id, entry in self._workers.items() if entry is None],
            events=self.events,
            learnt=self.learnt,
        )
        tick = Tick(commit=commit, grants=list(self.grants.values()), revokes=self._revokes)
        self.tick += 1
        self._reset()
        return tick

    def _flush(self, request: Request, until: int | None = None, logprobs: bytes = b"") -> None:
        book = request.book
        start = book.logged_tokens
        end = request.output_tokens if until is None else until
        if end > start:
            book.logged_tokens = end
            request.log_entries += 1
            tokens = bytes(request.output[start * TOKEN_BYTES : end * TOKEN_BYTES])
            self._appended.append(Append(request.request_id, request.log_entries, start, tokens, logprobs))


def _is_dead(entry: tuple[int, int, Request]) -> bool:
    book = entry[2].book
    return not book.unwritten or book.written_tick != entry[0] or entry[2].state is RequestState.FINISHED


def _ending(request: Request) -> str:
    assert request.state is RequestState.FINISHED
    reason = "" if request.finish_reason is None else request.finish_reason.value
    return f"{reason}: {request.error}" if request.error else reason
