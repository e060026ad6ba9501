"""Does the simulator foretell what happens in reality?

    python bench/reality.py [--requests 120] [--rounds 5] [--loads 1.3 0.8] [--json OUT] [--page PAGE]

A burst of requests with the built-in pair goes through whole stacks that differ only in their policy, with
the same arrivals; the stacks take turns in every round, and every round has a burst of its own, so that
what two policies differ by is not one burst's luck. Each pool is then asked for its log and its costs, as
`laps workload pool` prints them, and both are used twice:

- replayed: a pool's own log, with its own costs, under its own policy. Is the replay model right?
- foretold: the log and the costs of the pool under fcfs, under every policy. What would they have done?

Nothing is fitted to the latencies that are compared. They are means of the time in the scheduler, from a
request's arrival there to its end; a client sees a little more, which is printed too. Below them stand both
orders of the policies, and for every two the ratio of their means within a round: its geometric mean and
twice its standard error. Two policies are told apart where that range leaves 1 out.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from laps.client import AsyncClient
from laps.settings import BUILT_IN_TARGET, Settings
from laps.stack import Stack
from simulator.pool_costs import PoolCosts, replay
from simulator.pool_log import PoolLog, from_pool

POLICIES = ("fcfs", "srpt", "laps-sd")
KINDS = ("real", "replayed", "foretold", "client")
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


@dataclass(slots=True)
class Run:
    log: PoolLog
    """Of the measured requests."""
    client_latency_s: float
    """Their mean, as the clients saw it."""
    costs: PoolCosts


async def run_one(policy: str, planned: list[Planned], duration_s: float) -> Run:
    """One stack, one burst."""
    with tempfile.TemporaryDirectory(prefix="laps-reality-") as folder:
        settings = Settings(data_dir=Path(folder), workers=1, slots=SLOTS, threads=1, policy=policy)
        async with Stack(settings, any_ports=True) as stack, AsyncClient(stack.gateway_address) as client:
            begin_s = time.monotonic()
            await asyncio.gather(*(one(client, each, begin_s, WARM_UP) for each in planned[: 4 * SLOTS]))
            begin_s = time.monotonic() + 0.2
            latencies_s = await asyncio.gather(
                *(one(client, each, begin_s + each.arrival_share * duration_s, MEASURED) for each in planned)
            )
            log = await from_pool(stack.redis_url, settings.pool, MEASURED)
    assert log.costs is not None, "the worker is in session, and not every request was preempted"
    return Run(log, statistics.mean(latencies_s), log.costs)


async def seconds_per_token() -> float:
    """What a token takes of a slot's time on this machine, prefill and all."""
    log = (await run_one("fcfs", plan(16 * SLOTS, SEED), 0.0)).log
    ends_s = (job.arrival_s + took_s for job, took_s in zip(log.workload, log.latencies_s, strict=True))
    return SLOTS * max(ends_s) / sum(job.output_tokens for job in log.workload)


async def measure(requests: int, rounds: int, load: float, token_s: float) -> dict[str, Any]:
    series: dict[str, dict[str, list[float]]] = {policy: {kind: [] for kind in KINDS} for policy in POLICIES}
    for number in range(rounds):
        planned = plan(requests, SEED + number)
        duration_s = token_s * sum(each.tokens for each in planned) / SLOTS / load
        turn = POLICIES[number % len(POLICIES) :] + POLICIES[: number % len(POLICIES)]
        runs = {policy: await run_one(policy, planned, duration_s) for policy in turn}
        known = runs["fcfs"]
        for policy, run in runs.items():
            means = (
                run.log.mean_latency_s,
                replay(run.log.workload, policy, run.costs).mean_latency_s,
                replay(known.log.workload, policy, known.costs).mean_latency_s,
                run.client_latency_s,
            )
            for kind, mean_s in zip(KINDS, means, strict=True):
                series[policy][kind].append(mean_s)
            told = ", ".join(f"{kind} {mean_s:.3f} s" for kind, mean_s in zip(KINDS, means, strict=True))
            print(
                f"  load {load:g}, round {number + 1}, {policy}: {told} ({run.costs.options()})", flush=True
            )
    return {
        "policies": {
            policy: {f"{kind}_mean_latency_s": statistics.mean(each[kind]) for kind in KINDS}
            for policy, each in series.items()
        },
        "ratios": [
            {
                "of": first,
                "to": second,
                "real": ratio(series[first]["real"], series[second]["real"]),
                "foretold": ratio(series[first]["foretold"], series[second]["foretold"]),
            }
            for first, second in itertools.combinations(reversed(POLICIES), 2)
        ],
    }


