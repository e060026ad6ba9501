"""What really happened, and whether it may have.

The history is told of every commit at the instant when the store carries it out, and of everything that a
client or a gateway is shown. It knows what each request's output must be, so it can judge at once.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduler_svc.core.records import TOKEN_BYTES
from scheduler_svc.core.steps import MAX_REFUSED_ROWS
from scheduler_svc.store.packing import journal_rows
from simulator.faults.model import output_of
from simulator.faults.store_model import Keys, unpack_body


class Violation(AssertionError):
    """Something happened that must never happen."""


@dataclass
class Life:
    """One stored request."""

    request_id: str
    expected: list[int]
    """Its whole output: up to the end token, or max_tokens long."""
    max_tokens: int
    stored_s: float
    stored_tokens: int = 0
    entries: int = 0
    logged_tokens: int = 0
    """Those in its log; the journal may hold more."""
    ended: str = ""
    """Its finish reason, once that is stored."""
    ended_s: float = 0.0
    forgotten: bool = False
    acknowledged: bool = False
    client_gone_s: float | None = None
    """Since when nobody wants it any more and the gateway could know."""
    grace_s: float = 0.0
    former_tokens: int = 0
    """Of a forgotten request of the same id and body: what its clients have read stays right."""
    cancels: bool = True
    """Whether a lost client ends it."""


@dataclass
class Counts:
    events: int = 0
    commits: int = 0
    commits_repeated: int = 0
    requests: int = 0
    tokens: int = 0
    chunks: int = 0
    refused: int = 0
    resumed: int = 0
    terms: int = 0
    alarms: int = 0
    preemptions: int = 0
    stale_writes_refused: int = 0
    rows_refused: int = 0
    """Of workers that lied."""
    lies: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, dict):
                for key, count in value.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, name, mine + value)

    def fault(self, kind: str) -> None:
        self.faults[kind] = self.faults.get(kind, 0) + 1

    def lie(self, kind: str) -> None:
        self.lies[kind] = self.lies.get(kind, 0) + 1


class History:
    def __init__(self, now_s: Callable[[], float], trace: Callable[[str, str], None]) -> None:
        self.lives: dict[str, Life] = {}
        self.counts = Counts()
        self.epoch = 0
        """The newest that the store has given out."""
        self.seq = 0
        self.rolled_back = False
        """The store has lost something: from here on only an alarm is right."""
        self.lost: dict[str, Life] = {}
        """Requests that the store has forgotten about."""
        self.lied_about: Counter[str] = Counter()
        """Reports of lying workers by the request that they were about."""
        self.damaged: set[str] = set()
        """Requests of whose stored log something was lost."""
        self.violation = ""
        """The first one. Kept, because whatever code is running may catch the exception."""
        self._now_s = now_s
        self._trace = trace

    @property
    def lossy(self) -> bool:
        """The store has lost something."""
        return self.rolled_back or bool(self.damaged)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.violated(what)

    def violated(self, what: str) -> None:
        self.violation = self.violation or what
        raise Violation(what)

    def adopt(self, keys: Keys) -> None:
        """From here on the history is what these keys hold: some of it is lost."""
        self.epoch = int(keys.leader.get("epoch", "0"))
        self.seq = int(keys.meta.get("commit_seq", "0"))
        for request_id, life in list(self.lives.items()):
            stored = keys.request.get(request_id)
            if stored is None:
                self.lost[request_id] = self.lives.pop(request_id)
                continue
            log = keys.tokens.get(request_id, [])
            life.entries = len(log)
            life.logged_tokens = sum(len(entry.tokens.split()) for entry in log)
            life.stored_tokens = life.logged_tokens
            life.ended = stored.get("finish_reason", "") if stored["state"] == "finished" else ""
            life.forgotten = False
        for _, rows in keys.journal:
            for request_id, offset, token_ids, _ in journal_rows(rows):
                found = self.lives.get(request_id)
                # What comes after a hole is lost with it.
                if found is not None and offset <= found.stored_tokens:
                    found.stored_tokens = max(found.stored_tokens, offset + len(token_ids) // TOKEN_BYTES)
        self.damaged.clear()

    # --- What the store does -------------------------------------------------------------------

    def led(self, epoch: int, holder: str) -> None:
        self.counts.terms += 1
        self.require(epoch == self.epoch + 1, f"epoch {epoch} was given out after {self.epoch}")
        self.epoch = epoch
        self._trace("store", f"{holder} leads, epoch {epoch}")

    def committed(self, epoch: int, seq: int, body: bytes, journal: bytes) -> None:
        """The store has just carried out a new commit."""
        self.counts.commits += 1
        self.require(epoch == self.epoch, f"a leader of epoch {epoch} wrote in epoch {self.epoch}")
        self.require(seq == self.seq + 1, f"commit {seq} was taken after {self.seq}")
        self.seq = seq
        fields = unpack_body(body)
        for new in fields[1]:
            self._submitted(new)
        for row in journal_rows(journal) if journal else ():
            tokens = struct.unpack(f"<{len(row.token_ids) // TOKEN_BYTES}I", row.token_ids)
            self._journaled(row.request_id, row.offset, list(tokens))
        appended = fields[2]
        for at in range(0, len(appended), 6):
            request_id, entry, offset, _, text, _ = appended[at : at + 6]
            self._appended(request_id, entry, offset, text)
        for ending in fields[7]:
            self._finished(ending[0], ending[2])
        for request_id in fields[8]:
            self.lives[request_id].forgotten = True
        for event in fields[11]:
            self.counts.preemptions += event[1] == "preempted"
            if event[1] == "row_refused":
                self.counts.rows_refused += 1
                request_id = event[3]
                self.require(self.lied_about[request_id] > 0, f"a row of {request_id} was refused: {event}")
        self._trace(
            "store",
            f"commit {epoch}/{seq}: +{len(fields[1])} requests, {len(appended) // 6} entries, "
            f"{len(journal)} bytes of journal, {len(fields[7])} ended",
        )

    def _submitted(self, new: Sequence[Any]) -> None:
        request_id, prompt = new[0], tuple(map(int, new[4].split()))
        stored = dict(zip(new[6][::2], new[6][1::2], strict=True))
        known = self.lives.get(request_id)
        self.require(known is None or known.forgotten, f"{request_id} was stored twice")
        self.counts.requests += 1
        max_tokens = int(stored["max_tokens"])
        self.lives[request_id] = Life(
            request_id,
            output_of(prompt, max_tokens),
            max_tokens,
            self._now_s(),
            grace_s=float(stored["disconnect_grace_s"]),
            former_tokens=0 if known is None else max(known.former_tokens, known.stored_tokens),
            cancels=stored["cancel_on_disconnect"] == "1",
        )

    def _appended(self, request_id: str, entry: int, offset: int, text: str) -> None:
        life = self.lives[request_id]
        tokens = [int(token) for token in text.split()]
        if request_id in self.damaged:
            self.violated(f"entry {entry} of {request_id} was taken, though entries before it are lost")
        self.require(
            entry == life.entries + 1 and offset == life.logged_tokens,
            f"gap in the log of {request_id}: entry {entry} at {offset} after {life.entries}, "
            f"{life.logged_tokens} tokens",
        )
        life.entries, life.logged_tokens = entry, offset + len(tokens)
        # What of them the journal has told already must be the same; it is compared with the model's output.
        self._grew(life, offset, tokens)

    def _journaled(self, request_id: str, offset: int, tokens: list[int]) -> None:
        life = self.lives[request_id]
        self.require(
            offset == life.stored_tokens,
            f"gap in the journal: {request_id} goes on at {offset} after {life.stored_tokens} tokens",
        )
        self._grew(life, offset, tokens)

    def _grew(self, life: Life, offset: int, tokens: list[int]) -> None:
        self.require(not life.ended, f"{life.request_id} grew after its end")
        end = offset + len(tokens)
        right = life.expected[offset:end]
        self.require(
            tokens == right, f"{life.request_id} at {offset}: stored {tokens}, the model's output is {right}"
        )
        self.counts.tokens += max(0, end - life.stored_tokens)
        life.stored_tokens = max(end, life.stored_tokens)

    def _finished(self, request_id: str, fields: Sequence[str]) -> None:
        life = self.lives[request_id]
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        reason = values.get("finish_reason", "")
        self.require(not life.ended, f"{request_id} ended twice: {life.ended}, then {reason}")
        self.require(bool(reason), f"{request_id} ended without a reason")
        self.require(
            life.logged_tokens == life.stored_tokens or request_id in self.damaged,
            f"{request_id} ended with {life.stored_tokens} tokens, its log has {life.logged_tokens}",
        )
        life.ended, life.ended_s = reason, self._now_s()
        self.counts.ends[reason] = self.counts.ends.get(reason, 0) + 1
        self._trace("store", f"{request_id} ends: {reason} after {life.stored_tokens} tokens")
        if reason in ("stop", "length"):
            self.require(
                life.stored_tokens == len(life.expected),
                f"{request_id} ended as {reason} after {life.stored_tokens} of {len(life.expected)} tokens",
            )
            stopped = len(life.expected) < life.max_tokens or life.expected[-1] == 0
            self.require((reason == "stop") == stopped, f"{request_id} ended as {reason}")
        # So many refused rows end a request; one that nobody lied about must not fail.
        failed_by_lies = self.lied_about[request_id] >= MAX_REFUSED_ROWS
        self.require(reason != "error" or failed_by_lies, f"{request_id} failed: {values.get('error')}")

    # --- What others see -----------------------------------------------------------------------

    def acknowledged(self, request_id: str) -> None:
        if self.rolled_back:
            return
        self.require(request_id in self.lives, f"{request_id} was acknowledged before it was stored")
        self.lives[request_id].acknowledged = True

    def shown(self, who: str, request_id: str, offset: int, tokens: Sequence[int]) -> None:
        """Tokens have reached a gateway or a client."""
        life = self.lives.get(request_id)
        if self.rolled_back:
            # What was under way may have been stored before the loss; it is the model's all the same.
            life = life or self.lost[request_id]
            right = life.expected[offset : offset + len(tokens)]
            return self.require(list(tokens) == right, f"{who} was shown other tokens of {request_id}")
        if life is None:
            return self.violated(f"{who} was shown tokens of {request_id}, which is not stored")
        end = offset + len(tokens)
        self.require(
            end <= life.stored_tokens,
            f"{who} was shown token {end} of {request_id}; only {life.stored_tokens} are stored",
        )
        self.require(
            list(tokens) == life.expected[offset:end],
            f"{who} was shown other tokens of {request_id} at {offset}",
        )
        return None

    def shown_end(self, who: str, request_id: str, reason: str, tokens: int) -> None:
        life = self.lives.get(request_id)
        if self.rolled_back or request_id in self.damaged:
            # It may have ended before its damage could be noticed; then its log is shorter than its record.
            return None
        if life is None:
            return self.violated(f"{who} was shown the end of {request_id}, which is not stored")
        self.require(bool(life.ended), f"{who} was shown the end of {request_id} before it was stored")
        self.require(
            life.ended == reason and life.stored_tokens == tokens,
            f"{who} saw {request_id} end as {reason} after {tokens} tokens; "
            f"stored: {life.ended} after {life.stored_tokens}",
        )
        return None

    def client_gone(self, request_id: str) -> None:
        life = self.lives.get(request_id)
        if life is not None and life.client_gone_s is None:
            life.client_gone_s = self._now_s()
