"""Whether a pool is stopped, as an operator sees it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from laps.history import HistoryPoint
from scheduler_svc.store import codec, keys, layout
from scheduler_svc.store.store import Store


@dataclass(frozen=True, slots=True)
class Stopped:
    """The mark that an alarm has left. `seen` was stored once; `stored` is what was found."""

    by: str
    reason: str
    at_s: float
    seen: HistoryPoint
    stored: HistoryPoint

    @property
    def lost_commits(self) -> int | None:
        """At least so many; None: the alarm was about something else, or it cannot be told."""
        lost = self.seen.commit_seq - self.stored.commit_seq
        return lost if self.seen.timeline == self.stored.timeline and lost > 0 else None


@dataclass(frozen=True, slots=True)
class PoolState:
    stopped: Stopped | None
    stored: HistoryPoint
    holder: str
    """Who leads; empty: nobody."""
    address: str
    committed_s: float
    """Instant of the last commit; 0: there was none."""
    live: int
    finished: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


async def read_pool_state(store: Store) -> PoolState:
    """Raises StoreUnavailable."""
    pool, redis, read = store.pool, store.reader.redis, store.reader.read
    meta = _decoded(layout.META_FIELDS, await read(redis.hgetall(keys.meta(pool))))
    leader = _decoded(layout.LEADER_FIELDS, await read(redis.hgetall(keys.leader(pool))))
    mark = _decoded(layout.STOPPED_FIELDS, await read(redis.hgetall(keys.stopped(pool))))
    seconds, _ = await read(redis.time())
    return PoolState(
        stopped=_stopped(mark) if mark else None,
        stored=HistoryPoint(meta.get("timeline", 1), leader.get("epoch", 0), meta.get("commit_seq", 0)),
        holder=leader.get("holder", "") if leader.get("expires_ms", 0) > seconds * 1e3 else "",
        address=leader.get("address", ""),
        committed_s=meta.get("committed_ms", 0) / 1e3,
        live=await read(redis.zcard(keys.live(pool))),
        finished=await read(redis.zcard(keys.finished(pool))),
    )


def _stopped(mark: dict[str, Any]) -> Stopped:
    def point(of: str) -> HistoryPoint:
        return HistoryPoint(mark[f"{of}_timeline"], mark[f"{of}_epoch"], mark[f"{of}_commit_seq"])

    return Stopped(mark["by"], mark["reason"], mark["at_ms"] / 1e3, point("seen"), point("stored"))


def _decoded(fields: Any, stored: dict[bytes, bytes]) -> dict[str, Any]:
    return codec.decode_fields(fields, {name.decode(): text.decode() for name, text in stored.items()})
