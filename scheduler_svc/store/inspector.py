"""Answers about the queue, from the store alone: what redis-cli shows is what these show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from scheduler_svc.core.records import RequestState
from scheduler_svc.store import codec, connection, layout
from scheduler_svc.store.packing import pairs

NOT_READABLE = "its record cannot be read"
HEAD_LIMIT = 1000
PAGE_LIMIT = 1000
PAGE_DEFAULT = 100
LOOK_LIMIT = 2000
"""Requests that one call looks at, at most: bounds how long the store is busy with a page."""
CALLS_PER_PAGE = 5
CLOCK_SKEW_S = 10
"""How far the store's clock, which events carry, may be from the leader's, which arrivals carry."""

_TOKEN = re.compile(
    r"(?P<source>[a-z]+)/(?P<score>(?:[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e\+?[0-9]{1,3})?)?)/(?P<id>.*)",
    re.DOTALL,
)

LIVE = frozenset(RequestState) - {RequestState.FINISHED}


class BadPageToken(ValueError):
    """Not a token that an earlier page came with."""


@dataclass(frozen=True, slots=True)
class RequestView:
    request_id: str
    fields: dict[str, Any]
    """Typed values of `layout.REQUEST_FIELDS` by name."""
    lease_expires_s: float | None = None


@dataclass(frozen=True, slots=True)
class LevelView:
    level: int
    threshold_s: float
    """Below so many seconds of service a request is at this level or a higher one: of those that it still
    needs or of those that it has had, as the policy in force cuts them. 0: no bound."""
    waiting: int
    head: list[RequestView]
    """The first ones in the order in which they will run."""


@dataclass(frozen=True, slots=True)
class QueuesView:
    pool: str
    policy: str
    epoch: int
    commit_seq: int
    leader: str
    """Its address; empty: nobody leads."""
    waiting: int
    running: int
    backlog_s: float
    levels: list[LevelView]


@dataclass(frozen=True, slots=True)
class SlotView:
    slot: int
    request_id: str = ""
    """Empty: free."""
    lease_expires_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerView:
    worker_id: str
    fields: dict[str, Any]
    """Typed values of `layout.WORKER_FIELDS` by name."""
    slots: list[SlotView]


@dataclass(frozen=True, slots=True)
class Snapshot:
    time_s: float
    """On the store's clock."""
    queues: QueuesView
    workers: list[WorkerView]
    """Those whose session has not expired."""
    running: list[RequestView]


@dataclass(frozen=True, slots=True)
class EventView:
    time_s: float
    """On the store's clock."""
    kind: str
    worker_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """One request's life."""

    time_s: float
    """On the store's clock."""
    request: RequestView
    events: list[EventView]
    events_lost: bool
    """The first ones are no longer kept."""
    tokens_per_entry: list[int]
    """Of its token log."""
    position: int | None
    """Requests before it at its level, while it waits."""


@dataclass(frozen=True, slots=True)
class Page:
    requests: list[RequestView] = field(default_factory=list)
    next_page_token: str = ""
    """Empty: this was the last page."""


