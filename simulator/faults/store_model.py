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

SCHEMA = "1"
ALL_CHECKS = frozenset({"fence", "log", "digest"})
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
        self._functions: dict[str, Callable[[list[str], bytes], Any]] = {
            "laps_lead": self._lead,
            "laps_renew": self._renew,
            "laps_resign": self._resign,
            "laps_describe": self._describe,
            "laps_commit": self._commit,
        }

    def call(self, function: str, *args: str | bytes | int | float) -> Any:
        """A function that writes. Raises Refusal, and has then changed nothing."""
        body = args[-1] if args and isinstance(args[-1], bytes) else b""
        texts = [a.decode("utf-8", "surrogateescape") if isinstance(a, bytes) else str(a) for a in args[:5]]
        return self._functions[function](texts, body)

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

    def _lead(self, args: list[str], _: bytes) -> Any:
        holder, address, ttl_ms = args[0], args[1], int(args[2])
        keys = self.keys
        epoch, commit_seq = int(keys.leader.get("epoch", "0")), int(keys.meta.get("commit_seq", "0"))
        if keys.meta.get("schema", SCHEMA) != SCHEMA:
            raise Refusal(f"SCHEMA the store has schema {keys.meta['schema']}, this version needs {SCHEMA}")
        if epoch < int(args[3]) or commit_seq < int(args[4]):
            raise Refusal(
                f"HISTORY_WENT_BACK epoch {epoch}, commit {commit_seq} are stored; epoch {args[3]}, "
                f"commit {args[4]} were seen"
            )
        now = self._now_ms()
        expires = int(keys.leader.get("expires_ms", "0"))
        leads = keys.leader.get("holder", "")
        if leads not in ("", holder) and expires > now:
            return [0, epoch, expires, leads]
        epoch, expires = epoch + 1, now + ttl_ms
        keys.leader = {
            "epoch": str(epoch),
            "holder": holder,
            "address": address,
            "expires_ms": str(expires),
        }
        keys.meta.setdefault("schema", SCHEMA)
        keys.meta.setdefault("commit_seq", "0")
        keys.leases.clear()
        return [1, epoch, expires, commit_seq]

    def _renew(self, args: list[str], _: bytes) -> Any:
        self._fence(int(args[0]), args[1])
        expires = self._now_ms() + int(args[2])
        self.keys.leader["expires_ms"] = str(expires)
        return expires

    def _resign(self, args: list[str], _: bytes) -> Any:
        leader = self.keys.leader
        if leader.get("epoch") != args[0] or leader.get("holder") != args[1]:
            return 0
        leader.update(holder="", address="", expires_ms="0")
        return 1

    def _describe(self, args: list[str], _: bytes) -> Any:
        self._fence(int(args[0]), args[1])
        self.keys.meta.update(policy=args[2], level_thresholds_s=args[3])
        return b"OK"

    # --- Commit -------------------------------------------------------------------------------

    def _commit(self, args: list[str], body: bytes) -> Any:
        seq, acknowledged, digest = int(args[2]), int(args[3]), args[4]
        self._fence(int(args[0]), args[1])
        meta = self.keys.meta
        stored_seq = int(meta.get("commit_seq", "0"))
        if stored_seq < acknowledged:
            raise Refusal(
                f"HISTORY_WENT_BACK commit {stored_seq} is the last one stored, "
                f"{acknowledged} was acknowledged"
            )
        if seq == stored_seq and digest == meta.get("commit_digest") and "digest" in self._checks:
            return [seq, 0]
        if seq <= stored_seq:
            raise Refusal(f"SEQ_CONFLICT commit {seq} when {stored_seq} is stored, with other content")
        if seq > stored_seq + 1:
            raise Refusal(f"SEQ_GAP commit {seq} after {stored_seq}")
        commit = CommitCall(self.keys, unpack_body(body), "log" in self._checks)
        commit.check()
        commit.write()
        meta["commit_seq"], meta["commit_digest"] = str(seq), digest
        return [seq, 1]
