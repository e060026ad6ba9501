"""The loop that kills real processes: at its short setting, and that its checker can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench._history import Seen, judge
from scheduler_svc.core.records import Append, Commit, FinishReason, Request, RequestSpec, RequestState
from scheduler_svc.store.server import LocalServer, redis_binary, valkey_binary
from scheduler_svc.store.store import Store

ROOT = Path(__file__).parents[2]
NOW_S = 1_700_000_000.0
OUTPUT = [5, 6, 7, 8]
FAULTS = ("kill leader", "cut worker", "kill store")
"""What the loop does beyond them `make killloop` does, for as long as one likes."""
REFERENCE: Any = SimpleNamespace(outputs=[OUTPUT])


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(600)
def test_nothing_is_lost_doubled_or_different(tmp_path: Path) -> None:
    # Redis where there is one: tests/stack kills everything beside the built-in store.
    store = "valkey" if redis_binary() is None else "redis"
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench.killloop", "--json", str(out), "--store", store]
    command += [f"--fault={kind}" for kind in FAULTS]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(out.read_text())[store]
    assert {kind: count for kind, count in figures["faults_by_kind"].items() if count} == dict.fromkeys(
        FAULTS, 1
    )
    assert figures["acknowledged"] > 5
    assert figures["tokens"] > 50


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    """With one request `r`: two entries, four tokens, ended by its length."""
    with LocalServer(binary=valkey_binary(), appendfsync=None) as server:
        store = Store(server.url, "p")
        await store.load_functions()
        await store.lead("a", "here", 60.0)
        request = Request(RequestSpec("r", packed([1, 2]), 4), arrival_s=NOW_S, arrival_seq=1)
        await store.commit(store.encode(Commit(submitted=[request]), NOW_S))
        request.output, request.log_entries = bytearray(packed(OUTPUT)), 2
        request.state, request.finish_reason = RequestState.FINISHED, FinishReason.LENGTH
        entries = [Append("r", 1, 0, packed(OUTPUT[:3])), Append("r", 2, 3, packed(OUTPUT[3:]))]
        await store.commit(store.encode(Commit(appended=entries, finished=[request]), NOW_S))
        yield store
        await store.close()


def packed(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def seen(**changes: Any) -> Seen:
    fields: dict[str, Any] = {"tokens": list(OUTPUT), "acknowledged": True, "finish_reason": "length"}
    return Seen("r", prompt=0, max_tokens=4, seed=None, **fields | changes)


async def test_a_right_history_holds(store: Store) -> None:
    assert (await judge(store, [seen()], REFERENCE)).holds


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"tokens": [5, 6, 7, 9]}, "different"),
        ({"tokens": [5, 6, 6, 7, 8], "finish_reason": ""}, "different"),
        ({"tokens": OUTPUT[:3]}, "lost"),
        ({"finish_reason": "stop"}, "doubled"),
        ({"request_id": "never-stored"}, "lost"),
    ],
)
async def test_what_a_client_saw_otherwise_is_noticed(store: Store, wrong: dict[str, Any], kind: str) -> None:
    one = seen(**{name: value for name, value in wrong.items() if name != "request_id"})
    one.request_id = wrong.get("request_id", "r")
    verdict = await judge(store, [one], REFERENCE)
    assert getattr(verdict, kind), verdict


async def test_another_output_than_the_targets_is_noticed(store: Store) -> None:
    reference: Any = SimpleNamespace(outputs=[[5, 6, 7, 9]])
    assert (await judge(store, [seen()], reference)).different
    longer: Any = SimpleNamespace(outputs=[[*OUTPUT, 9]])
    one = seen()
    one.max_tokens = 5
    assert (await judge(store, [one], longer)).lost


async def test_a_hole_in_the_log_and_a_request_that_never_ends_are_noticed(store: Store) -> None:
    await store.reader.redis.xdel("laps:{p}:tokens:r", "1-0")
    assert (await judge(store, [seen()], REFERENCE)).lost
    await store.reader.redis.hset("laps:{p}:request:r", "state", "running")
    assert "not come to an end" in str((await judge(store, [seen()], REFERENCE)).lost)