class Inspector:
    """Reads one pool. Each answer is one consistent reading."""

    def __init__(self, reader: connection.Reader, pool: str) -> None:
        """`reader` of a `Store` that is there already; or see `open`."""
        self.pool = pool
        self._reader = reader

    @classmethod
    def open(cls, url: str, pool: str, *, timeout_s: float = 5.0, **connection_options: Any) -> Inspector:
        """With connections of its own, to be closed by `close`."""
        connections = connection.make_pool(url, timeout_s, **connection_options)
        return cls(connection.Reader(connections, url, pool), pool)

    async def close(self) -> None:
        await self._reader.redis.aclose()
        await self._reader.redis.connection_pool.aclose()

    async def snapshot(
        self,
        head_limit: int = 10,
        running_limit: int = 1000,
        *,
        head_offset: int = 0,
        level: int | None = None,
    ) -> Snapshot:
        """The whole picture. `head_limit`: waiting requests told per level, at most 1000, after the first
        `head_offset`; of one `level`, or of all.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        head_limit = max(0, min(head_limit, HEAD_LIMIT))
        only = "" if level is None else level
        answer = await self._reader.ask("laps_snapshot", head_limit, running_limit, head_offset, only)
        now_ms, meta, leader, _live, levels, running, slots, workers = answer
        held = _leases(slots)
        return Snapshot(
            time_s=now_ms / 1e3,
            queues=self._queues(dict(pairs(meta)), dict(pairs(leader)), levels, len(held), now_ms),
            # The store has them in the order of their heartbeats, another one at each look.
            workers=sorted(
                (
                    _worker(worker_id, dict(pairs(stored)), held)
                    for worker_id, expires_ms, stored in _triples(workers)
                    if float(expires_ms) > now_ms
                ),
                key=lambda worker: _by_number(worker.worker_id),
            ),
            running=[
                RequestView(request_id, request_fields(stored), float(expires_ms) / 1e3)
                for request_id, expires_ms, stored in _triples(running)
            ],
        )

    async def list_queues(
        self, head_limit: int = 10, *, head_offset: int = 0, level: int | None = None
    ) -> QueuesView:
        return (await self.snapshot(head_limit, 0, head_offset=head_offset, level=level)).queues

    async def list_workers(self) -> list[WorkerView]:
        return (await self.snapshot(0, 0)).workers

    async def list_requests(
        self,
        states: Collection[RequestState] = LIVE,
        page_size: int = 0,
        page_token: str = "",
        finished_after_s: float = 0.0,
    ) -> Page:
        """Live requests by arrival, then finished ones by time of finish, of those only the ones that ended
        after `finished_after_s`; only running ones by id. No states: all live ones. A page can be short, or
        even empty, and not be the last.

        Raises:
            BadPageToken: the token is none of ours.
            StoreUnavailable: the store does not answer.
        """
        wanted = frozenset(states) or LIVE
        sources = _sources(wanted)
        first = {"finished": repr(max(finished_after_s * 1e3 - 1.0, 0.0))} if finished_after_s > 0.0 else {}
        source, score, last_id = (
            _parse_token(page_token) if page_token else (sources[0], first.get(sources[0], ""), "")
        )
        if source not in sources:
            raise BadPageToken(f"page_token {page_token!r} belongs to a listing of other states")
        size = max(1, min(page_size or PAGE_DEFAULT, PAGE_LIMIT))
        states_text = "," + ",".join(sorted(state.value for state in wanted)) + ","
        found: list[RequestView] = []
        for _ in range(CALLS_PER_PAGE):
            flat, more, score, last_id = await self._reader.ask(
                "laps_list", source, score, last_id, size - len(found), LOOK_LIMIT, states_text
            )
            views = [RequestView(request_id, request_fields(stored)) for request_id, stored in pairs(flat)]
            # The store's order is in whole milliseconds.
            found += [view for view in views if (view.fields["finished_s"] or math.inf) > finished_after_s]
            if not more:
                if source == sources[-1]:
                    return Page(found)
                source, score, last_id = sources[-1], first.get(sources[-1], ""), ""
            if len(found) == size:
                break
        return Page(found, f"{source}/{score}/{last_id}")

    async def timeline(self, request_id: str) -> Timeline | None:
        """What happened to a request; None: it is not known. Several readings, of what only grows: the events
        from its arrival to its end, and the offsets of its log.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        offsets: list[int] = []
        events: list[EventView] = []
        after = ""
        while True:
            answer = await self._reader.ask(
                "laps_timeline", request_id, len(offsets) + 1, LOOK_LIMIT, after, LOOK_LIMIT, CLOCK_SKEW_S
            )
            now_ms, stored, position, more_offsets, flat, looked, last = answer
            if not stored:
                return None
            fields = request_fields(stored)
            offsets += more_offsets
            events += [
                EventView(_event_s(event_id), kind, worker_id, detail)
                for event_id, kind, worker_id, detail in zip(*[iter(flat)] * 4, strict=True)
            ]
            ended = bool(events) and events[-1].kind == "finished"
            if len(more_offsets) < LOOK_LIMIT and (ended or looked < LOOK_LIMIT):
                break
            after = f"({last}" if last else after
        ends = [*offsets[1:], fields["output_tokens"]] if offsets else []
        return Timeline(
            time_s=now_ms / 1e3,
            request=RequestView(request_id, fields),
            events=events,
            events_lost=not events or events[0].kind != "submitted",
            tokens_per_entry=[end - start for start, end in zip(offsets, ends, strict=True)],
            position=None if position < 0 else position,
        )

    def _queues(
        self, meta: dict[str, str], leader: dict[str, str], levels: list[Any], running: int, now_ms: float
    ) -> QueuesView:
        thresholds_s = json.loads(meta.get("level_thresholds_s", "[]"))
        counts = levels + [[0, []]] * (len(thresholds_s) + 1 - len(levels))
        leads = leader.get("holder", "") and float(leader["expires_ms"]) > now_ms
        return QueuesView(
            pool=self.pool,
            policy=meta.get("policy", ""),
            epoch=int(leader.get("epoch", 0)),
            commit_seq=int(meta.get("commit_seq", 0)),
            leader=leader["address"] if leads else "",
            waiting=sum(count for count, _ in counts),
            running=running,
            backlog_s=int(meta.get("backlog_us", 0)) / 1e6,
            levels=[
                LevelView(
                    level,
                    thresholds_s[level] if level < len(thresholds_s) else 0.0,
                    count,
                    [RequestView(request_id, request_fields(stored)) for request_id, stored in pairs(head)],
                )
                for level, (count, head) in enumerate(counts)
            ],
        )


