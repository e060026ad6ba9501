"""How much one scheduler holds: simulated workers over gRPC, a real scheduler process, a real store.

    python bench/scheduler.py [--seconds 60] [--json bench/results/scheduler.json] [--tree FOLDER]

Every report is decided, committed and acknowledged; the bare limit in the same run is a process that parses
the same reports, writes each to Redis, and answers. Machines differ and drift: read the ratios. `--tree` runs
the scheduler of another working tree, for a comparison.

All share the machine's cores. With `--apart` the scheduler has one for itself, as an operator can give it,
and everything else the others; the process of the bare limit then has the scheduler's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from _processes import (
    BENCH,
    Process,
    Usage,
    cores_apart,
    end_on_sigterm,
    measured_cpu,
    on_cores,
    wait_for,
)

from laps.ports import free_ports
from laps.settings import Settings
from scheduler_svc.store import keys
from scheduler_svc.store.server import LocalServer

SLOTS, WORKER_STEPS_PER_S = 64, 30.0
FEW_SLOTS = 8
OUTPUT_TOKENS = 1024
"""Mean output of a request; lengths are even between a quarter of it and seven quarters."""
SHALLOW, DEEP = 1_000, 100_000
SUBMISSIONS_PER_S = 200.0
WARM_UP_S = 3.0
PARTS = ("everysec", "always", "growth", "pools", "alone")
LEADING = '"event": "leading"'


class Bed:
    """A store, a scheduler and the load, each a process. `store`: one that others use too."""

    scheduler_cores: frozenset[int] = frozenset()
    """Empty: any."""
    other_cores: frozenset[int] = frozenset()

    def __init__(
        self,
        folder: Path,
        tree: Path,
        appendfsync: str,
        output_tokens: int,
        pool: str,
        store: LocalServer | None,
        **settings: Any,
    ) -> None:
        self._own_store = store is None
        self.store = store or LocalServer(data_dir=folder / "store", appendfsync=appendfsync)  # type: ignore[arg-type]
        self._pool = pool
        self._folder, self._tree = folder, tree
        self._output_tokens = output_tokens
        self._settings = settings
        self._port, self._echo_port = free_ports(2, "127.0.0.1")
        self._logs: list[Any] = []
        self._starts = 0
        self.log = folder / "scheduler.log"

    def start(self) -> None:
        self._folder.mkdir(parents=True)
        if self._own_store:
            with on_cores(self.other_cores):
                self.store.start()
        self.start_scheduler()
        self.load = self._start_load(self._port)

    def start_scheduler(self) -> float:
        """Returns the seconds from its start to its leading."""
        settings = Settings(
            redis_url=self.store.url,
            host="127.0.0.1",
            scheduler_port=self._port,
            scheduler_id="bench",
            pool=self._pool,
            max_queued_requests=2 * DEEP,
            max_queued_tokens=1 << 30,
            max_message_bytes=64 << 20,
            log_level="info",
            **self._settings,
        )
        self._starts += 1
        began_s = time.monotonic()
        env = settings.to_env() | {"PYTHONPATH": str(self._tree)}
        with on_cores(self.scheduler_cores):
            # From there: `-m` looks into the current folder first.
            log = self._log("scheduler.log")
            self.scheduler = Process(["-m", "laps.cli", "scheduler"], log, env=env, cwd=self._tree)
        wait_for(self.log, LEADING, self.scheduler, times=self._starts)
        return time.monotonic() - began_s

    def leading(self) -> dict[str, Any]:
        """What the scheduler said last when it began to lead."""
        lines = [line for line in self.log.read_text().splitlines() if LEADING in line]
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def measure(self, **steps: Any) -> dict[str, Any]:
        """Lets the load run, and what that cost each process."""
        return measure_together([self], **steps)[0]

    def bare_limit(self, seconds: float) -> dict[str, Any]:
        log = self._folder / "echo.log"
        log.unlink(missing_ok=True)
        argv = [str(BENCH / "_echo.py"), str(self._echo_port), self.store.url]
        with on_cores(self.scheduler_cores):
            echo = Process(argv, self._log("echo.log"))
        wait_for(log, "listening", echo)
        load = self._start_load(self._echo_port)
        with measured_cpu({"echo": echo.usage}) as cpu_s:
            answer = load.ask("echo", slots=SLOTS, seconds=seconds)
        answer["echo_us_per_step"] = round(cpu_s["echo"] / answer["steps_per_s"] / seconds * 1e6, 1)
        load.stop()
        echo.stop()
        return answer

    def stop(self) -> None:
        for process in (self.load, self.scheduler):
            process.kill()
        if self._own_store:
            self.store.close()
        for log in self._logs:
            log.close()

    def _start_load(self, port: int) -> Process:
        argv = [str(BENCH / "_load.py"), f"127.0.0.1:{port}", str(self._output_tokens), self._pool]
        with on_cores(self.other_cores):
            return Process(argv, self._log("load.log"), talks=True)

    def _log(self, name: str) -> Any:
        log = (self._folder / name).open("ab")
        self._logs.append(log)
        return log


@contextmanager
def bed(
    folder: Path,
    tree: Path,
    appendfsync: str,
    output_tokens: int = OUTPUT_TOKENS,
    pool: str = "default",
    store: LocalServer | None = None,
    **settings: Any,
) -> Iterator[Bed]:
    """`settings`: further ones of the scheduler."""
    made = Bed(folder, tree, appendfsync, output_tokens, pool, store, **settings)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def throughput(folder: Path, tree: Path, appendfsync: str, rate: float, seconds: float) -> dict[str, Any]:
    """Steps as fast as they go, then at `rate`, with the bare limit before and after."""
    with bed(folder, tree, appendfsync) as here:
        here.load.ask("start", workers=round(rate / WORKER_STEPS_PER_S), slots=SLOTS)
        here.load.ask("submit", count=round(rate / WORKER_STEPS_PER_S) * SLOTS + SHALLOW)
        here.load.ask("steps", seconds=WARM_UP_S, steps_per_s=rate / 2)
        brief_s = max(2.0, seconds / 6)
        before = here.bare_limit(brief_s)
        most = here.measure(seconds=brief_s, steps_per_s=0, window=4)
        after = here.bare_limit(brief_s)
        paced = here.measure(seconds=seconds, steps_per_s=rate)
    bare = (before["steps_per_s"] + after["steps_per_s"]) / 2
    return {
        "offered_steps_per_s": rate,
        "bare": before,
        "bare_again": after,
        "as_fast_as_it_goes": most,
        "paced": paced,
        "ratio_to_bare": round(most["steps_per_s"] / bare, 3),
    }


def growth(folder: Path, tree: Path, rate: float, seconds: float, queued: int) -> dict[str, Any]:
    """The same load on a short and on a long queue, in turn, then a crash of the scheduler."""
    # What is filled within two minutes passes a bound of one minute within two, hundreds a second: a cost of
    # the filling, not of the length.
    settings = {"starvation_bound_s": 0.0}
    with (
        bed(folder / "shallow", tree, "everysec", **settings) as shallow,
        bed(folder / "deep", tree, "everysec", **settings) as here,
    ):
        reader = redis.Redis.from_url(here.store.url)
        workers = max(1, round(rate / WORKER_STEPS_PER_S))
        for each in (shallow, here):
            each.load.ask("start", workers=workers, slots=SLOTS)
            each.load.ask("submit", count=workers * SLOTS + SHALLOW)
            each.load.ask("steps", seconds=WARM_UP_S, steps_per_s=rate)
        before_bytes = reader.info("memory")["used_memory"]
        filled = here.load.ask("submit", count=queued - SHALLOW)
        request_bytes = (reader.info("memory")["used_memory"] - before_bytes) / (queued - SHALLOW)
        last = reader.zrange(keys.live("default"), -1, -1)[0].decode()
        prompt_bytes = reader.memory_usage(keys.prompt("default", last))
        _await_rewrite(reader)
        short = shallow.measure(seconds=seconds, steps_per_s=rate)
        deep = here.measure(seconds=seconds, steps_per_s=rate)
        again = shallow.measure(seconds=seconds, steps_per_s=rate)
        submitting = here.measure(seconds=seconds, steps_per_s=rate, submissions_per_s=SUBMISSIONS_PER_S)
        here.scheduler.kill()
        whole_s = here.start_scheduler()
        leading = here.leading()
    ratios = {
        f"{name}cpu_ratio": round(2 * deep[key] / (short[key] + again[key]), 3)
        for name, key in (("", "scheduler_us_per_step"), ("store_", "store_us_per_step"))
    }
    return {
        "queued": queued,
        "shallow": short,
        "deep": deep,
        "shallow_again": again,
        **ratios,
        "fill_submissions_per_s": filled["submissions_per_s"],
        "submitting": submitting,
        "redis_bytes_per_request": round(request_bytes),
        "redis_bytes_per_prompt": prompt_bytes,
        "redis_bytes_beyond_prompt": round(request_bytes) - prompt_bytes,
        "recovered_requests": leading["recovered_requests"],
        "recovery_s": leading["recovery_s"],
        "start_to_leading_s": round(whole_s, 3),
    }


def _await_rewrite(reader: redis.Redis) -> None:
    """A queue that was filled within a minute has the store rewrite its file. While its copy is made every
    page that is written to is copied: a cost of the filling, not of the length."""
    while True:
        state = reader.info("persistence")
        if not state["aof_rewrite_in_progress"] and not state["aof_rewrite_scheduled"]:
            return
        time.sleep(0.1)


def pools(folder: Path, tree: Path, rate: float, seconds: float) -> dict[str, Any]:
    """One pool, then two on two schedulers and one store, each under the same load, then one again."""
    workers = max(1, round(rate / WORKER_STEPS_PER_S))
    with (
        bed(folder / "one", tree, "everysec", pool="one") as one,
        bed(folder / "two", tree, "everysec", pool="two", store=one.store) as two,
    ):
        for here in (one, two):
            here.load.ask("start", workers=workers, slots=SLOTS)
            here.load.ask("submit", count=workers * SLOTS + SHALLOW)
            here.load.ask("steps", seconds=WARM_UP_S, steps_per_s=rate)
        alone = one.measure(seconds=seconds, steps_per_s=rate)
        both = measure_together([one, two], seconds=seconds, steps_per_s=rate)
        again = one.measure(seconds=seconds, steps_per_s=rate)
    ratios = {}
    for name in ("scheduler", "store"):
        key = f"{name}_us_per_step"
        ratios[f"{name}_cpu_ratio"] = round((both[0][key] + both[1][key]) / (alone[key] + again[key]), 3)
    return {"offered_steps_per_s": rate, "one": alone, "of_two": both[0], "other_of_two": both[1]} | {
        "one_again": again,
        **ratios,
    }


def alone(folder: Path, tree: Path, rate: float, seconds: float) -> dict[str, Any]:
    """One worker of a few slots: every step is a tick of its own, and nobody shares what that costs."""
    with bed(folder, tree, "everysec") as here:
        here.load.ask("start", workers=1, slots=FEW_SLOTS)
        here.load.ask("submit", count=4 * FEW_SLOTS)
        here.load.ask("steps", seconds=WARM_UP_S, steps_per_s=rate)
        return {"slots": FEW_SLOTS, **here.measure(seconds=seconds, steps_per_s=rate)}


def measure_together(beds: list[Bed], **steps: Any) -> list[dict[str, Any]]:
    """Lets their loads run at the same time. A store that they share is divided by all their steps."""
    processes = {"store": Usage(beds[0].store.pid)}
    for number, here in enumerate(beds):
        processes |= {f"scheduler {number}": here.scheduler.usage, f"load {number}": here.load.usage}
    with measured_cpu(processes) as cpu_s:
        for here in beds:
            here.load.tell("steps", **steps)
        answers = [here.load.answer() for here in beds]
    all_steps = sum(answer["steps"] for answer in answers)
    for number, answer in enumerate(answers):
        share = answer["steps"] / all_steps
        spent = {name: cpu_s[f"{name} {number}"] for name in ("scheduler", "load")}
        for name, spent_s in (spent | {"store": cpu_s["store"] * share}).items():
            answer[f"{name}_us_per_step"] = round(spent_s / answer["steps"] * 1e6, 1)
            answer[f"{name}_cores"] = round(spent_s / answer["seconds"], 3)
    return answers


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}")
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"  {key}: " + ", ".join(f"{k} {_short(v)}" for k, v in value.items()))
        else:
            print(f"  {key}: {_short(value)}")
    sys.stdout.flush()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of the run at the offered rate")
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    parser.add_argument("--rate", type=float, help="worker-steps per second that are offered")
    parser.add_argument("--queued", type=int, default=DEEP, help="requests of the long queue")
    parser.add_argument("--tree", type=Path, default=BENCH.parent, help="working tree of the scheduler")
    parser.add_argument("--apart", action="store_true", help="give the scheduler a core for itself")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.apart:
        Bed.scheduler_cores, Bed.other_cores = cores_apart()
    result: dict[str, Any] = {
        "workers": {"slots": SLOTS, "steps_per_s": WORKER_STEPS_PER_S, "tokens_per_slot": 3},
        "apart": arguments.apart,
    }
    seconds, tree = arguments.seconds, arguments.tree.resolve()
    with tempfile.TemporaryDirectory(prefix="laps-bench-", dir=os.environ.get("LAPS_BENCH_DIR")) as name:
        folder = Path(name)
        for appendfsync, rate in (("everysec", 600.0), ("always", 300.0)):
            if arguments.only in (None, appendfsync):
                part = throughput(folder / appendfsync, tree, appendfsync, arguments.rate or rate, seconds)
                result[appendfsync] = part
                show(f"appendfsync {appendfsync}", part)
        if arguments.only in (None, "growth"):
            result["growth"] = growth(
                folder / "growth", tree, arguments.rate or 300.0, seconds / 3, arguments.queued
            )
            show("growth", result["growth"])
        if arguments.only in (None, "pools"):
            result["pools"] = pools(folder / "pools", tree, arguments.rate or 150.0, seconds / 3)
            show("pools", result["pools"])
        if arguments.only in (None, "alone"):
            result["alone"] = alone(folder / "alone", tree, arguments.rate or 120.0, seconds / 3)
            show("alone", result["alone"])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    end_on_sigterm()
    main()
