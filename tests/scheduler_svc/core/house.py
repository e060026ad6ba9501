"""Builders and a model of the store for tests of the core."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.records import (
    Commit,
    FinishReason,
    Grant,
    Recovered,
    Request,
    RequestSpec,
    RequestState,
    Resident,
    Retained,
    Revoke,
    RevokeReason,
    RowFinish,
    StepCosts,
    StepReport,
    Tick,
    Worker,
)
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings


def pack(*token_ids: int) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def spec(request_id: str, prompt_tokens: int = 3, max_tokens: int = 20, **more: Any) -> RequestSpec:
    more.setdefault("digest", f"digest of {request_id}")
    return RequestSpec(
        request_id=request_id, prompt=pack(*range(prompt_tokens)), max_tokens=max_tokens, **more
    )


def worker(worker_id: str = "w", slots: int = 1, **more: Any) -> Worker:
    more.setdefault("costs", StepCosts(draft_token_s=0.002, verify_s=0.024, switch_s=0.001))
    return Worker(worker_id=worker_id, slots=slots, **more)


def scheduler(policy: str = "fcfs", epoch: int = 1, **settings: Any) -> Scheduler:
    return Scheduler("pool", make_policy(policy), SchedulerSettings(**settings), epoch)


class FakeWorker:
    """Follows grants and revokes like the real one; emits 100, 101, ... by position."""

    def __init__(self, worker_id: str, slots: int) -> None:
        self.worker_id = worker_id
        self.slots: list[Grant | None] = [None] * slots
        self.outputs: dict[str, bytearray] = {}
        """What it holds the KV cache of."""
        self.released: list[int] = []
        self.missing: list[int] = []

    def apply(self, tick: Tick) -> None:
        for revoke in tick.revokes:
            if revoke.worker_id == self.worker_id:
                self._revoke(revoke)
        for grant in tick.grants:
            if grant.worker_id == self.worker_id:
                self._take(grant)

    def _revoke(self, revoke: Revoke) -> None:
        for slot, grant in enumerate(self.slots):
            if grant is not None and grant.lease_id == revoke.lease_id:
                self.slots[slot] = None
                self.released.append(revoke.lease_id)
        if revoke.reason is RevokeReason.ENDED:
            self.outputs.pop(revoke.request_id, None)

    def _take(self, grant: Grant) -> None:
        held = self.slots[grant.slot]
        assert held is None or held.lease_id == grant.lease_id, "granted a slot that is taken"
        stored = bytes(grant.request.output)
        self.slots[grant.slot] = grant
        if grant.has_context:
            self.outputs[grant.request.request_id] = bytearray(stored)
        elif bytes(self.outputs.get(grant.request.request_id, b"?")) != stored:
            self.missing.append(grant.lease_id)

    def drop(self, lease_ids: Sequence[int]) -> None:
        """Empties the slots of these leases without being asked."""
        self.slots = [
            None if grant is not None and grant.lease_id in lease_ids else grant for grant in self.slots
        ]

    def residents(self) -> list[Resident]:
        return [Resident(name, len(kv) // 4, zlib.crc32(kv)) for name, kv in self.outputs.items()]

    def step(
        self,
        counts: dict[str, int] | int = 2,
        step_s: float = 0.032,
        finish: dict[str, FinishReason] | None = None,
    ) -> StepReport:
        """One step of every slot: `counts` tokens, cut at max_tokens."""
        leases, offsets, emitted_counts, drafted, accepted = [], [], [], [], []
        tokens = b""
        finishes = {}
        for slot, grant in enumerate(self.slots):
            if grant is None or grant.lease_id in self.missing:
                continue
            request_id = grant.request.request_id
            kv = self.outputs[request_id]
            offset = len(kv) // 4
            count = counts if isinstance(counts, int) else counts.get(request_id, 1)
            count = min(count, grant.request.spec.max_tokens - offset)
            new = pack(*range(100 + offset, 100 + offset + count))
            kv += new
            tokens += new
            row = len(leases)
            leases.append(grant.lease_id)
            offsets.append(offset)
            emitted_counts.append(count)
            drafted.append(max(4, count - 1))
            accepted.append(max(0, count - 1))
            reason = (finish or {}).get(request_id)
            if reason is None and offset + count == grant.request.spec.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                finishes[row] = RowFinish(reason)
                self.slots[slot] = None
                del self.outputs[request_id]
        report = StepReport(
            worker_id=self.worker_id,
            lease_ids=leases,
            offsets=offsets,
            emitted_counts=emitted_counts,
            drafted_counts=drafted,
            accepted_counts=accepted,
            token_ids=tokens,
            finishes=finishes,
            released=self.released,
            missing=self.missing,
            step_s=step_s,
        )
        self.released, self.missing = [], []
        return report


class Store:
    """What a store makes of the commits, with its checks."""

    def __init__(self) -> None:
        self.live: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[tuple[int, bytes]]] = {}
        self.journal: list[tuple[int, str, int, bytes]] = []
        """Tick, request, offset and tokens of what may be in no log yet."""
        self.waiting: dict[str, tuple[int, float]] = {}
        self.leases: dict[str, float] = {}
        self.finished: dict[str, tuple[str, FinishReason, float]] = {}
        self.learnt: dict[str, str] = {}
        self.ever_finished: set[str] = set()

    def apply(self, commit: Commit) -> None:
        for request in commit.submitted:
            assert request.request_id not in self.live, "submitted twice"
            assert request.request_id not in self.finished
            self.logs[request.request_id] = []
            self._write(request)
        for append in commit.appended:
            log = self.logs[append.request_id]
            assert append.entry == len(log) + 1, "a gap in the log"
            assert append.offset == sum(len(tokens) // 4 for _, tokens in log), "a gap in the tokens"
            assert append.token_ids
            log.append((append.offset, append.token_ids))
        for request_id, offset, token_ids in chain.from_iterable(each.rows() for each in commit.emitted):
            assert token_ids
            self.journal.append((commit.tick, request_id, offset, token_ids))
        self.journal = [row for row in self.journal if row[0] > commit.logged_tick]
        for request in (*commit.changed, *commit.finished):
            assert request.log_entries == len(self.logs[request.request_id])
            logged = b"".join(tokens for _, tokens in self.logs[request.request_id])
            assert logged == bytes(request.output), "a record is written without its log"
        for request in commit.changed:
            assert request.request_id in self.live, "a change of what is not there"
            assert request.request_id not in {done.request_id for done in commit.finished}
            self._write(request)
        for move in commit.moves:
            if move.level is None:
                self.waiting.pop(move.request_id, None)
            else:
                assert move.request_id in self.live
                self.waiting[move.request_id] = (move.level, move.rank)
        assert not {name for name, _ in commit.leased} & set(commit.unleased)
        for request_id in commit.unleased:
            self.leases.pop(request_id, None)
        for request_id, expiry_s in commit.leased:
            assert request_id in self.live
            self.leases[request_id] = expiry_s
        for request in commit.finished:
            assert request.state is RequestState.FINISHED
            assert request.finish_reason is not None
            assert request.request_id not in self.ever_finished, "finished twice"
            self.ever_finished.add(request.request_id)
            assert self.live.pop(request.request_id) is not None
            assert self.output(request.request_id) == bytes(request.output), "the log is not the output"
            assert request.finished_s is not None
            self.finished[request.request_id] = (
                request.spec.digest,
                request.finish_reason,
                request.finished_s,
            )
            assert request.request_id not in self.waiting
            assert request.request_id not in self.leases
        for request_id in commit.forgotten:
            del self.finished[request_id]
            del self.logs[request_id]
            assert request_id not in {row[1] for row in self.journal}, "forgotten before its output is"
            # Its id may be used anew from here on, and that request ends once as well.
            self.ever_finished.discard(request_id)
        self.learnt.update(commit.learnt)

    def _write(self, request: Request) -> None:
        self.live[request.request_id] = {
            "spec": request.spec,
            "arrival_s": request.arrival_s,
            "arrival_seq": request.arrival_seq,
            "steps": request.steps,
            "attained_s": request.attained_s,
            "preemptions": request.preemptions,
            "first_scheduled_s": request.first_scheduled_s,
            "worker_id": request.worker_id,
            "state": request.state,
            "accepted_tokens": request.accepted_tokens,
            "drafted_tokens": request.drafted_tokens,
            "level": request.level,
            "rank": request.rank,
            "perceptible": request.perceptible,
            "perceived_s": request.perceived_s,
        }

    def output(self, request_id: str) -> bytes:
        """Its log, and what the journal has beyond it."""
        output = b"".join(tokens for _, tokens in self.logs[request_id])
        for _, name, offset, token_ids in self.journal:
            if name == request_id:
                known_bytes = len(output) - 4 * offset
                assert known_bytes >= 0, "a gap between log and journal"
                output += token_ids[known_bytes:]
        return output

    def recover(self) -> Recovered:
        requests = []
        for request_id, record in self.live.items():
            request = Request(**record)
            request.level, request.rank = self.waiting.get(request_id, (request.level, request.rank))
            request.output = bytearray(self.output(request_id))
            request.log_entries = len(self.logs[request_id])
            logged_bytes = sum(len(tokens) for _, tokens in self.logs[request_id])
            request.book.logged_tokens = logged_bytes // 4
            requests.append(request)
        retained = [Retained(name, digest, at_s) for name, (digest, _, at_s) in self.finished.items()]
        self.leases.clear()
        return Recovered(requests=requests, retained=retained, learnt=dict(self.learnt))


def running(core: Scheduler, fake: FakeWorker, now_s: float = 0.0) -> None:
    core.worker_joined(worker(fake.worker_id, len(fake.slots)), [], now_s)
    fake.apply(core.tick(now_s))
