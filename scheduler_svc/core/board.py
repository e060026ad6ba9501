"""The board: who waits, who runs where, and the moves between those places.

Every change of a request's state goes through one of the methods here, so the bookkeeping
(queue, slots, leases, counts, what must be stored) cannot fall apart.
"""

from __future__ import annotations

import math

from scheduler_svc.core.keyed_heap import KeyedHeap
from scheduler_svc.core.ledger import Ledger
from scheduler_svc.core.policies.base import Policy
from scheduler_svc.core.pool import PoolView
from scheduler_svc.core.records import (
    FinishReason,
    Grant,
    Request,
    RequestState,
    Retained,
    Revoke,
    RevokeReason,
    Worker,
)
from scheduler_svc.core.retention import Retention

OVERDUE_RANK = -1e15
"""Below every rank of a policy. Far from the limits of a double, so adding an arrival number is exact."""


MANY_RUNNING = 256
SOUGHT_AFTER_S = 0.1
"""With more running requests than that, the one of a worker that should make room first is not sought again
after each change of ranks, but so often: to rank them all every time is a good part of a scheduler's work,
and a rank, seconds of service that are left, is then wrong by no more than about this."""


class Board:
    def __init__(
        self,
        policy: Policy,
        ledger: Ledger,
        pool: PoolView,
        retention: Retention,
        epoch: int,
        lease_duration_s: float,
    ) -> None:
        self.policy = policy
        self.ledger = ledger
        self.pool = pool
        self.retention = retention
        self.live: dict[str, Request] = {}
        self.leases: dict[int, Request] = {}
        """Of running requests and of those whose slot has been revoked but not yet released."""
        self.releasing: dict[int, float] = {}
        """Revoked leases of preempted requests, and from when on the worker's silence about them counts as
        their release."""
        self.waiting: KeyedHeap[str] = KeyedHeap()
        self.waiting_prompt_tokens = 0
        self.free: dict[str, list[int]] = {}
        """Free slots by worker."""
        self.policy_follows_steps = getattr(type(policy), "stepped") is not getattr(Policy, "stepped")  # noqa: B009
        """The policy has a `stepped` of its own."""
        self.worst: dict[str, tuple[tuple[float, ...], Request] | None] = {}
        """By worker: the one of its running requests that should make room first, with its key. Missing where
        it is to be sought anew."""
        self._outdated_s: dict[str, float] = {}
        """By worker: when a change of ranks made it so last."""
        self.ended: list[Request] = []
        """Finished since the last tick."""
        self.changed = True
        """Something has arrived, ended, moved or come back since slots were given out last."""
        self.by_context = False
        """Not every waiting request can run on every worker, or be told so yet."""
        self.larger_until_s = -math.inf
        """Until then a worker may come, or come back, with a larger context than all who are there."""
        self._epoch = epoch
        self._lease_counter = 0
        self._lease_duration_s = lease_duration_s

    # --- Waiting ------------------------------------------------------------------------

    def wait(self, request: Request) -> None:
        """Puts a request without lease among the waiting ones."""
        self._queue(request)
        self.order(request)

    def wait_again(self, request: Request) -> None:
        """A recovered request waits. The store knows it at an earlier place, and is told the new one later,
        by `tell`: with a long queue all of them would make one very long commit."""
        self._queue(request)
        self._place(request)

    def tell(self, request: Request) -> None:
        """Has a recovered request's record and place written, if it still waits."""
        if request.request_id in self.waiting:
            self.ledger.moved(request)
            self.ledger.changed(request)

    def order(self, request: Request) -> None:
        """Gives a waiting request the place that its priority, level and rank ask for."""
        if self._place(request):
            self.ledger.moved(request)

    def _queue(self, request: Request) -> None:
        request.state = RequestState.QUEUED if request.first_scheduled_s is None else RequestState.PREEMPTED
        self.waiting_prompt_tokens += request.spec.prompt_tokens

    def _place(self, request: Request) -> bool:
        """Whether it has another place than before."""
        if request.book.overdue:
            request.level = 0
            request.rank = OVERDUE_RANK + request.arrival_seq
        key = (-request.spec.priority, request.level, request.rank, request.arrival_seq)
        self.changed = True
        return self.waiting.put(request.request_id, key)

    def first_waiting(self) -> Request | None:
        entry = self.waiting.first()
        return None if entry is None else self.live[entry[1]]

    def _leave_queue(self, request: Request) -> None:
        self.changed = True
        if self.waiting.remove(request.request_id):
            self.waiting_prompt_tokens -= request.spec.prompt_tokens
            self.ledger.left_queue(request)

    # --- Slots --------------------------------------------------------------------------

    def rank_otherwise(self, worker_id: str, now_s: float) -> None:
        """A worker's running requests do since now: they have done a step, or one has come."""
        if len(self.leases) > MANY_RUNNING and self.worst.get(worker_id) is not None:
            if now_s < self._outdated_s.get(worker_id, -math.inf) + SOUGHT_AFTER_S:
                return
            self._outdated_s[worker_id] = now_s
        self.worst.pop(worker_id, None)

    def _left_slot(self, request: Request) -> None:
        found = self.worst.get(request.worker_id)
        if len(self.leases) <= MANY_RUNNING or (found is not None and found[1] is request):
            self.worst.pop(request.worker_id, None)

    def forget_worker(self, worker_id: str) -> None:
        del self.free[worker_id]
        self.worst.pop(worker_id, None)
        self._outdated_s.pop(worker_id, None)

    def reranked(self, request: Request) -> None:
        """A running request's place among its like has changed without a step of its own."""
        if request.book.overdue:
            self.worst.pop(request.worker_id, None)
        else:
            self.rank_otherwise(request.worker_id, self.pool.now_s)
        self.changed = True
        if not request.book.unwritten:
            self.ledger.aged(request)

    def grant(self, request: Request, worker: Worker, slot: int, now_s: float) -> Grant:
        """Moves a waiting request into a slot. The slot must be free or just taken from its holder."""
        book = request.book
        self._leave_queue(request)
        has_kv = request.kv_resident and request.worker_id == worker.worker_id
        if request.kv_resident and not has_kv:
            self.forget_kv(request)
        self._lease_counter += 1
        request.lease_id = (self._epoch << 32) | self._lease_counter
        request.worker_id = worker.worker_id
        request.slot = slot
        request.state = RequestState.RUNNING
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now_s
        request.leased_s = now_s
        worker.running[slot] = request
        self.leases[request.lease_id] = request
        found = self.worst.get(worker.worker_id)
        if found is not None and (-request.spec.priority, not book.overdue) > found[0][:2]:
            # Of lower priority than the victim that was found: how long ago does not matter then.
            self.worst.pop(worker.worker_id)
        else:
            self.rank_otherwise(worker.worker_id, now_s)
        grant = Grant(
            worker_id=worker.worker_id,
            lease_id=request.lease_id,
            slot=slot,
            request=request,
            has_context=not has_kv or book.short_prefix,
            draft_tokens=self.pool.draft_tokens,
        )
        request.kv_resident = True
        book.short_prefix = False
        self.policy.leased(request)
        self.ledger.grants[grant.lease_id] = grant
        self.ledger.leased(request, now_s + self._lease_duration_s)
        self.ledger.changed(request)
        self.ledger.event("leased", request, detail=f"slot {slot}")
        return grant

    def preempt(self, victim: Request, because: str, now_s: float) -> tuple[Worker, int]:
        """Takes a running request's slot away; it waits again once its worker has let go of it."""
        worker, slot = self.pool.workers[victim.worker_id], victim.slot
        worker.running[slot] = None
        self._left_slot(victim)
        victim.releasing = True
        victim.preemptions += 1
        victim.preempted_because = because
        self.releasing[victim.lease_id] = now_s + self._lease_duration_s
        self.ledger.revoke(
            Revoke(worker.worker_id, victim.lease_id, victim.request_id, RevokeReason.PREEMPTED, victim)
        )
        self.ledger.changed(victim)
        self.ledger.event("preempted", victim, detail=because)
        return worker, slot

    def send_again(self, request: Request) -> None:
        """The worker misses the KV cache: the same lease goes out once more, with context."""
        self.ledger.grants[request.lease_id] = Grant(
            worker_id=request.worker_id,
            lease_id=request.lease_id,
            slot=request.slot,
            request=request,
            has_context=True,
            draft_tokens=self.pool.draft_tokens,
        )

    def take_back(self, request: Request, because: str, keep_kv: bool) -> None:
        """Ends a request's lease, its worker knowing or being gone, and lets it wait again."""
        self._end_lease(request)
        request.kv_resident = request.kv_resident and keep_kv
        if because:
            request.preempted_because = because
            self.ledger.event("requeued", request, detail=because)
        self.policy.requeued(request)
        self.wait(request)
        self.ledger.changed(request)

    def _end_lease(self, request: Request) -> None:
        if not request.lease_id:
            return
        del self.leases[request.lease_id]
        self.releasing.pop(request.lease_id, None)
        # It may have been about to be sent again.
        self.ledger.grants.pop(request.lease_id, None)
        worker = self.pool.workers.get(request.worker_id)
        if worker is not None and not request.releasing:
            worker.running[request.slot] = None
            self._left_slot(request)
            self.free[worker.worker_id].append(request.slot)
            self.changed = True
        request.lease_id = 0
        request.releasing = False
        self.ledger.unleased(request)

    # --- Endings ------------------------------------------------------------------------

    def forget_kv(self, request: Request) -> None:
        """Tells the worker that holds a waiting request's KV cache that it is not needed any more."""
        if request.kv_resident and request.worker_id in self.pool.workers:
            self.ledger.revoke(Revoke(request.worker_id, 0, request.request_id, RevokeReason.ENDED))
        request.kv_resident = False

    def finish(
        self, request: Request, reason: FinishReason, now_s: float, *, told_by_worker: bool, error: str = ""
    ) -> None:
        """The one way into the terminal state, from any other."""
        if request.lease_id:
            if not told_by_worker:
                self.ledger.revoke(
                    Revoke(request.worker_id, request.lease_id, request.request_id, RevokeReason.ENDED)
                )
            request.kv_resident = False
        else:
            self.forget_kv(request)
        self._end_lease(request)
        self._leave_queue(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.error = error
        request.finished_s = now_s
        request.perceived_s = 0.0
        del self.live[request.request_id]
        self.pool.live = len(self.live)
        self.policy.finished(request)
        self.ledger.finished(request)
        self.retention.keep(Retained(request.request_id, request.spec.digest, now_s), self.ledger.tick)
        self.ended.append(request)
