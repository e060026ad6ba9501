"""The scheduler of one pool: events in, decisions out.

It does no input or output and has no clock. A driver feeds it what happens (submit, cancel,
report, ...) with the present instant, then calls `tick`, stores what the tick says must be stored, and
only then lets anyone see the tokens, acknowledgements, grants and revocations in it. Same
events, same decisions. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

from scheduler_svc.core.board import Board
from scheduler_svc.core.fleet import Fleet
from scheduler_svc.core.invariants import check_board
from scheduler_svc.core.keyed_heap import KeyedHeap
from scheduler_svc.core.ledger import Ledger
from scheduler_svc.core.placement import place, proposed
from scheduler_svc.core.policies.base import LEAST_RANK, Policy
from scheduler_svc.core.pool import PoolView
from scheduler_svc.core.records import (
    TOKEN_BYTES,
    Emitted,
    FinishReason,
    Recovered,
    Refused,
    Request,
    RequestSpec,
    RequestState,
    Resident,
    Retained,
    Revoke,
    RevokeReason,
    StepReport,
    TenantQuota,
    Tick,
    Worker,
)
from scheduler_svc.core.retention import Retention
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.core.steps import Counters, apply_report
from scheduler_svc.core.tenants import Tenants

_DEADLINE, _OVERDUE = "deadline", "overdue"
_EXPIRED_AT_ONCE = 100
"""Timers that one tick lets go off: many requests can have the same deadline."""
_TOLD_AT_ONCE = 100
"""Recovered requests whose records one tick writes anew."""
_ORDER = "scheduler/order"
"""Among what is learnt: by which order (`Policy.order`) all those are placed that wait in the store."""
_RETRY_SHARE = 0.1
"""A refused caller is asked to come back when about this share of the backlog is done."""


class Scheduler:
    """One pool's state machine. `epoch` is the leader's fencing number: lease ids of different
    epochs never meet. All instants are seconds of one clock."""

    def __init__(self, pool: str, policy: Policy, settings: SchedulerSettings, epoch: int = 1) -> None:
        self.pool = pool
        self.policy = policy
        self.settings = settings
        self.epoch = epoch
        self.counters = Counters()
        self.view = PoolView(draft_tokens=settings.draft_tokens)
        self._ledger = Ledger(settings.record_interval_s)
        self._tenants = Tenants()
        self._retention = Retention(settings.retention_s, settings.max_retained)
        self._board = Board(
            policy, self._ledger, self.view, self._retention, epoch, settings.lease_duration_s
        )
        self._fleet = Fleet(self._board, settings)
        self._timers: KeyedHeap[tuple[str, str]] = KeyedHeap()
        self._arrivals = 0
        self._untold: list[Request] = []
        """Recovered requests whose stored record or place is not right any more."""
        self._order_is_stored = True
        """Nobody waits in the store at a place that another order has given."""
        self._restores_in_order = False
        """Recovered requests wait in the store where this policy would have put them."""
        self._recovered = 0
        self._learnt_s = float("-inf")
        self._backlog: tuple[float, float] = (float("-inf"), 0.0)
        policy.bind(self.view)

    # --- Reading ------------------------------------------------------------------------

    def get(self, request_id: str) -> Request | None:
        """A live request."""
        return self._board.live.get(request_id)

    def retained(self, request_id: str) -> Retained | None:
        """A finished request that is still kept."""
        return self._retention.get(request_id)

    @property
    def requests(self) -> Mapping[str, Request]:
        """All live requests by id."""
        return self._board.live

    @property
    def emitted(self) -> Sequence[Emitted]:
        """Output that no tick has taken yet."""
        return self._ledger.emitted

    @property
    def workers(self) -> Mapping[str, Worker]:
        return self.view.workers

    @property
    def context_tokens(self) -> int:
        """Prompt and output of one request together, at most; 0: no worker has told yet. Of the worker with
        the largest context: requests that it alone has room for wait for it."""
        return self._fleet.context_tokens

    @property
    def waiting_requests(self) -> int:
        return len(self._board.waiting)

    @property
    def running_requests(self) -> int:
        """Requests that hold a slot or are still letting go of one."""
        return len(self._board.leases)

    def waiting_order(self, limit: int | None = None) -> list[Request]:
        """The waiting requests in the order in which they would run now."""
        return [self._board.live[name] for name in self._board.waiting.ordered()[:limit]]

    def backlog_s(self) -> float:
        """Estimated seconds of service that all live requests still need, at most a second old, and of a long
        queue a second more for each 10,000 of them: they are counted."""
        counted_s, backlog_s = self._backlog
        if not counted_s <= self.view.now_s < counted_s + 1.0 + len(self._board.live) / 10_000:
            backlog_s = sum(request.perceived_s for request in self._board.live.values())
            self._backlog = (self.view.now_s, backlog_s)
        return backlog_s

    # --- Requests -----------------------------------------------------------------------

    def restore(self, recovered: Recovered, now_s: float) -> None:
        """Takes over what an earlier leader has stored; for a scheduler that has seen nothing yet. All
        live requests wait again. They keep `worker_id` as a hint, and their KV cache counts as gone
        until its worker comes back and says that it holds it."""
        self.begin_restoring(recovered, now_s)
        self.take_over(sorted(recovered.requests, key=attrgetter("arrival_seq", "arrival_s")), now_s)
        self.end_restoring()

    def begin_restoring(self, recovered: Recovered, now_s: float) -> None:
        """`restore` in parts, for a long queue is read for seconds: first what was learnt and who has
        finished, then `take_over` as often as live requests were read, in any order, and `end_restoring`."""
        self.view.now_s = now_s
        self.policy.restore_learnt(recovered.learnt)
        for retained in sorted(recovered.retained, key=lambda entry: entry.finished_s):
            self._retention.keep(retained)
        stored_order = recovered.learnt.get(_ORDER, "")
        self._restores_in_order = self.policy.order != "" and stored_order == self.policy.order
        if not self._restores_in_order:
            self._order_is_stored = not self.policy.order
            if stored_order:
                self._ledger.learnt[_ORDER] = ""

    def take_over(self, requests: Iterable[Request], now_s: float) -> None:
        """Lets recovered requests wait again."""
        self.view.now_s = now_s
        for request in requests:
            self._fleet.restored = True
            self._recovered += 1
            self._arrivals = max(self._arrivals, request.arrival_seq)
            request.kv_resident = False
            request.lease_id = 0
            request.releasing = False
            self._board.live[request.request_id] = request
            self.view.live = len(self._board.live)
            if not self._readmit(request, self._restores_in_order and request.state is RequestState.QUEUED):
                self._untold.append(request)
            if request.output_tokens > request.book.logged_tokens:
                # Before this leadership writes its own journal the old one must be in the logs.
                self._ledger.changed(request)
            if request.output_tokens >= request.spec.max_tokens:
                self._board.finish(request, FinishReason.LENGTH, now_s, told_by_worker=False)

    def end_restoring(self) -> None:
        self._ledger.event("recovered", detail=f"{self._recovered} live requests, epoch {self.epoch}")

    def _readmit(self, request: Request, keeps_place: bool) -> bool:
        """Lets a recovered request wait; `keeps_place`: where it did, if it may. Whether the store is right
        about it."""
        stored = (request.level, request.rank)
        self._watch(request)
        if keeps_place and request.rank > LEAST_RANK:
            self.policy.readmit(request)
        else:
            self.policy.admit(request)
            if not keeps_place:
                self.policy.believe(request)
            elif self.settings.starvation_bound_s is not None:
                # It is past the bound: policies give no such rank.
                request.book.overdue = True
        self._board.wait_again(request)
        return keeps_place and (request.level, request.rank) == stored

    def submit(
        self, spec: RequestSpec, now_s: float, quota: TenantQuota | None = None
    ) -> tuple[Request | None, bool]:
        """Accepts a request, or joins the one of the same id and digest. `quota` is its tenant's.

        Returns the request (None when it has finished and is only retained) and whether it was joined.
        Raises Refused with reason ID_CONFLICT, DEADLINE_PASSED, TOO_LONG, QUEUE_FULL, QUEUE_TOKENS_FULL or
        TENANT_QUEUE_FULL; then nothing has changed. Raises ValueError for a spec that no gateway
        should let through (no id, no prompt, max_tokens below 1).
        """
        self.view.now_s = now_s
        live = self._board.live.get(spec.request_id)
        known = self._retention.get(spec.request_id) if live is None else live.spec
        if known is not None:
            if known.digest != spec.digest:
                message = f"request_id {spec.request_id!r} belongs to another request"
                raise self._refusal("ID_CONFLICT", message)
            self.counters.joined += 1
            return live, True
        self._check(spec, now_s)
        if quota is not None and (problem := self._tenants.problem(spec, quota)):
            raise self._refusal("TENANT_QUEUE_FULL", problem, retry=True)
        self._arrivals += 1
        request = Request(spec=spec, arrival_s=now_s, arrival_seq=self._arrivals)
        self._board.live[spec.request_id] = request
        self.view.live = len(self._board.live)
        self.counters.submitted += 1
        self._ledger.submitted(request)
        self._ledger.event("submitted", request)
        self._admit(request)
        return request, False

    def _check(self, spec: RequestSpec, now_s: float) -> None:
        prompt = spec.packed_prompt
        if not spec.request_id or not prompt or len(prompt) % TOKEN_BYTES or spec.max_tokens < 1:
            raise ValueError("a request needs an id, a prompt of whole tokens and max_tokens of at least 1")
        if spec.deadline_s is not None and spec.deadline_s <= now_s:
            raise self._refusal("DEADLINE_PASSED", f"the deadline passed {now_s - spec.deadline_s:.3f} s ago")
        needed_tokens = spec.prompt_tokens + spec.max_tokens
        if self._fleet.context_tokens and needed_tokens > self._fleet.context_tokens:
            raise self._refusal(
                "TOO_LONG",
                f"prompt ({spec.prompt_tokens} tokens) and max_tokens ({spec.max_tokens}) exceed the context "
                f"of {self._fleet.context_tokens} tokens",
            )
        settings, board = self.settings, self._board
        # Those whose worker has not let go of them yet will wait as well: several may come back at once.
        waiting = len(board.waiting) + len(board.releasing)
        if waiting >= settings.max_queued_requests:
            raise self._refusal("QUEUE_FULL", f"{waiting} requests are waiting already", retry=True)
        if board.waiting_prompt_tokens + spec.prompt_tokens > settings.max_queued_tokens:
            raise self._refusal(
                "QUEUE_TOKENS_FULL",
                f"the waiting prompts hold {board.waiting_prompt_tokens} tokens, "
                f"at most {settings.max_queued_tokens} are allowed",
                retry=True,
            )

    def _refusal(self, reason: str, message: str, retry: bool = False) -> Refused:
        self.counters.refused += 1
        if not retry:
            return Refused(reason, message)
        drained_s = self.backlog_s() / max(1, self.view.slots)
        return Refused(reason, message, retry_after_s=min(60.0, max(0.5, drained_s * _RETRY_SHARE)))

    def _admit(self, request: Request) -> None:
        """Lets a new request wait."""
        self._watch(request)
        self.policy.admit(request)
        self.policy.believe(request)
        self._board.wait(request)

    def _watch(self, request: Request) -> None:
        """Its tenant's account and its timers begin."""
        request_id, spec = request.request_id, request.spec
        self._tenants.add(spec)
        if spec.deadline_s is not None:
            self._timers.put((_DEADLINE, request_id), (spec.deadline_s, request.arrival_seq, _DEADLINE))
        if self.settings.starvation_bound_s is not None:
            overdue_s = request.arrival_s + self.settings.starvation_bound_s
            self._timers.put((_OVERDUE, request_id), (overdue_s, request.arrival_seq, _OVERDUE))

    def cancel(
        self, request_id: str, now_s: float, reason: FinishReason = FinishReason.CANCELLED
    ) -> RequestState | None:
        """Ends a request at once, wherever it is; None for an unknown one. A worker that runs it is
        told with the next tick, and what it still reports about it is ignored."""
        self.view.now_s = now_s
        request = self._board.live.get(request_id)
        if request is None:
            return None if self._retention.get(request_id) is None else RequestState.FINISHED
        self._board.finish(request, reason, now_s, told_by_worker=False)
        return RequestState.FINISHED

    # --- Workers ------------------------------------------------------------------------

    def worker_joined(self, worker: Worker, resident: Sequence[Resident], now_s: float) -> None:
        """A worker's session begins; one of the same id ends. Residents whose CRC-32 does not match
        what is stored count as not there, and the worker is told to forget them. A longer one is
        there: its worker compares it when it is granted. Raises ValueError for a worker without slots."""
        self.view.now_s = now_s
        self._fleet.join(worker, resident, now_s)

    def worker_left(self, worker_id: str, now_s: float) -> None:
        """Its session has ended: its requests wait again, their KV cache is gone."""
        self.view.now_s = now_s
        if worker_id in self.view.workers:
            self._fleet.remove(worker_id, "its worker left")
            self._ledger.event("worker_left", worker_id=worker_id)

    def worker_draining(self, worker_id: str, now_s: float) -> None:
        """It gets no new leases and keeps those that it has."""
        self.heartbeat(worker_id, now_s)
        if worker_id in self.view.workers:
            self._fleet.drain(self.view.workers[worker_id], now_s)

    def heartbeat(self, worker_id: str, now_s: float) -> None:
        self.view.now_s = now_s
        worker = self.view.workers.get(worker_id)
        if worker is not None:
            worker.last_seen_s = now_s

    def report(self, report: StepReport, now_s: float) -> None:
        """What a worker's step did. Never raises: rows that contradict what is stored are
        refused and counted."""
        self.view.now_s = now_s
        worker = self.view.workers.get(report.worker_id)
        if worker is None:
            self.counters.reports_refused += 1
            return
        worker.last_seen_s = now_s
        apply_report(self._board, worker, report, self.counters, now_s)

    # --- Deciding -----------------------------------------------------------------------

    def tick(self, now_s: float) -> Tick:
        """Decides, and returns what has to be stored and sent since the last tick. The records in it
        are the live ones: pack them before the next event."""
        self.view.now_s = now_s
        self._expire(now_s)
        for request in self.policy.due(now_s):
            if request.request_id in self._board.waiting:
                self._board.order(request)
            elif request.lease_id:
                self._board.reranked(request)
        if self._board.changed or not self.policy.settled:
            self.counters.preemptions += place(self._board, now_s)
            self._board.changed = False
        for request in self._ledger.records_due(now_s, len(self._board.leases)):
            self.policy.believe(request)
            self._ledger.changed(request)
        for request in self._untold[-_TOLD_AT_ONCE:]:
            self._board.tell(request)
        del self._untold[-_TOLD_AT_ONCE:]
        if not (self._untold or self._order_is_stored):
            self._order_is_stored = True
            self._ledger.learnt[_ORDER] = self.policy.order
        ended = self._board.ended
        self._board.ended = []
        for request in ended:
            self.counters.finished += 1
            self._tenants.remove(request.spec)
            self._timers.remove((_DEADLINE, request.request_id))
            self._timers.remove((_OVERDUE, request.request_id))
        self._ledger.forgotten.extend(self._retention.forget(now_s, self._ledger.logged_tick))
        if now_s - self._learnt_s >= self.settings.learnt_interval_s:
            self._learnt_s = now_s
            self._ledger.learnt.update(self.policy.learnt())
        return self._ledger.take(now_s)

    def would_preempt(self, now_s: float) -> bool:
        """Whether a tick would now take someone's slot away, free slots and timers aside. For drivers
        that skip the ticks in which nothing is decided."""
        self.view.now_s = now_s
        self._board.worst.clear()
        return proposed(self._board, set()) is not None

    def _expire(self, now_s: float) -> None:
        board = self._board
        self._fleet.expire(now_s)
        for lease_id, until_s in list(board.releasing.items()):
            if until_s <= now_s:
                silent = board.leases[lease_id]
                # When it lets go it must not keep the KV cache: nobody would tell it of the request's end.
                self._ledger.revoke(Revoke(silent.worker_id, lease_id, silent.request_id, RevokeReason.ENDED))
                board.take_back(silent, "its worker never confirmed that it let go", keep_kv=False)
        for _ in range(_EXPIRED_AT_ONCE):
            entry = self._timers.first()
            if entry is None or entry[0][0] > now_s:
                break
            kind, request_id = entry[1]
            self._timers.remove(entry[1])
            request = board.live.get(request_id)
            if request is None:
                continue
            if kind == _DEADLINE:
                board.finish(request, FinishReason.DEADLINE, now_s, told_by_worker=False)
            else:
                request.book.overdue = True
                if request_id in board.waiting:
                    board.order(request)
                else:
                    board.reranked(request)

    def next_timer_s(self) -> float | None:
        """The instant at which `tick` must be called at the latest if nothing happens before."""
        instants = [*self._fleet.timers(), *self._board.releasing.values()]
        entry = self._timers.first()
        if entry is not None:
            instants.append(entry[0][0])
        if self._untold:
            instants.append(self.view.now_s)
        for instant_s in (
            self._retention.next_timer_s(self._ledger.logged_tick),
            self.policy.next_due_s(),
            self._ledger.next_record_s(),
        ):
            if instant_s is not None:
                instants.append(instant_s)
        return min(instants, default=None)

    def check_invariants(self) -> None:
        """Raises AssertionError if the bookkeeping contradicts itself. O(requests), for tests."""
        check_board(self._board)
