"""The users that a deployed store has: `operator` may look, and that is all."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler_svc.store.custody import read_pool_state
from scheduler_svc.store.errors import StoreError
from scheduler_svc.store.inspector import Inspector
from scheduler_svc.store.server import LocalServer
from scheduler_svc.store.store import Store

USERS = Path(__file__).parents[3] / "deploy" / "docker" / "users.acl"
PASSWORD = "development-only"


async def test_an_operator_looks_and_changes_nothing(binary: str) -> None:
    with LocalServer(binary=binary, appendfsync=None, settings={"aclfile": str(USERS)}) as server:
        as_laps, as_operator = (
            server.url.replace("redis://", f"redis://{user}:{PASSWORD}@") for user in ("laps", "operator")
        )
        store = Store(as_laps, "default")
        await store.connect()
        await store.load_functions()
        assert await store.lead("a", "127.0.0.1:50052", 60.0) is not None

        looks = Store(as_operator, "default")
        assert (await read_pool_state(looks)).holder == "a"
        inspector = Inspector.open(as_operator, "default")
        assert (await inspector.snapshot()).queues.leader == "127.0.0.1:50052"
        assert (await inspector.list_requests()).requests == []
        assert await inspector.timeline("nothing") is None
        with pytest.raises(StoreError, match="refuses the credentials"):
            await looks.lead("b", "127.0.0.1:50053", 60.0)
        with pytest.raises(StoreError, match="refuses the credentials"):
            await looks.reader.read(looks.reader.redis.hset("laps:{default}:meta", "policy", "fcfs"))
        assert (await read_pool_state(looks)).holder == "a"
        for each in (store, looks, inspector):
            await each.close()
