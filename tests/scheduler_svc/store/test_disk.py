"""A disk that is full in the midst of a write: the store ends, and what it acknowledged is there again."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import pytest
import redis

from scheduler_svc.store.server import LocalServer, redis_binary, valkey_binary

BOUND_BYTES = 200_000
ENTRY = "x" * 1000


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_what_was_acknowledged_outlives_a_full_disk(kind: str, tmp_path: Path) -> None:
    binary = valkey_binary() if kind == "valkey" else redis_binary()
    if binary is None:
        pytest.skip("no redis-server on PATH")
    with LocalServer(binary=binary, data_dir=tmp_path, appendfsync="always") as server:
        client = redis.Redis.from_url(server.url, retry=None)
        # No file of it may grow beyond this; the last write ends in the midst of an entry.
        resource.prlimit(
            client.info("server")["process_id"], resource.RLIMIT_FSIZE, (BOUND_BYTES, BOUND_BYTES)
        )
        acknowledged = 0
        with contextlib.suppress(redis.ConnectionError):
            while acknowledged < BOUND_BYTES / len(ENTRY):
                client.xadd("log", {"entry": ENTRY}, id=f"0-{acknowledged + 1}")
                acknowledged += 1
        assert 100 < acknowledged < BOUND_BYTES / len(ENTRY), "it was full"
        server.kill()
        server.start()
        again = redis.Redis.from_url(server.url)
        assert acknowledged <= again.xlen("log") <= acknowledged + 1
        again.xadd("log", {"entry": ENTRY}, id=f"0-{again.xlen('log') + 1}")