def request_fields(stored: list[str]) -> dict[str, Any]:
    """Typed values of a request's hash that came as name, value, name, value, ... One that cannot be read
    must not hide the others: what of it can be is told."""
    texts = dict(pairs(stored))
    try:
        fields = codec.decode_fields(layout.REQUEST_FIELDS, texts)
    except codec.DAMAGE:
        fields = {}
    if len(fields) == len(layout.REQUEST_FIELDS):
        return fields
    values, whole = codec.readable_request_values(texts)
    return values if whole else values | {"error": NOT_READABLE}


def _sources(states: frozenset[RequestState]) -> list[str]:
    if states == {RequestState.RUNNING}:
        return ["leases"]
    return (["live"] if states & LIVE else []) + (["finished"] if RequestState.FINISHED in states else [])


def _parse_token(token: str) -> tuple[str, str, str]:
    found = _TOKEN.fullmatch(token)
    if found is None:
        raise BadPageToken(f"page_token {token!r} is not one of ours")
    return found["source"], found["score"], found["id"]


def _event_s(event_id: str) -> float:
    return int(event_id.partition("-")[0]) / 1e3


def _by_number(name: str) -> list[str | int]:
    """A key that sorts worker-2 before worker-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _triples(flat: list[Any]) -> Any:
    iterator = iter(flat)
    return zip(iterator, iterator, iterator, strict=True)


def _leases(flat: list[Any]) -> dict[tuple[str, int], SlotView]:
    """Who holds which slot. One that has been preempted and not let go yet does not count."""
    iterator = iter(flat)
    held = {}
    for request_id, expires_ms, worker_id, slot, releasing in zip(*[iterator] * 5, strict=True):
        if worker_id and releasing != "1" and slot and slot.isdecimal():
            held[worker_id, int(slot)] = SlotView(int(slot), request_id, float(expires_ms) / 1e3)
    return held


def _worker(worker_id: str, stored: dict[str, str], held: dict[tuple[str, int], SlotView]) -> WorkerView:
    fields = codec.decode_fields(layout.WORKER_FIELDS, stored)
    slots = [held.get((worker_id, slot)) or SlotView(slot) for slot in range(fields.get("slots", 0))]
    return WorkerView(worker_id, fields, slots)
