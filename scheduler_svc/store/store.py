"""The durable state of a pool, in Redis. Written by the pool's leader alone."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import astuple, dataclass
from operator import attrgetter
from typing import Any

from redis import exceptions

from laps.history import HistoryPoint
from scheduler_svc.core.records import TOKEN_BYTES, Commit, Recovered, Request
from scheduler_svc.store import codec, connection, inspector_proto, library, packing, recovery
from scheduler_svc.store.errors import Alarm, SequenceGap, StaleLeader, StoreError, StoreUnavailable

LOG_BATCH_ENTRIES = 5000
LOST_BEFORE = "the commit before this one is not known to be stored"


@dataclass(frozen=True, slots=True)
class Leadership:
    """The right to write. It ends when someone else takes it, which can happen as soon as it is not renewed
    in time."""

    epoch: int
    commit_seq: int
    """Of the last commit that was stored when it began."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """An entry of a request's token log."""

    entry: int
    offset: int
    """Output tokens before these."""
    token_ids: bytes
    logprobs: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.token_ids) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class ServerInfo:
    version: str
    warnings: list[str]
    """What in the server's settings does not fit a durable store, in words."""


class Store:
    """One pool's state. Not for use by several event loops."""

    def __init__(self, url: str, pool: str, *, timeout_s: float = 5.0, **connection_options: Any) -> None:
        """`connection_options` go to redis-py, for example TLS files."""
        self.pool = pool
        self._url = url
        self._timeout_s = timeout_s
        self._connections = connection.make_pool(url, timeout_s, **connection_options)
        self.reader = connection.Reader(self._connections, url, pool)
        self._redis = self.reader.redis
        # Two connections: a renewal must not wait behind a long commit.
        self._commits = connection.Caller(self._connections, url, pool, timeout_s)
        self._terms = connection.Caller(self._connections, url, pool, timeout_s)
        self._holder = ""
        self._ttl_s = 0.0
        self._packer: packing.CommitPacker | None = None
        self.seen = HistoryPoint()
        """The furthest that this process has ever seen the store, or has been told that somebody else
        has: a store behind it is an alarm."""

    # --- Connection --------------------------------------------------------------------------

    async def connect(self) -> ServerInfo:
        """Makes sure that a fitting server answers.

        Raises:
            StoreUnavailable: it does not answer; the message is one clear line.
            StoreError: it refuses us, or is too old.
        """
        info = await self.reader.read(self._redis.info())
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < connection.LEAST_VERSION:
            raise StoreError(f"Redis at {connection.place(self._url)} is {version}; 7.0 or later is needed")
        return ServerInfo(str(info.get("valkey_version", version)), await self._warnings(info))

    async def memory_share(self) -> float:
        """Used share of the memory that the server may take, about 0 to 1; 0: it has no bound.

        Raises:
            StoreUnavailable: it does not answer.
        """
        info = await self.reader.read(self._redis.info("memory"))
        most_bytes = int(info.get("maxmemory") or 0)
        return int(info["used_memory"]) / most_bytes if most_bytes else 0.0

    async def load_functions(self) -> None:
        await self.reader.read(library.load(self._redis))

    async def close(self) -> None:
        self._commits.drop()
        self._terms.drop()
        await self._redis.aclose()
        await self._connections.aclose()

    async def _warnings(self, info: dict[str, Any]) -> list[str]:
        warnings = []
        # While it reads its file at start a server says that it keeps none.
        if not info.get("aof_enabled") and not info.get("loading"):
            warnings.append(
                "appendonly is off: a crash of the store loses everything since its last snapshot"
            )
        elif info.get("aof_enabled"):
            try:
                fsync = (await self._redis.config_get("appendfsync")).get("appendfsync")
            except exceptions.RedisError:
                fsync = None  # Managed servers hide their settings.
            if fsync not in (None, "always", b"always"):
                warnings.append("appendfsync is not always: a crash of the store can lose its last second")
        if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
            warnings.append("maxmemory-policy is not noeviction: the store may throw requests away")
        return warnings

    # --- Leadership --------------------------------------------------------------------------

    async def lead(self, holder: str, address: str, ttl_s: float) -> Leadership | None:
        """Takes the leadership if nobody else has it, and sees to it that the store has this version's
        functions. `holder` names this process; the holder of before may take it again at once. Every success
        is a new epoch.

        Raises:
            StoreUnavailable: nothing is known about it; to be called again.
            HistoryWentBack: the store is older than what this process has seen of it.
            PoolStopped: it was stopped, and nobody may lead it.
        """
        reply = await self._terms.call(
            "laps_lead", holder, address, int(ttl_s * 1e3), *astuple(self.seen), self._new_term()
        )
        taken, epoch, _expires_ms, commit_seq, timeline, term = reply
        # A standby sees so how far the leader has come, and would notice a store that came back older.
        self.seen = max(self.seen, HistoryPoint(timeline, epoch, commit_seq, term.decode()))
        if not taken:
            return None
        # A scheduler of another version may have started since, and have loaded its own.
        await self.load_functions()
        self._holder = holder
        self._ttl_s = ttl_s
        self._packer = packing.CommitPacker(epoch, commit_seq)
        return Leadership(epoch, commit_seq)

    def _new_term(self) -> str:
        return secrets.token_hex(8)

    async def renew(self) -> Leadership:
        """Leads for another `ttl_s`.

        Raises:
            StaleLeader: the leadership was lost.
            HistoryWentBack: the store is older than what this process knows of it.
        """
        return await self._renew(self.seen)

    async def _renew(self, seen: HistoryPoint) -> Leadership:
        packer = self._leading()
        await self._terms.call(
            "laps_renew", packer.epoch, self._holder, int(self._ttl_s * 1e3), *astuple(seen)
        )
        return Leadership(packer.epoch, self.seen.commit_seq)

    async def witness(self, seen: HistoryPoint) -> None:
        """Somebody has seen the pool's history so far. Nothing is written any more if the store does not
        hold that.

        Raises:
            StaleLeader: another scheduler leads: it is no wonder that there is more than this one knows.
            HistoryWentBack: the store has lost something.
            StoreUnavailable: the store cannot be asked. Nothing can be written to it either.
        """
        same_term = (seen.timeline, seen.epoch) == (self.seen.timeline, self.seen.epoch) and seen.term in (
            "",
            self.seen.term,
        )
        if seen.timeline == 0 or (same_term and seen <= self.seen):
            return
        try:
            await self._renew(seen)
        except Alarm:
            self._packer = None
            raise

    async def stop_pool(self, by: str, reason: str, seen: HistoryPoint) -> None:
        """Leaves a mark that keeps everybody from leading, whatever becomes of this process, until
        `resume_pool`. `seen`: the furthest point of the history that is known to have been stored.

        Raises:
            StoreUnavailable: nothing is known about the mark; to be called again.
        """
        self._packer = None
        await self._terms.call("laps_stop", by, reason, *astuple(seen))

    async def resume_pool(self, by: str) -> int:
        """An operator accepts the store as it is, with what it has lost. Returns the timeline that
        begins, or 0 if the pool was not stopped."""
        timeline: int = await self._terms.call("laps_resume", by)
        return timeline

    async def resign(self) -> None:
        """Lets others lead at once. Does nothing if this process does not lead."""
        packer, self._packer = self._packer, None
        if packer is not None:
            await self._terms.call("laps_resign", packer.epoch, self._holder)

    async def describe(self, policy: str, level_thresholds_s: Sequence[float] = ()) -> None:
        """Writes down what the queues mean under the policy in force, for readers.

        Raises:
            StaleLeader: the leadership was lost.
        """
        thresholds = json.dumps(list(level_thresholds_s))
        await self._terms.call("laps_describe", self._leading().epoch, self._holder, policy, thresholds)

    def _leading(self) -> packing.CommitPacker:
        if self._packer is None:
            raise StaleLeader("STALE_EPOCH this process does not lead")
        return self._packer

    # --- Writing -----------------------------------------------------------------------------

    def encode(self, commit: Commit, now_s: float) -> bytes:
        """Packs a tick as it is now. Every packed commit must then be committed, in order.

        Raises:
            StaleLeader: this process does not lead.
        """
        return self._leading().pack(commit, now_s)

    async def commit(self, encoded: bytes) -> bool:
        """Stores a packed tick, all of it or nothing. False: this very commit was stored already. The next
        one may be sent while this one has no answer yet, but no third.

        Raises:
            StoreUnavailable: the outcome is unknown, or that of the commit before is. Calling again with the
                same bytes, in the order of the commits, is safe.
            StaleLeader: another scheduler leads now.
            HistoryWentBack, LogConflict: the store is not what this process wrote. Stop.
        """
        packed = packing.unpack(encoded)
        try:
            reply = await self._commits.call("laps_commit", *self._commit_args(packed))
        except SequenceGap as gap:
            if self._lost_before(packed):
                raise StoreUnavailable(LOST_BEFORE) from gap
            raise
        return self._stored(packed, reply)

    def send(self, encoded: bytes, on_stored: Callable[[StoreError | None], None]) -> None:
        """`commit` for whoever does not wait: `on_stored` gets what that would raise, or None, in the turn of
        the event loop in which the answer comes."""
        packed = packing.unpack(encoded)

        def replied(reply: Any, error: StoreError | None) -> None:
            if error is None:
                self._stored(packed, reply)
            elif isinstance(error, SequenceGap) and self._lost_before(packed):
                error = StoreUnavailable(LOST_BEFORE)
            on_stored(error)

        self._commits.send("laps_commit", *self._commit_args(packed), on_reply=replied)

    def forget_sent(self) -> None:
        """Nobody waits any more for the answers of commits that were sent."""
        self._commits.drop()

    def _commit_args(self, packed: packing.Packed) -> tuple[str | bytes | int, ...]:
        return (
            packed.epoch,
            self._holder,
            packed.seq,
            self.seen.commit_seq,
            packed.digest,
            packed.body,
            packed.journal,
        )

    def _lost_before(self, packed: packing.Packed) -> bool:
        return self.seen.commit_seq < packed.seq - 1

    def _stored(self, packed: packing.Packed, reply: Any) -> bool:
        self.seen = self.seen.until(packed.seq)
        return bool(reply[1])

    # --- Reading -----------------------------------------------------------------------------

    def recovering(self) -> AsyncGenerator[Recovered, None]:
        """Everything that a new leader must know, in parts: first what was learnt and who has finished, then
        the live requests, a few hundred at a time. To be called right after `lead`.

        Raises:
            StaleLeader: this process does not lead.
            StoreUnavailable: the store does not answer, or one did that is behind it.
            LogConflict: a token log does not agree with its request.
        """
        return recovery.recover(self.reader, self._leading().epoch)

    async def recover(self) -> Recovered:
        """`recovering` as a whole, by arrival. Raises as that does."""
        whole = Recovered()
        async for part in self.recovering():
            whole.requests += part.requests
            whole.retained += part.retained
            whole.learnt |= part.learnt
        whole.requests.sort(key=attrgetter("arrival_seq"))
        return whole

    async def read_request(self, request_id: str) -> Request | None:
        """A live or retained request with prompt and output, or None if it is not known.

        Raises:
            StoreUnavailable: the store does not answer.
            RecordDamaged: what is stored is not a request.
        """
        flat, log, prompt, params = await self.reader.ask(
            "laps_read", request_id, 0, LOG_BATCH_ENTRIES, 1, raw=True
        )
        if not flat:
            return None
        with codec.damage(request_id):
            entries = _entries(log)
            if len(entries) == LOG_BATCH_ENTRIES:
                entries += await self.read_entries(request_id, entries[-1].end)
            return codec.request_from_fields(
                request_id,
                {name.decode(): value.decode() for name, value in packing.pairs(flat)},
                prompt=codec.tokens_from_text(prompt),
                params_json=codec.params_from_text(params.decode()),
                output=b"".join(entry.token_ids for entry in entries),
            )

    async def read_entries(self, request_id: str, from_offset: int = 0) -> list[LogEntry]:
        """The log entries that hold output tokens from `from_offset` on. The first one may
        begin before it."""
        entries: list[LogEntry] = []
        while True:
            _, log, _, _ = await self.reader.ask(
                "laps_read", request_id, from_offset, LOG_BATCH_ENTRIES, 0, raw=True
            )
            batch = _entries(log)
            entries += [entry for entry in batch if entry.end > from_offset]
            if len(batch) < LOG_BATCH_ENTRIES:
                return entries
            from_offset = batch[-1].end

    async def read_log(self, request_id: str, from_offset: int = 0) -> tuple[bytes, bytes]:
        """Packed output tokens from `from_offset` on, and their log probabilities (a serialized
        `TokenLogprobs`) if they were stored."""
        entries = await self.read_entries(request_id, from_offset)
        tokens = b"".join(entry.token_ids for entry in entries)
        # Serialized messages, put one behind the other, are their concatenation.
        logprobs = b"".join(entry.logprobs for entry in entries)
        surplus = max(0, from_offset - entries[0].offset) if entries else 0
        if surplus and logprobs:
            logprobs = inspector_proto.without_first_logprobs(logprobs, surplus)
        return tokens[surplus * TOKEN_BYTES :], logprobs


def _entries(flat: list[Any]) -> list[LogEntry]:
    iterator = iter(flat)
    return [
        LogEntry(number, offset, codec.tokens_from_text(tokens), logprobs)
        for number, offset, tokens, logprobs in zip(*[iterator] * 4, strict=True)
    ]
