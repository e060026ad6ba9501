"""One commit in the store's model: first everything is checked, then everything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from scheduler_svc.store.codec import queue_score

WORKER_KEPT_MS = 3_600_000


class Refusal(Exception):
    """An error reply; begins with its code."""


@dataclass
class Entry:
    number: int
    offset: int
    tokens: str
    logprobs: str = ""


@dataclass
class Keys:
    """One pool's keys, by what follows `laps:{POOL}:`."""

    meta: dict[str, str] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    epochs: dict[str, str] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    queues: dict[str, dict[str, float]] = field(default_factory=dict)
    live: dict[str, float] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)
    workers: dict[str, float] = field(default_factory=dict)
    worker: dict[str, dict[str, str]] = field(default_factory=dict)
    request: dict[str, dict[str, str]] = field(default_factory=dict)
    prompt: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[Entry]] = field(default_factory=dict)
    journal: list[tuple[int, bytes]] = field(default_factory=list)
    """Commit numbers and rows as packed."""
    learnt: dict[str, str] = field(default_factory=dict)


@dataclass
class _Record:
    """What is stored about a request of a commit, and what the commit makes of it."""

    id: str
    finished: bool = False
    entries: int = 0
    tokens: int = 0
    grown: bool = False
    queue: str = ""
    priority: int = 0
    arrival_seq: int = 0
    perceived_s: float = 0.0
    perceives_s: float | None = None
    fields: list[str] | None = None
    move: Any = None
    finishes: int | None = None
    forgotten: bool = False

    def set_fields(self, fields: list[str]) -> None:
        # Submitted and ended in one tick: both.
        self.fields = fields if self.fields is None else self.fields + fields


