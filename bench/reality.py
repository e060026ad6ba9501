"""Does the order that the simulator foretells hold in reality?

    python bench/reality.py [--requests 120] [--rounds 5] [--load 1.3] [--json OUT]

A burst of requests with the built-in pair goes through whole stacks that differ only in their policy, with
the same arrivals; the stacks take turns in every round, and every round has a burst of its own, so that
what two policies differ by is not one burst's luck. The log of the pool under fcfs then becomes a workload,
as by `laps workload pool`, which is replayed under each policy with the step time that its own run had.
Printed: both mean latencies (medians over the rounds), the error of the foretold one, both orders of the
policies, and for every two of them the ratio of their means within a round: its geometric mean and twice
its standard error. Two policies are told apart where that range leaves 1 out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from laps.client import AsyncClient
from laps.settings import BUILT_IN_TARGET, Settings
from laps.stack import Stack
from scheduler_svc.core.records import RequestState
from scheduler_svc.store.inspector import PAGE_LIMIT, Inspector
from simulator.pool_log import from_pool
from simulator.replay import simulate
from simulator.workload import Workload, order

POLICIES = ("fcfs", "srpt", "laps-sd")
SLOTS = 2
WARM_UP, MEASURED = "warm-up", "measured"
LEAST_TOKENS, MOST_TOKENS = 8, 400


SEED = 7
"""Of the first round's burst; the next has the next one."""


@dataclass(frozen=True, slots=True)
class Planned:
    text: str
    tokens: int
    predicted_tokens: int
    arrival_share: float
    """Of the burst's duration."""


def plan(requests: int, seed: int) -> list[Planned]:
    """Log-normal lengths, predicted with a log-error of 0.3, arriving at random over the burst."""
    lines = (Path(BUILT_IN_TARGET).parent / "prompts.jsonl").read_text().splitlines()
    texts = [record["text"] for record in map(json.loads, lines) if "text" in record]
    dice = random.Random(seed)
    planned = []
    for number in range(requests):
        tokens = min(MOST_TOKENS, max(LEAST_TOKENS, round(50 * math.exp(0.9 * dice.gauss(0, 1)))))
        predicted = max(1, round(tokens * math.exp(0.3 * dice.gauss(0, 1))))
        planned.append(Planned(texts[number % len(texts)], tokens, predicted, dice.random()))
    return sorted(planned, key=lambda each: each.arrival_share)


async def one(client: AsyncClient, planned: Planned, at_s: float, request_class: str) -> float:
    """Seconds from its arrival to its end, as the client sees them."""
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))
    began_s = time.monotonic()
    made = await client.generate(
        planned.text,
        max_tokens=planned.tokens,
        ignore_eos=True,
        predicted_output_tokens=planned.predicted_tokens,
        request_class=request_class,
    )
    assert len(made.token_ids) == planned.tokens
    return time.monotonic() - began_s


async def step_costs_s(stack: Stack) -> tuple[float, float]:
    """Mean seconds of a measured request's step, and of a return to a slot."""
    inspector = Inspector.open(stack.redis_url, stack.settings.pool)
    try:
        page = await inspector.list_requests({RequestState.FINISHED}, PAGE_LIMIT)
        fields = [view.fields for view in page.requests if view.fields["request_class"] == MEASURED]
        workers = await inspector.list_workers()
    finally:
        await inspector.close()
    attained_s = sum(each["attained_s"] for each in fields)
    return attained_s / sum(each["steps"] for each in fields), workers[0].fields["switch_s"]


@dataclass(slots=True)
class Run:
    latencies_s: list[float]
    step_s: float
    switch_s: float
    workload: Workload


async def run_one(policy: str, planned: list[Planned], duration_s: float | None, load: float) -> Run:
    """One stack, one burst. Without a duration it is chosen so that the burst makes the load."""
    with tempfile.TemporaryDirectory(prefix="laps-reality-") as folder:
        settings = Settings(data_dir=Path(folder), workers=1, slots=SLOTS, threads=1, policy=policy)
        async with Stack(settings, any_ports=True) as stack, AsyncClient(stack.gateway_address) as client:
            begin_s = time.monotonic()
            await asyncio.gather(*(one(client, each, begin_s, WARM_UP) for each in planned[: 4 * SLOTS]))
            if duration_s is None:
                warm_tokens = sum(each.tokens for each in planned[: 4 * SLOTS])
                tokens = sum(each.tokens for each in planned)
                duration_s = (time.monotonic() - begin_s) * tokens / warm_tokens / load
            begin_s = time.monotonic() + 0.2
            latencies_s = await asyncio.gather(
                *(one(client, each, begin_s + each.arrival_share * duration_s, MEASURED) for each in planned)
            )
            step_s, switch_s = await step_costs_s(stack)
            jobs = [job for job in await from_pool(stack.redis_url, settings.pool) if job.task == MEASURED]
    first_s = jobs[0].arrival_s
    workload = order(replace(job, arrival_s=job.arrival_s - first_s) for job in jobs)
    return Run(list(latencies_s), step_s, switch_s, workload)


