"""Five times the load that the stack can carry: what is admitted keeps its latency, the rest is refused.

    python -m bench.overload [--seconds 60] [--factor 5] [--json OUT]

One worker with the built-in models. First its capacity is measured, then requests come at random at that
rate, then at `factor` times it. Latencies are of admitted requests; read the ratios. Ends with exit code 1
if a refusal came without a retry hint, if anything else than a refusal went wrong, or if memory or latency
grew beyond what MAX_* say.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click
import psutil

from bench._figures import spread
from bench._processes import end_on_sigterm
from laps.client import AsyncClient
from laps.client.retry import NO_RETRY
from laps.errors import LapsError
from laps.settings import Settings
from laps.stack import Stack

SLOTS, QUEUED, MAX_TOKENS = 4, 4, 24
PROMPT = "def fibonacci(n):\n"
RETENTION_S = 2.0
"""Finished requests are kept so long: briefly, so that the store is as full as it gets in either phase."""
MAX_LATENCY_RATIO = 3.0
"""Admitted requests may find a full queue instead of a short one: as many again as there are slots."""
LATENCY_COUNTS_FROM_S = 30.0
"""In a shorter phase so few requests arrive that their number, drawn at random, decides the median."""
MAX_MEMORY_GROWTH = 1.15
SAMPLE_S = 0.5


@dataclass
class Load:
    """What came of the requests of one phase. Seconds."""

    offered: int = 0
    offered_for_s: float = 0.0
    total_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    refused: int = 0
    refused_without_hint: int = 0
    refusal_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    async def one(self, client: AsyncClient) -> None:
        self.offered += 1
        began_s = time.perf_counter()
        first_s = None
        try:
            async with client.stream(PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True) as stream:
                async for chunk in stream:
                    if first_s is None and chunk.token_ids:
                        first_s = time.perf_counter() - began_s
            if len(stream.result.token_ids) != MAX_TOKENS or first_s is None:
                self.wrong.append(f"{len(stream.result.token_ids)} tokens: {stream.result.finish_reason}")
                return
            self.total_s.append(time.perf_counter() - began_s)
            self.first_token_s.append(first_s)
        except LapsError as error:
            if error.status != "RESOURCE_EXHAUSTED":
                self.wrong.append(f"{error.status}: {error}")
                return
            self.refused += 1
            self.refused_without_hint += not error.retry_after_s
            self.refusal_s.append(time.perf_counter() - began_s)

    def figures(self) -> dict[str, Any]:
        return {
            "offered": self.offered,
            "offered_requests_per_s": round(self.offered / self.offered_for_s, 2),
            "admitted": len(self.total_s),
            "refused": self.refused,
            "latency": spread(self.total_s),
            "time_to_first_token": spread(self.first_token_s),
            "time_to_refusal": spread(self.refusal_s),
        }


async def measure_capacity(client: AsyncClient, seconds: float) -> float:
    """Requests per second with every slot busy and nobody waiting."""
    load, until_s = Load(), time.monotonic() + seconds

    async def busy() -> None:
        while time.monotonic() < until_s:
            await load.one(client)

    began_s = time.monotonic()
    await asyncio.gather(*(busy() for _ in range(SLOTS)))
    return len(load.total_s) / (time.monotonic() - began_s)


async def offer(client: AsyncClient, per_s: float, seconds: float, rng: random.Random) -> Load:
    """Requests at random instants, whatever becomes of those before. The instants are absolute: what sleeping
    and sending take beyond their time delays a request, and not all those after it."""
    load = Load()
    began_s = next_s = time.monotonic()
    until_s = began_s + seconds
    tasks = []
    while (next_s := next_s + rng.expovariate(per_s)) < until_s and time.monotonic() < until_s:
        await asyncio.sleep(next_s - time.monotonic())
        tasks.append(asyncio.create_task(load.one(client)))
    load.offered_for_s = max(seconds, time.monotonic() - began_s)
    await asyncio.gather(*tasks)
    return load


class Memory:
    """Resident bytes of every process of the stack: the most in each phase."""

    def __init__(self, stack: Stack) -> None:
        self._processes = {name: psutil.Process(child.pid) for name, child in stack.children.items()}
        self.most: dict[str, int] = {}

    async def watch(self) -> None:
        self.most = dict.fromkeys(self._processes, 0)
        while True:
            for name, process in self._processes.items():
                self.most[name] = max(self.most[name], process.memory_info().rss)
            await asyncio.sleep(SAMPLE_S)


class SlowReader:
    """Begins a long request and reads none of it until all is over."""

    async def begin(self, client: AsyncClient) -> None:
        self._client = client
        self._stream = client.stream(PROMPT, max_tokens=600, ignore_eos=True, request_id="slow-reader")
        await anext(self._stream)

    async def finish(self) -> int:
        """Tokens that it got in the end."""
        return len((await self._stream.finish()).token_ids)


async def run(seconds: float, factor: float, seed: int, data_dir: Path) -> dict[str, Any]:
    rng = random.Random(seed)
    settings = Settings(
        data_dir=data_dir,
        workers=1,
        slots=SLOTS,
        max_queued_requests=QUEUED,
        drain_s=2.0,
        retention_s=RETENTION_S,
    )
    phases: dict[str, Load] = {}
    most: dict[str, dict[str, int]] = {}
    async with (
        Stack(settings, any_ports=True) as stack,
        AsyncClient(stack.gateway_address, retry=NO_RETRY) as client,
        AsyncClient(stack.gateway_address) as slow_client,
    ):
        await measure_capacity(client, 2.0)
        capacity_per_s = await measure_capacity(client, max(3.0, seconds / 6))
        slow = SlowReader()
        for name, share in (("1x", 1.0), (f"{factor:g}x", factor)):
            if share != 1.0:
                await slow.begin(slow_client)
            memory = Memory(stack)
            watching = asyncio.create_task(memory.watch())
            phases[name] = await offer(client, capacity_per_s * share, seconds, rng)
            watching.cancel()
            most[name] = memory.most
        slow_tokens = await slow.finish()
    usual, much = phases.values()
    before, after = most.values()
    ratio = {
        "p50": statistics.median(much.total_s) / statistics.median(usual.total_s),
        "p99": spread(much.total_s)["p99_s"] / spread(usual.total_s)["p99_s"],
    }
    growth = {name: round(after[name] / before[name], 3) for name in before}
    problems = [*usual.wrong, *much.wrong]
    if usual.refused_without_hint + much.refused_without_hint:
        problems.append("refusals without a retry hint")
    if not much.refused:
        problems.append("nothing was refused: there was no overload")
    if seconds >= LATENCY_COUNTS_FROM_S and ratio["p50"] > MAX_LATENCY_RATIO:
        problems.append(f"admitted requests took {ratio['p50']:.2f} times as long as before")
    problems += [
        f"{name} grew to {by} times its size" for name, by in growth.items() if by > MAX_MEMORY_GROWTH
    ]
    if slow_tokens != 600:
        problems.append(f"the slow reader got {slow_tokens} tokens of 600")
    return {
        "seconds": seconds,
        "capacity_requests_per_s": round(capacity_per_s, 2),
        **{name: load.figures() for name, load in phases.items()},
        "latency_ratio": {name: round(value, 3) for name, value in ratio.items()},
        "memory_growth": growth,
        "memory_mib": {name: round(size / 2**20, 1) for name, size in after.items()},
        "slow_reader_tokens": slow_tokens,
        "problems": problems,
    }


@click.command()
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Of each phase.")
@click.option("--factor", type=float, default=5.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures there.")
def main(seconds: float, factor: float, seed: int, out: Path | None) -> None:
    """Offers more than the stack can carry: what is admitted keeps its latency, the rest is refused."""
    with tempfile.TemporaryDirectory(prefix="laps-overload-") as scratch:
        figures = asyncio.run(run(seconds, factor, seed, Path(scratch)))
    print(json.dumps(figures, indent=2))
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(1 if figures["problems"] else 0)


if __name__ == "__main__":
    end_on_sigterm()
    main()
