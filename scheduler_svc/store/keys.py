"""Every key in Redis, and nothing else. `docs/redis.md` tells the fields.

A pool's keys start with `laps:{POOL}:`. The braces are a Redis Cluster hash tag: all keys
of a pool lie on one node, so one function call can write them together.
"""

from __future__ import annotations

import re

_POOL = re.compile(r"[A-Za-z0-9._-]{1,128}")


def prefix(pool: str) -> str:
    """What all keys of a pool start with."""
    if not _POOL.fullmatch(pool):
        raise ValueError(f"a pool's name is 1 to 128 letters, digits, '.', '_' or '-', not {pool!r}")
    return f"laps:{{{pool}}}:"


def meta(pool: str) -> str:
    """Hash. Schema, last commit, policy, totals. Read by: commit, inspection."""
    return prefix(pool) + "meta"


def leader(pool: str) -> str:
    """Hash. Who may write: epoch, holder, address, expires_ms. Read by: every write, gateways."""
    return prefix(pool) + "leader"


def epochs(pool: str) -> str:
    """Hash. By epoch, of the last ones: the commit_seq at which it began and its term's random name.
    Read by: whoever would lead."""
    return prefix(pool) + "epochs"


def stopped(pool: str) -> str:
    """Hash, only while the pool is stopped by an alarm (`layout.STOPPED_FIELDS`). Read by: whoever would
    lead, operators."""
    return prefix(pool) + "stopped"


def queue(pool: str, level: int) -> str:
    """Sorted set. Waiting requests of a level; member request_id, in the order in which they
    will run (`codec.queue_score`). Read by: inspection."""
    return f"{prefix(pool)}queue:{level}"


def live(pool: str) -> str:
    """Sorted set. All requests that are not finished; member request_id, score arrival_seq.
    Read by: recovery, inspection."""
    return prefix(pool) + "live"


def leases(pool: str) -> str:
    """Sorted set. Requests that hold a slot; member request_id, score expiry in ms. Read by: inspection."""
    return prefix(pool) + "leases"


def finished(pool: str) -> str:
    """Sorted set. Finished requests that are still kept; member request_id, score finish in ms.
    Read by: recovery, inspection."""
    return prefix(pool) + "finished"


def workers(pool: str) -> str:
    """Sorted set. Workers in session; member worker_id, score expiry in ms. Read by: inspection."""
    return prefix(pool) + "workers"


def worker(pool: str, worker_id: str) -> str:
    """Hash. A worker (`layout.WORKER_FIELDS`). Read by: inspection."""
    return f"{prefix(pool)}worker:{worker_id}"


def request(pool: str, request_id: str) -> str:
    """Hash. A request and what is believed about it (`layout.REQUEST_FIELDS`). Read by: commit,
    recovery, inspection."""
    return f"{prefix(pool)}request:{request_id}"


def prompt(pool: str, request_id: str) -> str:
    """String. The prompt's token ids, decimal, separated by spaces. Read by: recovery."""
    return f"{prefix(pool)}prompt:{request_id}"


def params(pool: str, request_id: str) -> str:
    """String. Sampling and stopping parameters as JSON. A key of its own because a long value
    would cost the request's hash its compact encoding. Read by: recovery."""
    return f"{prefix(pool)}params:{request_id}"


def tokens(pool: str, request_id: str) -> str:
    """Stream. The token log: entry id n-0 counts from 1, fields offset, tokens, logprobs.
    Read by: commit, recovery, readers of a request."""
    return f"{prefix(pool)}tokens:{request_id}"


def journal(pool: str) -> str:
    """Stream. Output that is stored but not in its token log yet: one entry a commit, id its number, field
    rows (MessagePack, by columns: [[request_ids, offsets, counts, packed token ids], ...], see packing.py).
    Read by: recovery."""
    return prefix(pool) + "journal"


def events(pool: str) -> str:
    """Stream, capped. What happened: fields kind, request_id, worker_id, detail. Read by: people."""
    return prefix(pool) + "events"


def learnt(pool: str) -> str:
    """Hash. What the policy has learnt, by name. Read by: recovery."""
    return prefix(pool) + "learnt"
