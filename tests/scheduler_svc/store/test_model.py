"""Random commits, applied to the store and to a plain model of it, must leave the same."""

from __future__ import annotations

import asyncio
import struct
import uuid
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler_svc.core.records import (
    Append,
    Commit,
    FinishReason,
    QueueMove,
    Request,
    RequestSpec,
    RequestState,
)
from scheduler_svc.store import codec
from scheduler_svc.store.inspector import Inspector
from scheduler_svc.store.store import Store

NOW_S = 1_700_000_000.0
FINISHED = RequestState.FINISHED

step = st.tuples(
    st.sampled_from(
        ["submit", "run", "emit", "emit", "record", "preempt", "move", "finish", "forget", "learn"]
    ),
    st.integers(0, 5),
    st.integers(1, 4),
)
ticks = st.lists(st.lists(step, min_size=2, max_size=10), min_size=3, max_size=12)


class Model:
    """Makes commits as a scheduler would, and knows what must be stored after each."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.places: dict[str, tuple[int, float]] = {}
        self.leases: set[str] = set()
        self.learnt: dict[str, str] = {}
        self.recorded: dict[str, dict[str, Any]] = {}
        """The values of each request's record as it was written last."""
        self.submitted = 0

    def tick(self, steps: list[tuple[str, int, int]]) -> Commit:
        commit = Commit()
        changed: dict[str, Request] = {}
        fresh: set[str] = set()
        moves: dict[str, QueueMove] = {}
        leased: dict[str, bool] = {}
        for action, pick, amount in steps:
            if action == "submit":
                request = self._new(amount)
                commit.submitted.append(request)
                fresh.add(request.request_id)
                moves[request.request_id] = self._wait(request, amount)
                continue
            if action == "learn":
                self.learnt[f"k{pick}"] = commit.learnt[f"k{pick}"] = str(amount)
                continue
            known = list(self.requests.values())
            if not known:
                continue
            request = known[pick % len(known)]
            name = request.request_id
            if action == "forget":
                if request.state is FINISHED and request not in commit.finished:
                    commit.forgotten.append(name)
                    del self.requests[name]
                continue
            if request.state is FINISHED:
                continue
            if action == "emit":
                self._emit(commit, request, amount)
            elif action == "record":
                request.perceived_s = 1.5 * amount
                if request.state is not RequestState.QUEUED:
                    request.steps += amount
                    request.acceptance_histogram = [*request.acceptance_histogram, amount]
            elif action == "run" and name in self.places:
                del self.places[name]
                moves[name] = QueueMove(name, None)
                request.state, request.slot, request.worker_id = RequestState.RUNNING, amount, "w"
                request.lease_id, request.first_scheduled_s, request.kv_resident = 7, NOW_S, True
                leased[name] = True
            elif action == "preempt" and name in self.leases | leased.keys() and name not in self.places:
                request.state, request.preempted_because = RequestState.PREEMPTED, f"because {amount}"
                leased[name] = False
                moves[name] = self._wait(request, amount)
            elif action == "move" and name in self.places:
                moves[name] = self._wait(request, amount)
            elif action == "finish":
                request.state, request.finish_reason = FINISHED, FinishReason.STOP
                request.finished_s, request.perceived_s = NOW_S + amount, 0.0
                self.places.pop(name, None)
                moves[name], leased[name] = QueueMove(name, None), False
                commit.finished.append(request)
            if action != "emit":
                changed[name] = request
        for name, held in leased.items():
            (self.leases.add if held else self.leases.discard)(name)
        ended = {r.request_id for r in commit.finished}
        commit.changed = [r for name, r in changed.items() if name not in fresh | ended]
        commit.moves = list(moves.values())
        commit.leased = [(name, NOW_S) for name, held in leased.items() if held]
        commit.unleased = [name for name, held in leased.items() if not held]
        for request in (*commit.submitted, *commit.changed, *commit.finished):
            self.recorded[request.request_id] = codec.request_values(request)
        return commit

    def _new(self, amount: int) -> Request:
        self.submitted += 1
        spec = RequestSpec(
            f"r{self.submitted}",
            struct.pack("<2I", amount, 9),
            64,
            params_json=f'{{"n":{amount}}}',
            digest="d",
        )
        request = Request(spec, arrival_s=NOW_S, arrival_seq=self.submitted, perceived_s=float(amount))
        self.requests[request.request_id] = request
        return request

    def _wait(self, request: Request, amount: int) -> QueueMove:
        request.level, request.rank = amount % 3, amount / 2
        self.places[request.request_id] = (request.level, request.rank)
        return QueueMove(request.request_id, request.level, request.rank)

    def _emit(self, commit: Commit, request: Request, amount: int) -> None:
        request.log_entries += 1
        emitted = struct.pack(f"<{amount}I", *range(amount))
        commit.appended.append(
            Append(request.request_id, request.log_entries, request.output_tokens, emitted)
        )
        request.output += emitted

    def live(self) -> list[Request]:
        return [request for request in self.requests.values() if request.state is not FINISHED]

    def queue(self, level: int) -> list[str]:
        waiting = [(rank, name) for name, (at, rank) in self.places.items() if at == level]
        return [name for _, name in sorted(waiting, key=lambda w: (w[0], self.requests[w[1]].arrival_seq))]