def ratio(firsts: list[float], seconds: list[float]) -> dict[str, float]:
    """The geometric mean of first / second over the rounds, and twice its standard error, as a factor."""
    logs = [math.log(first / second) for first, second in zip(firsts, seconds, strict=True)]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    return {"mean": math.exp(statistics.mean(logs)), "within_factor": math.exp(2.0 * error)}


def table(load: str, report: dict[str, Any]) -> list[str]:
    """In Markdown, with what is to be said below it."""
    rows = report["policies"]
    means = {kind: {policy: row[f"{kind}_mean_latency_s"] for policy, row in rows.items()} for kind in KINDS}
    lines = [
        f"| load {load} | real, s | replayed, s | error | foretold, s | error | at the client, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for policy in rows:
        real, replayed, foretold, client = (means[kind][policy] for kind in KINDS)
        lines.append(
            f"| {policy} | {real:.3f} | {replayed:.3f} | {100 * (replayed / real - 1):+.1f}% "
            f"| {foretold:.3f} | {100 * (foretold / real - 1):+.1f}% | {client:.3f} |"
        )
    orders = (", ".join(sorted(rows, key=means[kind].__getitem__)) for kind in ("real", "foretold"))
    lines += ["", "Order, best first: real {}; foretold {}.".format(*orders)]
    for row in report["ratios"]:
        real, foretold = (
            f"{row[name]['mean']:.2f} (within a factor of {row[name]['within_factor']:.2f})"
            for name in ("real", "foretold")
        )
        lines.append(f"{row['of']} / {row['to']}: real {real}, foretold {foretold}.")
    return lines


def text(report: dict[str, Any]) -> str:
    """Whatever was measured, in Markdown."""
    lines = [f"Means of {report['rounds']} rounds of {report['requests']} requests."]
    for load, of_load in report["loads"].items():
        lines += ["", *table(load, of_load)]
    return "\n".join(lines) + "\n"


def fill(page: Path, made: str) -> None:
    """Puts the tables where the page has a place for them."""
    before, begin, rest = page.read_text().partition("<!-- bench/reality.py -->\n")
    _, end, after = rest.partition("<!-- /bench/reality.py -->\n")
    if not end:
        raise SystemExit(f"{page} has no place for the tables")
    page.write_text(before + begin + made + end + after)


async def measure_all(requests: int, rounds: int, loads: list[float]) -> dict[str, Any]:
    # The first stack only tells how fast the machine is.
    token_s = await seconds_per_token()
    return {f"{load:g}": await measure(requests, rounds, load, token_s) for load in loads}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[1.3, 0.8], help="work that arrives over work that is done"
    )
    parser.add_argument("--json", type=Path, help="write the means here")
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("at least two rounds: how much they differ is part of the result")
    by_load = asyncio.run(measure_all(arguments.requests, arguments.rounds, arguments.loads))
    report = {"requests": arguments.requests, "rounds": arguments.rounds, "slots": SLOTS, "loads": by_load}
    made = text(report)
    print(f"\n{made}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.page:
        fill(arguments.page, made)


if __name__ == "__main__":
    from _processes import end_on_sigterm

    end_on_sigterm()
    main()
