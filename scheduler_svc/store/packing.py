"""Packs a tick's commit into the one argument of the commit function.

Output that is not in its log yet goes into the journal: one entry for the whole tick, packed without
looking at it. A log grows only when its request's record is written, a few times a second; so a tick of
many requests is one write.

Packing happens at the tick, at once: the records go on changing while the store is asked.
Of a request that was written before only what has changed is packed. That is safe because
the store takes commits only in unbroken sequence, so what was packed before has been stored.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from scheduler_svc.core.records import (
    MAX_DRAFTED_TOKENS,
    TOKEN_BYTES,
    Commit,
    Emitted,
    Event,
    QueueMove,
    Request,
)
from scheduler_svc.store import codec

_HEAD = struct.Struct(">QQI")
_PERCEIVED = codec.CHANGING_NAMES.index("perceived_s")
_STEPS = b""
"""In the journal, in place of a request: no row, but about the steps of the rows before."""
_DRAFTED = 2048
"""What one drafted token counts there; above `MAX_DRAFTED_TOKENS`."""
_COLUMNS = tuple(zip(codec.CHANGING_NAMES, codec.CHANGING_ENCODERS, strict=True))


@dataclass(frozen=True, slots=True)
class Packed:
    """What `CommitPacker.pack` has made, taken apart again."""

    epoch: int
    seq: int
    digest: str
    body: bytes
    journal: bytes
    """Empty: nothing of this tick goes into the journal."""


def unpack(encoded: bytes) -> Packed:
    epoch, seq, body_bytes = _HEAD.unpack_from(encoded)
    digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    end = _HEAD.size + body_bytes
    return Packed(epoch, seq, digest, encoded[_HEAD.size : end], encoded[end:])


class Step(NamedTuple):
    """What a row of the journal tells of the step that it is of."""

    drafted: int
    accepted: int
    step_s: float


class JournalRow(NamedTuple):
    """What one step has added to a request."""

    request_id: str
    offset: int
    token_ids: bytes
    step: Step | None
    """None: nothing more is known of it."""


def journal_rows(packed: bytes) -> list[JournalRow]:
    """The rows of a journal entry. Raises ValueError for what was not packed here."""
    try:
        found: list[JournalRow] = []
        rows: list[tuple[str, int, bytes]] = []
        for ids, offsets, counts, token_ids in msgpack.unpackb(packed, raw=True):
            if ids and ids[0] == _STEPS:
                found[len(found) - len(rows) :] = _with_steps(rows, offsets)
                continue
            if sum(counts) * TOKEN_BYTES != len(token_ids):
                raise ValueError("its columns do not fit each other")
            rows = list(Emitted([name.decode() for name in ids], offsets, counts, bytes(token_ids)).rows())
            found += [JournalRow(*row, None) for row in rows]
        return found
    except (AttributeError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"no journal entry: {type(error).__name__}") from error


def _steps(emitted: Emitted) -> tuple[Any, ...]:
    """What `_with_steps` reads, in the form of columns. So an earlier version can still read the output: for
    it these are rows without tokens, of a request without a name."""
    counts = zip(emitted.drafted, emitted.accepted, strict=True)
    told = [round(emitted.step_s * 1e6), *[drafted * _DRAFTED + accepted for drafted, accepted in counts]]
    return [_STEPS] * len(told), told, [0] * len(told), b""


def _with_steps(rows: list[tuple[str, int, bytes]], told: list[int]) -> list[JournalRow]:
    """The rows with the steps that they are of."""
    steps = []
    for value in told[1:]:
        drafted, accepted = divmod(value, _DRAFTED)
        if not 0 <= accepted <= drafted <= MAX_DRAFTED_TOKENS:
            raise ValueError("no counts of a step")
        steps.append(Step(drafted, accepted, told[0] / 1e6))
    return [JournalRow(*row, step) for row, step in zip(rows, steps, strict=True)]


class CommitPacker:
    """Numbers and packs the commits of one leadership, in their order."""

    def __init__(self, epoch: int, last_seq: int) -> None:
        self.epoch = epoch
        self.last_seq = last_seq
        """Of the last commit that was packed."""
        self._journal: deque[tuple[int, int]] = deque()
        """(tick, number) of this leadership's commits in the journal."""
        self._journal_from = -1
        """The commit from which on the journal is kept, as it was packed last; 0: it is empty."""
        self._written: dict[str, tuple[Any, ...]] = {}
        """Values of the changing fields as they were packed last, of live requests that have changed."""
        # Valkey's decoder does not know the newer type for bytes.
        self._pack = msgpack.Packer(use_bin_type=False).pack

    def pack(self, commit: Commit, now_s: float) -> bytes:
        """Every packed commit must be stored before the next one can be."""
        submitted = [self._submission(request) for request in commit.submitted]
        finished_ids = {request.request_id for request in commit.finished}
        appended: list[str | int | bytes] = []
        for entry in commit.appended:
            appended += (
                entry.request_id,
                entry.entry,
                entry.offset,
                len(entry.token_ids) // TOKEN_BYTES,
                codec.tokens_to_text(entry.token_ids),
                entry.logprobs,
            )
        self.last_seq += 1
        journal = self._journaled(commit)
        body = (
            _ms(now_s),
            submitted,
            appended,
            [self._change(request) for request in commit.changed if request.request_id not in finished_ids],
            [_move(move) for move in commit.moves],
            [value for request_id, expiry_s in commit.leased for value in (_ms(expiry_s), request_id)],
            commit.unleased,
            [self._ending(request, now_s) for request in commit.finished],
            commit.forgotten,
            [
                (worker.worker_id, _ms(expiry_s), codec.worker_fields(worker))
                for worker, expiry_s in commit.workers
            ],
            commit.workers_gone,
            [_event(event) for event in commit.events],
            [text for item in commit.learnt.items() for text in item],
            self._keep_journal_from(commit),
        )
        if commit.moves:
            # A move writes level and rank by itself: what is known of them here would be too old.
            changed_ids = {request.request_id for request in commit.changed}
            for move in commit.moves:
                if move.level is not None and move.request_id not in changed_ids:
                    self._written.pop(move.request_id, None)
        packed: bytes = self._pack(body)
        return _HEAD.pack(self.epoch, self.last_seq, len(packed)) + packed + journal

    def _journaled(self, commit: Commit) -> bytes:
        if commit.logged_tick >= commit.tick:
            return b""
        # Output with log probabilities is in its log already, with what the journal has no place for.
        columns: list[Any] = []
        for place, emitted in enumerate(commit.emitted):
            if place not in commit.logprobs:
                columns.append((emitted.request_ids, emitted.offsets, emitted.counts, emitted.token_ids))
                if emitted.drafted:
                    columns.append(_steps(emitted))
        if not columns:
            return b""
        self._journal.append((commit.tick, self.last_seq))
        packed: bytes = self._pack(columns)
        return packed

    def _keep_journal_from(self, commit: Commit) -> Any:
        """The first commit whose output is still needed, a number; False: nothing has changed about that."""
        # Any: where the type is "a number or False", compiled code makes a number of False.
        if commit.logged_tick < 0:
            return False
        journal = self._journal
        while journal and journal[0][0] <= commit.logged_tick:
            journal.popleft()
        first = journal[0][1] if journal else 0
        if first == self._journal_from:
            return False
        self._journal_from = first
        return first or self.last_seq + 1

    def _submission(self, request: Request) -> tuple[Any, ...]:
        # Not kept in `_written`: of the many that only wait it would cost more memory than it saves.
        return (
            request.request_id,
            request.arrival_seq,
            request.spec.priority,
            float(request.perceived_s),
            codec.tokens_to_text(request.spec.packed_prompt),
            request.spec.params_json,
            codec.new_request_fields(request),
        )

    def _change(self, request: Request) -> tuple[Any, ...]:
        values = codec.changing_values(request)
        before = self._written.get(request.request_id)
        self._written[request.request_id] = values
        fields: list[str] = []
        if before is None:
            for (name, encode), value in zip(_COLUMNS, values, strict=True):
                fields += name, encode(value)
        elif before != values:
            for (name, encode), value, old in zip(_COLUMNS, values, before, strict=True):
                if value is not old and value != old:
                    fields += name, encode(value)
        # The store compares its log with how far it is known here to go.
        perceived_s = float(values[_PERCEIVED])
        return request.request_id, perceived_s, fields, request.log_entries, request.output_tokens

    def _ending(self, request: Request, now_s: float) -> tuple[Any, ...]:
        _, _, fields, entries, tokens = self._change(request)
        del self._written[request.request_id]
        ended_s = now_s if request.finished_s is None else request.finished_s
        return request.request_id, _ms(ended_s), fields, entries, tokens


def _ms(instant_s: float) -> int:
    return int(instant_s * 1e3)


def _move(move: QueueMove) -> tuple[str, Any, float, str]:
    rank = float(move.rank)
    level: Any = move.level
    if level is None:
        # Not in one expression: of "False or a number" compiled code makes a number.
        level = False
    return move.request_id, level, rank, repr(rank)


def _event(event: Event) -> list[str]:
    fields = ["kind", event.kind]
    for name in ("request_id", "worker_id", "detail"):
        if value := getattr(event, name):
            fields += name, value
    return fields


def pairs(flat: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    """(a, b), (c, d), ... of a, b, c, d, ..."""
    iterator = iter(flat)
    return zip(iterator, iterator, strict=True)