def recovered_values(model: Model, request: Request) -> dict[str, object]:
    """A live request as recovery must tell it: the record as written last, the log as it is now."""
    expected = model.recorded[request.request_id]
    if request.request_id in model.places:
        expected["level"], expected["rank"] = model.places[request.request_id]
    if expected["state"] is RequestState.RUNNING:
        expected["state"] = RequestState.PREEMPTED
    return expected | {
        "slot": 0,
        "lease_id": 0,
        "releasing": False,
        "kv_resident": False,
        "log_entries": request.log_entries,
        "output_tokens": request.output_tokens,
    }


async def check(store: Store, model: Model) -> None:
    recovered = await store.recover()
    assert recovered.learnt == model.learnt
    live = model.live()
    assert [request.request_id for request in recovered.requests] == [request.request_id for request in live]
    for found, request in zip(recovered.requests, live, strict=True):
        assert found.spec == request.spec
        assert found.output == request.output
        assert codec.request_values(found) == recovered_values(model, request)
    ended = [request for request in model.requests.values() if request.state is FINISHED]
    assert {r.request_id for r in recovered.retained} == {r.request_id for r in ended}
    for request in ended:
        assert codec.request_values(await store.read_request(request.request_id)) == codec.request_values(
            request
        )

    snapshot = await Inspector(store.reader, store.pool).snapshot(head_limit=100)
    for level in snapshot.queues.levels:
        assert [view.request_id for view in level.head] == model.queue(level.level)
    assert {view.request_id for view in snapshot.running} == model.leases
    perceived_s = sum(model.recorded[request.request_id]["perceived_s"] for request in live)
    assert abs(snapshot.queues.backlog_s - perceived_s) < 1e-6


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(ticks)
def test_the_store_holds_what_a_model_holds(server, ticks):
    async def play() -> None:
        pool = uuid.uuid4().hex
        store, model = Store(server.url, pool), Model()
        await store.load_functions()
        await store.lead("a", "here", 60.0)
        for number, steps in enumerate(ticks):
            encoded = store.encode(model.tick(steps), NOW_S)
            assert await store.commit(encoded)
            if number % 3 == 1:
                assert not await store.commit(encoded)
            if number % 4 == 2:
                # A new leader, as after a crash: it knows nothing of what was packed before.
                await store.close()
                store = Store(server.url, pool)
                await store.lead("b", "there", 0.0)
                await store.lead("a", "here", 60.0)
                model.leases.clear()
        await check(store, model)
        await store.close()

    asyncio.run(play())