async def measure(requests: int, rounds: int, load: float) -> dict[str, Any]:
    # The first stack only tells how fast the machine is.
    probe = await run_one("fcfs", plan(requests, SEED)[: 8 * SLOTS], None, load)
    work_s = probe.step_s * sum(job.steps for job in probe.workload)
    token_s = work_s / sum(job.output_tokens for job in probe.workload)
    real: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    foretold: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for number in range(rounds):
        planned = plan(requests, SEED + number)
        duration_s = token_s * sum(each.tokens for each in planned) / SLOTS / load
        turn = POLICIES[number % len(POLICIES) :] + POLICIES[: number % len(POLICIES)]
        runs = {policy: await run_one(policy, planned, duration_s, load) for policy in turn}
        for policy, run in runs.items():
            real[policy].append(statistics.mean(run.latencies_s))
            result = simulate(
                runs["fcfs"].workload,
                policy,
                SLOTS,
                None,
                draft_ms=0.0,
                verify_ms=1000.0 * run.step_s,
                switch_ms=1000.0 * run.switch_s,
            )
            foretold[policy].append(result.mean_latency_s)
            print(
                f"  round {number + 1}: {policy}: {real[policy][-1]:.3f} s, "
                f"foretold {foretold[policy][-1]:.3f} s, a step {1000 * run.step_s:.2f} ms",
                flush=True,
            )
    return {
        "requests": requests,
        "rounds": rounds,
        "slots": SLOTS,
        "load": load,
        "policies": {
            policy: {
                "real_mean_latency_s": statistics.median(real[policy]),
                "foretold_mean_latency_s": statistics.median(foretold[policy]),
            }
            for policy in POLICIES
        },
        "ratios": [
            {
                "of": first,
                "to": second,
                "real": ratio(real[first], real[second]),
                "foretold": ratio(foretold[first], foretold[second]),
            }
            for first, second in itertools.combinations(reversed(POLICIES), 2)
        ],
    }


def ratio(firsts: list[float], seconds: list[float]) -> dict[str, float]:
    """The geometric mean of first / second over the rounds, and twice its standard error, as a factor."""
    logs = [math.log(first / second) for first, second in zip(firsts, seconds, strict=True)]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    return {"mean": math.exp(statistics.mean(logs)), "within_factor": math.exp(2.0 * error)}


def show(report: dict[str, Any]) -> None:
    rows = report["policies"]
    base = rows["fcfs"]
    print(f"\n{'policy':<10}{'real s':>9}{'foretold s':>12}{'error':>9}{'real/fcfs':>11}{'foretold':>10}")
    for policy, row in rows.items():
        real, foretold = row["real_mean_latency_s"], row["foretold_mean_latency_s"]
        print(
            f"{policy:<10}{real:>9.3f}{foretold:>12.3f}{100 * (foretold / real - 1):>+8.1f}%"
            f"{real / base['real_mean_latency_s']:>11.3f}{foretold / base['foretold_mean_latency_s']:>10.3f}"
        )
    orders = [sorted(rows, key=lambda policy: rows[policy][name]) for name in base]
    print(f"order, best first: real {', '.join(orders[0])}; foretold {', '.join(orders[1])}")
    for row in report["ratios"]:
        real, foretold = (
            f"{row[name]['mean']:.3f} (times or over {row[name]['within_factor']:.3f})"
            for name in ("real", "foretold")
        )
        print(f"{row['of']} / {row['to']}: real {real}, foretold {foretold}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=float, default=1.3, help="work that arrives over work that is done")
    parser.add_argument("--json", type=Path, help="write the medians here")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("at least two rounds: how much they differ is part of the result")
    report = asyncio.run(measure(arguments.requests, arguments.rounds, arguments.load))
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
