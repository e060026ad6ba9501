"""The policies compared: every cell of workloads x slots x load x switch cost x length prediction.

    python bench/policies.py run [--quick] [--jobs 2] [--data FOLDER]
                                                             adds what is missing to results/policies.json
    python bench/policies_tables.py [--failing]              prints the tables of all cells (Markdown)
    python bench/policies.py starvation [--data FOLDER]      what the starvation bound costs
    python bench/policies.py agreement [--data FOLDER]       compares with an independent simulator
    python bench/policies.py once [--data FOLDER]            what is left where no output comes twice

FOLDER holds the workload files (LAPS_TEST_DATA/workloads by default). Runs go through the real scheduler
core on a virtual clock, one after the other; stop it at any time, what has been run is kept. A row
carries a hash of the code that its policy runs; those of other code are run anew and in no table.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import click
from _cells import (
    BASELINES,
    MIXES,
    POLICIES,
    RECORDED,
    SEED,
    Cell,
    cells,
    code_of,
    load_results,
    median,
    save_results,
    share_of_gap,
    workload_of,
)
from _processes import end_on_sigterm
from rich.progress import Progress

from simulator.replay import simulate

AGREEMENT = (
    ("specbench_draft68m_poisson", 1, 0.9, (20.068, 13.918, 13.333, 8.198)),
    ("specbench_draft68m_poisson", 8, 1.05, (25.557, 14.966, 15.135, 8.350)),
    ("specbench_draft68m_azure_arrivals", 1, 0.7, (9.654, 7.266, 6.895, 4.904)),
    ("specbench_draft68m_azure_arrivals", 8, 0.9, (13.958, 8.688, 8.771, 5.218)),
    ("mtbench_mixed_drafters", 1, 0.9, (30.479, 23.875, 23.543, 14.906)),
    ("mtbench_mixed_drafters", 8, 0.9, (6.435, 5.857, 5.751, 4.978)),
)


DATA = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: Path(os.environ.get("LAPS_TEST_DATA", "../shared/data")) / "workloads",
    help="Folder of the recorded workloads.",
)


@click.group()
def main() -> None:
    """Compares the policies."""


_workload = cache(workload_of)


def _replayed(run: tuple[str, Cell, str, Path]) -> tuple[str, dict[str, Any]]:
    """The key and the row of one replay."""
    key, cell, policy, data = run
    result = simulate(
        _workload(cell.workload, data),
        policy,
        cell.slots,
        cell.load,
        switch_ms=cell.switch_ms,
        seed=SEED,
        length_error=cell.error,
    )
    figures = {name: round(value, 4) for name, value in result.summary().items()}
    return key, {"code": code_of(policy), **figures}


@main.command()
@click.option("--quick", is_flag=True, help="A slice: load 0.9 at 8 and 32 slots.")
@click.option("--slots", type=int, multiple=True, help="Only cells with so many slots; may be repeated.")
@click.option("--load", type=float, multiple=True, help="Only cells at this load; may be repeated.")
@click.option("--jobs", type=int, default=1, show_default=True, help="Replays at once.")
@click.option("--mixes-only", is_flag=True, help="Generated workloads only; needs no data.")
@DATA
def run(
    quick: bool,
    slots: tuple[int, ...],
    load: tuple[float, ...],
    jobs: int,
    mixes_only: bool,
    data: Path,
) -> None:
    """Run what is missing."""
    results = load_results()
    wanted: dict[str, tuple[Cell, str]] = {}
    chosen = [
        cell
        for cell in cells(quick)
        if (not mixes_only or cell.workload in MIXES)
        and (not slots or cell.slots in slots)
        and (not load or cell.load in load)
    ]
    # The ones that decide most cells first, so that a stopped run is of use.
    for policies in (POLICIES[:2] + BASELINES[:3], BASELINES[3:5], BASELINES[5:]):
        for cell in chosen:
            for policy in policies:
                if cell.key(policy) not in results:
                    wanted.setdefault(cell.key(policy), (cell, policy))
    runs = [(key, cell, policy, data) for key, (cell, policy) in wanted.items()]
    with Progress() as progress, multiprocessing.Pool(jobs) as pool:
        task = progress.add_task("replaying", total=len(runs))
        for done, (key, row) in enumerate(pool.imap(_replayed, runs), 1):
            results[key] = row
            progress.update(task, advance=1, description=key)
            if done % 20 == 0:
                save_results(results)
    save_results(results)


@main.command()
@DATA
def starvation(data: Path) -> None:
    """Print what the starvation bound costs laps-sd at eight slots, with the files' own predictions."""
    click.echo("| workload | load | bound s | mean s | p99 s | longest s | longest wait for a first slot s |")
    click.echo("| --- " * 7 + "|")
    for name in RECORDED:
        workload = workload_of(name, data)
        for load in (0.9, 1.05):
            for bound_s in (None, 60.0, 30.0, 10.0):
                result = simulate(workload, "laps-sd", 8, load, starvation_bound_s=bound_s)
                figures = result.summary()
                click.echo(
                    f"| {name} | {load:g} | {'off' if bound_s is None else f'{bound_s:g}'} "
                    f"| {figures['mean_latency_s']:.3f} | {figures['p99_latency_s']:.1f} "
                    f"| {figures['max_latency_s']:.1f} | {max(result.first_waits_s):.1f} |"
                )


@main.command()
@DATA
def agreement(data: Path) -> None:
    """Compare mean latencies with those of an independent simulator."""
    click.echo("| workload | slots | load | policy | here s | there s | difference |")
    click.echo("| --- " * 7 + "|")
    for name, slots, load, means_s in AGREEMENT:
        workload = workload_of(name, data)
        for policy, there_s in zip(("fcfs", "sjf", "srpt", "oracle"), means_s, strict=True):
            here_s = simulate(workload, policy, slots, load).mean_latency_s
            difference = 100 * (here_s / there_s - 1)
            click.echo(
                f"| {name} | {slots} | {load:g} | {policy} | {here_s:.3f} | {there_s:.3f} "
                f"| {difference:+.3f}% |"
            )


@main.command()
@DATA
def once(data: Path) -> None:
    """Close the gap to the oracle with exact lengths, each recorded output once and in a random order."""
    click.echo("| workload | outputs | cells | median share of the gap |")
    click.echo("| --- " * 4 + "|")
    for name in RECORDED:
        dice = random.Random(SEED)
        jobs = list({job.emitted_per_step: job for job in workload_of(name, data)}.values())
        dice.shuffle(jobs)
        now_s = 0.0
        for place, job in enumerate(jobs):
            now_s += dice.expovariate(1.0)
            jobs[place] = replace(job, arrival_s=now_s)
        shares = []
        for slots, load, switch_ms in product((1, 8), (0.9, 1.05), (0.5, 5.0)):
            means_s = {
                policy: simulate(
                    tuple(jobs), policy, slots, load, switch_ms=switch_ms, seed=SEED, length_error=0.0
                ).mean_latency_s
                for policy in ("laps-sd", "oracle", "sjf", "srpt")
            }
            best_s = min(means_s["sjf"], means_s["srpt"])
            share = share_of_gap(means_s["laps-sd"], best_s, means_s["oracle"])
            if share is not None:
                shares.append(share)
        click.echo(f"| {name} | {len(jobs)} | {len(shares)} | {median(shares):.0%} |")


if __name__ == "__main__":
    end_on_sigterm()
    main()
