"""What a new leader does before it leads: reading a long queue back and taking it over. No gRPC.

    python bench/recovery.py [--requests 100000] [--rounds 3] [--json OUT] [--tree FOLDER]

Fills a real store with queued requests, then recovers them in a fresh process each round, as a scheduler
does that was started after a crash. `--tree` recovers by the code of another working tree too, in turn with
this one: CPU seconds are compared best where both were measured in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import redis
import uvloop
from _processes import BENCH, Usage, end_on_sigterm

from laps import runtime
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.records import Recovered, RequestSpec
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.store.server import LocalServer
from scheduler_svc.store.store import Store

POOL = "bench"
PROMPT = struct.pack("<I", 1234) * 128
PARAMS = (
    '{"sampling":{"temperature":0.0},'
    '"stopping":{"ignore_eos":true,"max_tokens":1024,"stop":["\\n\\n"],"stop_token_ids":[2]}}'
)
TICK_REQUESTS = 500
TTL_S = 60.0
SETTINGS = SchedulerSettings(max_queued_requests=1 << 30, max_queued_tokens=1 << 40)


async def fill(url: str, requests: int) -> None:
    store = Store(url, POOL)
    await store.connect()
    await store.load_functions()
    leadership = await store.lead("filler", "127.0.0.1:1", TTL_S)
    assert leadership is not None
    core = Scheduler(POOL, make_policy("laps-sd"), SETTINGS, leadership.epoch)
    core.restore(Recovered(), time.time())
    for number in range(requests):
        digest = f"{number:064x}"
        spec = RequestSpec(f"bench-{number:08d}", PROMPT, 255 + 3 * (number % 500), PARAMS, digest=digest)
        core.submit(spec, time.time())
        if number % TICK_REQUESTS == TICK_REQUESTS - 1 or number == requests - 1:
            await store.commit(store.encode(core.tick(time.time()).commit, time.time()))
    await store.resign()
    await store.close()


async def recover(url: str, holder: str) -> dict[str, float]:
    """Wall and CPU seconds until the requests wait in a core of this process."""
    runtime.spare_collector()
    # An older tree has none.
    loading = runtime.LoadedObjects().loading() if hasattr(runtime, "LoadedObjects") else nullcontext()
    store = Store(url, POOL)
    await store.connect()
    leadership = await store.lead(holder, "127.0.0.1:1", TTL_S)
    assert leadership is not None
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    with loading:
        core = await take_over(store, leadership.epoch)
    answer = {
        "wall_s": time.perf_counter() - began_s,
        "scheduler_cpu_s": time.process_time() - began_cpu_s,
        "requests": len(core.requests),
    }
    await store.resign()
    await store.close()
    return answer


async def take_over(store: Store, epoch: int) -> Scheduler:
    core = Scheduler(POOL, make_policy("laps-sd"), SETTINGS, epoch)
    try:
        from scheduler_svc.term import take_over as in_parts
    except ImportError:  # An older tree.
        core.restore(await store.recover(), time.time())
    else:
        await in_parts(core, store)
    return core


def measure(tree: Path, url: str, store: Usage, number: int) -> dict[str, Any]:
    """A round, by the code of `tree`."""
    before_s = store.cpu_s
    done = subprocess.run(
        [sys.executable, str(BENCH / "recovery.py"), "--recover", url, "--holder", f"round-{number}"],
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=True,
        capture_output=True,
        text=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return {**answer, "store_cpu_s": store.cpu_s - before_s}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tree", type=Path, help="another working tree, recovered from in turn")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--recover", help=argparse.SUPPRESS)
    parser.add_argument("--holder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.recover:
        print(json.dumps(uvloop.run(recover(arguments.recover, arguments.holder))))
        return
    trees = {"this": BENCH.parent} | ({"other": arguments.tree.resolve()} if arguments.tree else {})
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory(prefix="laps-bench-", dir=os.environ.get("LAPS_BENCH_DIR")) as folder:
        store = LocalServer(data_dir=Path(folder) / "store", appendfsync="everysec")
        store.start()
        try:
            asyncio.run(fill(store.url, arguments.requests))
            stored_bytes = redis.Redis.from_url(store.url).info("memory")["used_memory"]
            for number in range(arguments.rounds):
                for name, tree in trees.items():
                    row = measure(tree, store.url, Usage(store.pid), number)
                    rounds[name].append(row)
                    print(name, {key: round(value, 3) for key, value in row.items()}, flush=True)
        finally:
            store.close()
    if arguments.json:
        result = {"store_bytes": stored_bytes, "rounds": rounds}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    end_on_sigterm()
    main()
