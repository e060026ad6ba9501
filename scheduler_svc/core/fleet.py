"""Workers in session: they join, fall silent, drain and leave."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

from scheduler_svc.core.board import Board
from scheduler_svc.core.records import TOKEN_BYTES, Resident, Revoke, RevokeReason, Worker
from scheduler_svc.core.settings import SchedulerSettings

RENEWALS_PER_TIMEOUT = 4
"""A worker's session and leases are renewed in the store so often per session timeout, or a little less."""


class Fleet:
    def __init__(self, board: Board, settings: SchedulerSettings) -> None:
        self.context_tokens = 0
        """Of the worker with the largest context; kept after the last one has gone. 0: none has told."""
        self.restored = False
        """There are requests that workers of an earlier leader may have had room for."""
        self._board = board
        self._workers = board.pool.workers
        self._settings = settings
        self._renewed_s: dict[str, float] = {}
        """By worker; the one that was renewed longest ago is the first."""
        self._renewed_last_s = float("-inf")

    def join(self, worker: Worker, resident: Sequence[Resident], now_s: float) -> None:
        board = self._board
        if worker.slots < 1:
            raise ValueError(f"worker {worker.worker_id!r} has no slots")
        if worker.worker_id in self._workers:
            self.remove(worker.worker_id, "its worker began a new session")
        worker.running = [None] * worker.slots
        worker.last_seen_s = now_s
        self._workers[worker.worker_id] = worker
        # Popped from the end, so the lowest slot is taken first.
        board.free[worker.worker_id] = list(range(worker.slots - 1, -1, -1))
        self._measure()
        for entry in resident:
            request = board.live.get(entry.request_id)
            if request is not None and not request.lease_id and _may_agree(entry, request.output):
                if request.worker_id != worker.worker_id:
                    board.forget_kv(request)
                request.worker_id = worker.worker_id
                request.kv_resident = True
                request.book.short_prefix = entry.output_tokens < request.output_tokens
                board.ledger.changed(request)
            else:
                board.ledger.revoke(Revoke(worker.worker_id, 0, entry.request_id, RevokeReason.ENDED))
        self._renew(worker, now_s)
        board.ledger.event("worker_joined", worker_id=worker.worker_id, detail=f"{worker.slots} slots")

    def drain(self, worker: Worker, now_s: float) -> None:
        if not worker.draining:
            worker.draining = True
            self._renew(worker, now_s)
            self._board.ledger.event("worker_draining", worker_id=worker.worker_id)

    def remove(self, worker_id: str, because: str) -> None:
        """Its requests wait again, and the KV cache that it held is gone."""
        board = self._board
        worker = self._workers.pop(worker_id)
        board.forget_worker(worker_id)
        del self._renewed_s[worker_id]
        for request in list(board.live.values()):
            if request.worker_id == worker_id:
                request.kv_resident = False
                if request.lease_id:
                    board.take_back(request, because, keep_kv=False)
        worker.running = []
        board.ledger.worker_gone(worker_id)
        self._measure()

    def expire(self, now_s: float) -> None:
        """Gives up workers that fell silent and renews the leases of the others."""
        timeout_s = self._settings.session_timeout_s
        for worker in list(self._workers.values()):
            # The same sums as in `timers`: a difference could round to the other side of the instant.
            if now_s >= worker.last_seen_s + timeout_s:
                silent_s = now_s - worker.last_seen_s
                self.remove(worker.worker_id, f"its worker said nothing for {silent_s:.1f} s")
                detail = f"silent for {silent_s:.1f} s"
                self._board.ledger.event("worker_lost", worker_id=worker.worker_id, detail=detail)
        if -math.inf < self._board.larger_until_s <= now_s:
            self._look_for_contexts()
        due_s = self._next_renewal_s()
        if due_s is not None and now_s >= due_s:
            self._renew(self._workers[next(iter(self._renewed_s))], now_s)

    def timers(self) -> Iterator[float]:
        """Instants at which `expire` has something to do."""
        timeout_s = self._settings.session_timeout_s
        for worker in self._workers.values():
            yield worker.last_seen_s + timeout_s
        if self._board.larger_until_s > -math.inf:
            yield self._board.larger_until_s
        due_s = self._next_renewal_s()
        if due_s is not None:
            yield due_s

    def _next_renewal_s(self) -> float | None:
        """When the next worker is renewed. Not two at once, and none later than one and a half intervals
        after its last renewal: workers that joined together would be renewed together for ever, and a
        thousand leases make a long commit, in which nobody is answered."""
        if not self._renewed_s:
            return None
        interval_s = self._settings.session_timeout_s / RENEWALS_PER_TIMEOUT
        oldest_s = next(iter(self._renewed_s.values()))
        return max(oldest_s + interval_s, self._renewed_last_s + interval_s / (2 * len(self._renewed_s)))

    def _renew(self, worker: Worker, now_s: float) -> None:
        self._renewed_s.pop(worker.worker_id, None)
        self._renewed_s[worker.worker_id] = self._renewed_last_s = now_s
        ledger = self._board.ledger
        ledger.worker(worker, worker.last_seen_s + self._settings.session_timeout_s)
        for request in worker.running:
            if request is not None:
                ledger.leased(request, worker.last_seen_s + self._settings.lease_duration_s)

    def _measure(self) -> None:
        self._board.pool.measure()
        self._board.changed = True
        largest_tokens = max([worker.context_tokens for worker in self._workers.values()], default=0)
        if largest_tokens:
            # Workers cut their context to the memory that they find, so those of one model differ. One that
            # is started anew takes its time, and after a takeover all come back one after the other.
            first = self.restored and not self.context_tokens
            if first or largest_tokens < self.context_tokens:
                self._board.larger_until_s = self._board.pool.now_s + self._settings.lease_duration_s
            self.context_tokens = largest_tokens
        self._look_for_contexts()

    def _look_for_contexts(self) -> None:
        board = self._board
        if board.larger_until_s <= board.pool.now_s:
            if board.larger_until_s > -math.inf:
                board.changed = True
            board.larger_until_s = -math.inf
        contexts = {worker.context_tokens for worker in self._workers.values()}
        board.by_context = len(contexts) > 1 or board.larger_until_s > -math.inf


def _may_agree(entry: Resident, output: bytearray) -> bool:
    """Whether the worker's tokens are the first of the stored ones. A worker that is ahead of the store, as
    most are when a leader dies, compares for itself: the grant tells how much is stored, and its digest."""
    size = entry.output_tokens * TOKEN_BYTES
    return size > len(output) or zlib.crc32(output[:size]) == entry.output_crc32
