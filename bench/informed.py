"""How much of the gap to the oracle there is to close when lengths are uncertain.

    python bench/informed.py [--seeds 6] [--jobs 2] [--json bench/results/informed.json]     # about 3 minutes

Replays generated mixes under `laps-sd` twice: as it is, and told beforehand the true distributions that the
requests were drawn from, so that nothing is left to learn: the exact posterior of every length given its
prediction, the mean tokens per step of every task, and how far requests of a task differ in it. Prints the
share of the gap from the best of sjf and srpt to the oracle that each closes.
"""

from __future__ import annotations

import os

# Compiled classes cannot be told anything from outside.
os.environ["LAPS_COMPILED"] = "0"

import json
import math
import multiprocessing
import random
import statistics
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import patch

import click
from _cells import share_of_gap
from _processes import end_on_sigterm

from scheduler_svc.core.learning import Knowledge, LengthBelief
from simulator.mixes import CHAT_MIX, WIDE_MIX, Task, make_mix
from simulator.replay import simulate
from simulator.workload import Workload

MIXES = {"wide": WIDE_MIX, "chat": CHAT_MIX}
JOBS, DRAFT_TOKENS, LENGTH_ERROR = 2000, 4, 0.6
SLOTS, LOADS, SWITCHES_MS = (1, 8, 32), (0.9, 1.05), (0.5, 5.0)
DRAWN_REQUESTS = 20_000


@dataclass(frozen=True, slots=True)
class Cell:
    mix: str
    seed: int
    slots: int
    load: float
    switch_ms: float


@dataclass(frozen=True, slots=True)
class Truth:
    """What requests of one task are drawn from."""

    task: Task
    tokens_per_step: float
    rate_steps: float
    """Variance between the steps of a request over the variance between requests."""

    def of_prediction(self, predicted_tokens: float) -> tuple[LengthBelief, float, float, float, float]:
        """What `Knowledge.of_request` would say of it at best. The length is log-normal, and so is the error
        of its prediction: the posterior of two normal variables."""
        variance, error = self.task.length_log_sd**2, LENGTH_ERROR**2
        weight = variance / (variance + error)
        median = math.exp(
            weight * math.log(predicted_tokens) + (1.0 - weight) * math.log(self.task.median_output_tokens)
        )
        belief = LengthBelief(median, math.sqrt(variance * error / (variance + error)))
        return belief, self.tokens_per_step, self.rate_steps, 0.0, math.log(self.tokens_per_step)


@cache
def truths(mix: str) -> dict[str, Truth]:
    return {task.name: _truth(task) for task in MIXES[mix]}


def _truth(task: Task) -> Truth:
    dice = random.Random(0)
    means, variances = [], []
    for _ in range(DRAWN_REQUESTS):
        kept = min(0.98, max(0.02, dice.gauss(task.acceptance, task.acceptance_sd)))
        chances = [kept**accepted * (1.0 - kept) for accepted in range(DRAFT_TOKENS)] + [kept**DRAFT_TOKENS]
        mean = sum((accepted + 1) * chance for accepted, chance in enumerate(chances))
        means.append(mean)
        variances.append(
            sum((accepted + 1) ** 2 * chance for accepted, chance in enumerate(chances)) - mean**2
        )
    within, between = statistics.mean(variances), statistics.variance(means)
    return Truth(task, statistics.mean(means), within / between)


@cache
def _workload(mix: str, seed: int) -> Workload:
    return make_mix(MIXES[mix], JOBS, seed, DRAFT_TOKENS)


def shares(cell: Cell) -> tuple[Cell, float, float] | None:
    """Of the gap: that `laps-sd` closes, and that it closes told the truth; None where there is no gap."""

    def mean_s(policy: str) -> float:
        return simulate(
            _workload(cell.mix, cell.seed),
            policy,
            cell.slots,
            cell.load,
            draft_tokens=DRAFT_TOKENS,
            switch_ms=cell.switch_ms,
            seed=cell.seed,
            length_error=LENGTH_ERROR,
        ).mean_latency_s

    best_s, oracle_s = min(mean_s("sjf"), mean_s("srpt")), mean_s("oracle")
    learnt = share_of_gap(mean_s("laps-sd"), best_s, oracle_s)
    if learnt is None:
        return None

    def of_request(_: Knowledge, request_class: str, predicted_tokens: float, hinted: bool):  # type: ignore[no-untyped-def]
        return truths(cell.mix)[request_class].of_prediction(predicted_tokens)

    with patch.object(Knowledge, "of_request", of_request):
        told = share_of_gap(mean_s("laps-sd"), best_s, oracle_s)
    assert told is not None
    return cell, learnt, told


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=6, show_default=True, help="Mixes of each kind.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Replays at once.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the figures."
)
def main(seeds: int, jobs: int, json_path: Path | None) -> None:
    """Compare laps-sd with itself told the truth."""
    cells = [Cell(*each) for each in product(MIXES, range(1, seeds + 1), SLOTS, LOADS, SWITCHES_MS)]
    with multiprocessing.Pool(jobs) as pool:
        rows = [row for row in pool.imap(shares, cells) if row is not None]
    found = {}
    for mix in MIXES:
        learnt, told = ([row[place] for row in rows if row[0].mix == mix] for place in (1, 2))
        found[mix] = {
            "cells": len(learnt),
            "median_share": round(statistics.median(learnt), 3),
            "median_share_told_the_truth": round(statistics.median(told), 3),
        }
        click.echo(
            f"{mix} mix, log-error {LENGTH_ERROR}, {len(learnt)} cells: laps-sd closes "
            f"{statistics.median(learnt):.0%} of the gap in the median, told the true distributions "
            f"{statistics.median(told):.0%}"
        )
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    end_on_sigterm()
    main()