class CommitCall:
    """A call of `laps_commit` that has passed the fence and the sequence."""

    def __init__(self, keys: Keys, seq: int, body: list[Any], journal: bytes, check_log: bool) -> None:
        self.keys = keys
        self.seq = seq
        self.journal = journal
        self.now, self.submitted, self.appended, self.changed, self.moves, self.leased = body[:6]
        self.unleased, self.finished, self.forgotten, self.workers, self.gone, self.events = body[6:12]
        self.learnt, self.journal_from = body[12:]
        self._check_log = check_log
        self.records: dict[str, _Record] = {}
        self.new_entries: list[tuple[str, Entry]] = []
        self.levels = int(keys.meta.get("levels", "0"))

    def _known(self, request_id: str) -> _Record:
        record = self.records.get(request_id)
        if record is None:
            stored = self.keys.request.get(request_id)
            if stored is None:
                raise Refusal(f"UNKNOWN_REQUEST {request_id}")
            record = self.records[request_id] = _Record(
                request_id,
                finished=stored["state"] == "finished",
                entries=int(stored["log_entries"]),
                tokens=int(stored["output_tokens"]),
                queue=stored["queue"],
                priority=int(stored["priority"]),
                arrival_seq=int(stored["arrival_seq"]),
                perceived_s=float(stored["perceived_s"]),
            )
        return record

    def _unfinished(self, request_id: str) -> _Record:
        record = self._known(request_id)
        if record.finished:
            raise Refusal(f"ALREADY_FINISHED {request_id}")
        return record

    def check(self) -> None:
        for request_id, arrival_seq, priority, perceives_s, _, _, fields in self.submitted:
            if request_id in self.records or request_id in self.keys.request:
                raise Refusal(f"REQUEST_EXISTS {request_id}")
            self.records[request_id] = _Record(
                request_id,
                arrival_seq=arrival_seq,
                priority=priority,
                perceives_s=perceives_s,
                fields=list(fields),
            )
        self._check_entries()
        for request_id, perceives_s, fields, entries, tokens in self.changed:
            record = self._unfinished(request_id)
            self._check_end(record, entries, tokens)
            record.perceives_s = perceives_s
            record.set_fields(list(fields))
        for move in self.moves:
            record = self._known(move[0])
            record.move = move
            if move[1] is not False:
                if record.finished:
                    raise Refusal(f"ALREADY_FINISHED {record.id}")
                self.levels = max(self.levels, move[1] + 1)
        for request_id in self.leased[1::2]:
            if request_id not in self.records and request_id not in self.keys.live:
                self._unfinished(request_id)
        for request_id, finishes, fields, entries, tokens in self.finished:
            record = self._unfinished(request_id)
            self._check_end(record, entries, tokens)
            record.finished, record.finishes, record.perceives_s = True, finishes, 0.0
            record.set_fields(list(fields))
        for request_id in self.forgotten:
            if not self._known(request_id).finished:
                raise Refusal(f"NOT_FINISHED {request_id}")
            self.records[request_id].forgotten = True

    def _check_entries(self) -> None:
        for request_id, number, offset, count, tokens, logprobs in _sixes(self.appended):
            record = self._unfinished(request_id)
            if self._check_log and number > record.entries + 1:
                raise Refusal(f"LOG_GAP entry {number} after {record.entries} of {request_id}")
            if self._check_log and (number, offset) != (record.entries + 1, record.tokens):
                raise Refusal(
                    f"LOG_CONFLICT entry {number} at {offset} of {request_id}, whose log is stored to "
                    f"{record.entries} {record.tokens}"
                )
            record.entries, record.tokens, record.grown = number, offset + count, True
            self.new_entries.append((request_id, Entry(number, offset, tokens, logprobs)))

    def _check_end(self, record: _Record, entries: int, tokens: int) -> None:
        if self._check_log and (record.entries, record.tokens) != (entries, tokens):
            raise Refusal(
                f"LOG_CONFLICT the log of {record.id} is stored to {record.entries} {record.tokens}, "
                f"it was written to {entries} {tokens}"
            )

    def write(self) -> None:
        keys = self.keys
        for request_id, arrival_seq, _, _, prompt, params, _ in self.submitted:
            keys.prompt[request_id], keys.params[request_id] = prompt, params
            keys.live[request_id] = float(arrival_seq)
        for request_id, entry in self.new_entries:
            keys.tokens.setdefault(request_id, []).append(entry)
        if self.journal:
            keys.journal.append((self.seq, self.journal))
            keys.meta["journal_seq"] = str(self.seq)
        if self.journal_from:
            keys.journal[:] = [entry for entry in keys.journal if entry[0] >= self.journal_from]
            keys.meta["journal_from"] = str(self.journal_from)
        for expiry_ms, request_id in zip(self.leased[::2], self.leased[1::2], strict=True):
            keys.leases[request_id] = float(expiry_ms)
        for request_id in self.unleased:
            keys.leases.pop(request_id, None)
        backlog_us = int(keys.meta.get("backlog_us", "0"))
        for record in self.records.values():
            backlog_us += self._write_record(record)
        self._write_workers()
        keys.learnt.update(zip(self.learnt[::2], self.learnt[1::2], strict=True))
        keys.meta.update(committed_ms=str(self.now), backlog_us=str(backlog_us), levels=str(self.levels))

    def _write_record(self, record: _Record) -> int:
        """Returns by how much the backlog grows, in microseconds."""
        keys, fields = self.keys, list(record.fields or ())
        level: str | None = None
        if record.finishes is not None:
            level = ""
        elif record.move is not None:
            level = "" if record.move[1] is False else str(record.move[1])
        if level is not None:
            if record.queue not in ("", level):
                keys.queues[record.queue].pop(record.id, None)
            fields += "queue", level
            if level != "":
                score = queue_score(record.priority, record.move[2], record.arrival_seq)
                keys.queues.setdefault(level, {})[record.id] = score
                fields += "level", level, "rank", record.move[3]
        backlog_us = 0
        if record.perceives_s is not None:
            backlog_us = _microseconds(record.perceives_s) - _microseconds(record.perceived_s)
        if record.grown:
            fields += "log_entries", str(record.entries), "output_tokens", str(record.tokens)
        if fields:
            stored = keys.request.setdefault(record.id, {})
            stored.update(zip(fields[::2], fields[1::2], strict=True))
        if record.finishes is not None:
            for kind in (keys.live, keys.leases):
                kind.pop(record.id, None)
            keys.finished[record.id] = float(record.finishes)
        if record.forgotten:
            for kept in (keys.request, keys.tokens, keys.prompt, keys.params, keys.finished):
                kept.pop(record.id, None)
        return backlog_us

    def _write_workers(self) -> None:
        keys, gone = self.keys, list(self.gone)
        for worker_id, expires_ms, fields in self.workers:
            keys.workers[worker_id] = float(expires_ms)
            keys.worker.setdefault(worker_id, {}).update(zip(fields[::2], fields[1::2], strict=True))
        if self.workers:
            due = sorted((at, name) for name, at in keys.workers.items() if at <= self.now - WORKER_KEPT_MS)
            gone += [name for _, name in due[:16]]
        for worker_id in gone:
            keys.workers.pop(worker_id, None)
            keys.worker.pop(worker_id, None)


def _sixes(flat: list[Any]) -> Iterable[tuple[Any, ...]]:
    iterator = iter(flat)
    return zip(*[iterator] * 6, strict=True)


def _microseconds(seconds: float) -> int:
    if math.isnan(seconds) or seconds <= 0:
        return 0
    return math.floor(min(seconds, 1e9) * 1e6 + 0.5)
