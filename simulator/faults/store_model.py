"""The store's server in plain Python: what functions.lua and inspection.lua do to one pool's keys.

The same checks in the same order with the same refusals, on dicts. A test plays random calls against
this and against the real functions in a real server and compares every answer and every key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from simulator.faults.store_commit import CommitCall, Entry, Keys, Refusal

__all__ = ["ALL_CHECKS", "Entry", "Keys", "Refusal", "StoreModel", "unpack_body"]

SCHEMA = "3"
ALL_CHECKS = frozenset({"fence", "log", "digest", "stopped", "term"})
"""What can be switched off, to see that its absence is noticed."""


def unpack_body(body: bytes) -> list[Any]:
    """A packed commit; bytes that are no text stay recognisable in a string."""
    fields: list[Any] = msgpack.unpackb(
        body, raw=False, unicode_errors="surrogateescape", strict_map_key=False
    )
    return fields


class StoreModel:
    """`now_ms` is the server's clock."""

    def __init__(self, now_ms: Callable[[], int], checks: frozenset[str] = ALL_CHECKS) -> None:
        self.keys = Keys()
        self._now_ms = now_ms
        self._checks = checks
        self._functions: dict[str, Callable[[list[str], list[bytes]], Any]] = {
            "laps_lead": self._lead,
            "laps_renew": self._renew,
            "laps_resign": self._resign,
            "laps_describe": self._describe,
            "laps_commit": self._commit,
            "laps_stop": self._stop,
            "laps_resume": self._resume,
        }

    def claim_left_s(self) -> float:
        """Until another scheduler may lead; below 0 when it may already."""
        return (int(self.keys.leader.get("expires_ms", "0")) - self._now_ms()) / 1000.0

    def call(self, function: str, *args: str | bytes | int | float) -> Any:
        """A function that writes. Raises Refusal, and has then changed nothing."""
        texts = [a.decode("utf-8", "surrogateescape") if isinstance(a, bytes) else str(a) for a in args]
        return self._functions[function](texts, [a for a in args if isinstance(a, bytes)])

    # --- Leadership ---------------------------------------------------------------------------

    def _fence(self, epoch: int, holder: str) -> None:
        if "fence" not in self._checks:
            return
        stored = int(self.keys.leader.get("epoch", "0"))
        leads = self.keys.leader.get("holder")
        if stored < epoch:
            raise Refusal(f"HISTORY_WENT_BACK epoch {stored} is stored, this leader has epoch {epoch}")
        if stored > epoch or leads != holder:
            raise Refusal(f"STALE_EPOCH epoch {stored} of {leads} leads, not epoch {epoch} of {holder}")

    def _history(self) -> tuple[int, int, int]:
        meta, leader = self.keys.meta, self.keys.leader
        return int(meta.get("timeline", "1")), int(leader.get("epoch", "0")), int(meta.get("commit_seq", "0"))

    def _term_of(self, epoch: int) -> tuple[int | None, str]:
        began, _, term = self.keys.epochs.get(str(epoch), "").partition(" ")
        return (int(began) if began else None), term

    def _check_history(self, args: list[str]) -> tuple[int, int, int]:
        timeline, epoch, commit_seq = self._history()
        seen_timeline, seen_epoch, seen_seq = map(int, args[:3])
        seen_term = args[3]
        stored_seq = commit_seq
        if seen_epoch < epoch:
            began, _ = self._term_of(seen_epoch + 1)
            stored_seq = commit_seq if began is None else began
        _, term = self._term_of(seen_epoch)
        another = bool(term and seen_term) and term != seen_term and "term" in self._checks
        lost = timeline == seen_timeline and (epoch < seen_epoch or stored_seq < seen_seq or another)
        if timeline < seen_timeline or lost:
            raise Refusal(
                f"HISTORY_WENT_BACK timeline {timeline}, epoch {epoch}, commit {commit_seq} are stored; "
                f"timeline {seen_timeline}, epoch {seen_epoch}, commit {seen_seq} were seen"
            )
        return timeline, epoch, commit_seq

    def _lead(self, args: list[str], _: list[bytes]) -> Any:
        holder, address, ttl_ms = args[0], args[1], int(args[2])
        keys = self.keys
        if keys.meta.get("schema", SCHEMA) != SCHEMA:
            raise Refusal(f"SCHEMA the store has schema {keys.meta['schema']}, this version needs {SCHEMA}")
        if keys.stopped and "stopped" in self._checks:
            raise Refusal(f"STOPPED by {keys.stopped['by']}: {keys.stopped['reason']}")
        timeline, epoch, commit_seq = self._check_history(args[3:7])
        now = self._now_ms()
        expires = int(keys.leader.get("expires_ms", "0"))
        leads = keys.leader.get("holder", "")
        if leads not in ("", holder) and expires > now:
            latest = now + int(keys.leader.get("ttl_ms", 2 * ttl_ms))
            if expires > latest:
                expires = latest
                keys.leader["expires_ms"] = str(expires)
            return [0, epoch, expires, commit_seq, timeline, self._term_of(epoch)[1].encode()]
        epoch, expires = epoch + 1, now + ttl_ms
        keys.leader = {
            "epoch": str(epoch),
            "holder": holder,
            "address": address,
            "expires_ms": str(expires),
            "ttl_ms": str(ttl_ms),
        }
        keys.meta.setdefault("schema", SCHEMA)
        keys.meta.setdefault("timeline", str(timeline))
        keys.meta.setdefault("commit_seq", "0")
        keys.epochs[str(epoch)] = f"{commit_seq} {args[7]}"
        keys.leases.clear()
        return [1, epoch, expires, commit_seq, timeline, args[7].encode()]

    def _renew(self, args: list[str], _: list[bytes]) -> Any:
        self._fence(int(args[0]), args[1])
        self._check_history(args[3:7])
        expires = self._now_ms() + int(args[2])
        self.keys.leader["expires_ms"] = str(expires)
        return expires

    def _resign(self, args: list[str], _: list[bytes]) -> Any:
        leader = self.keys.leader
        if leader.get("epoch") != args[0] or leader.get("holder") != args[1]:
            return 0
        leader.update(holder="", address="", expires_ms="0")
        return 1

    def _describe(self, args: list[str], _: list[bytes]) -> Any:
        self._fence(int(args[0]), args[1])
        self.keys.meta.update(policy=args[2], level_thresholds_s=args[3])
        return b"OK"

    def _stop(self, args: list[str], _: list[bytes]) -> Any:
        keys, stopped = self.keys, self.keys.stopped
        timeline, epoch, commit_seq = self._history()
        seen = int(args[2]), int(args[3]), int(args[4])
        again = bool(stopped)
        if again:
            known = (
                int(stopped["seen_timeline"]),
                int(stopped["seen_epoch"]),
                int(stopped["seen_commit_seq"]),
            )
            seen = max(seen, known)
        for name, value in zip(("timeline", "epoch", "commit_seq"), seen, strict=True):
            stopped[f"seen_{name}"] = str(value)
        if again:
            return 0
        stopped |= {"by": args[0], "reason": args[1], "at_ms": str(self._now_ms())}
        stopped |= {"stored_timeline": str(timeline), "stored_epoch": str(epoch)}
        stopped["stored_commit_seq"] = str(commit_seq)
        fenced = str(max(epoch, seen[1]) + 1)
        keys.leader |= {"epoch": fenced, "holder": "", "address": "", "expires_ms": "0"}
        return 1

    def _resume(self, args: list[str], _: list[bytes]) -> Any:
        keys = self.keys
        if not keys.stopped:
            return 0
        timeline, epoch, commit_seq = self._history()
        timeline = max(timeline, int(keys.stopped["seen_timeline"])) + 1
        keys.meta |= {"timeline": str(timeline), "resumed_seq": str(commit_seq)}
        keys.leader["epoch"] = str(max(epoch, int(keys.stopped["seen_epoch"])))
        keys.stopped, keys.epochs = {}, {}
        return timeline

    # --- Commit -------------------------------------------------------------------------------

    def _commit(self, args: list[str], packed: list[bytes]) -> Any:
        seq, acknowledged, digest = int(args[2]), int(args[3]), args[4]
        self._fence(int(args[0]), args[1])
        meta = self.keys.meta
        stored_seq = int(meta.get("commit_seq", "0"))
        if stored_seq < acknowledged:
            raise Refusal(
                f"HISTORY_WENT_BACK commit {stored_seq} is the last one stored, "
                f"{acknowledged} was acknowledged"
            )
        repeated = {stored_seq: meta.get("commit_digest"), stored_seq - 1: meta.get("digest_before")}
        if digest == repeated.get(seq) and "digest" in self._checks:
            return [seq, 0]
        if seq <= stored_seq:
            raise Refusal(f"SEQ_CONFLICT commit {seq} when {stored_seq} is stored, with other content")
        if seq > stored_seq + 1:
            raise Refusal(f"SEQ_GAP commit {seq} after {stored_seq}")
        body, journal = packed
        commit = CommitCall(self.keys, seq, unpack_body(body), journal, "log" in self._checks)
        commit.check()
        commit.write()
        meta |= {
            "commit_seq": str(seq),
            "commit_digest": digest,
            "digest_before": meta.get("commit_digest", ""),
        }
        return [seq, 1]
