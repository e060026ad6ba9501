"""`python -m simulator.faults`: plays seeds, and replays one that failed."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from laps.cli import EXIT_INTERRUPTED
from scheduler_svc import compiled
from simulator.faults.history import Counts
from simulator.faults.parts import MUTANTS, Parts
from simulator.faults.world import Outcome, play

LAST_LINES = 60
"""Of a failing seed's trace."""
TELL_EVERY = 100
"""Seeds, where there is no terminal for the bar."""


def _outcomes(first: int, count: int, jobs: int, parts: Parts) -> Iterator[Outcome]:
    if jobs == 1:
        for seed in range(first, first + count):
            yield play(seed, parts=parts)
        return
    # Ctrl-C in a terminal reaches them too; what they play is played to its end.
    with ProcessPoolExecutor(
        jobs, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        yield from pool.map(play, range(first, first + count), chunksize=4)


def _tell_failure(console: Console, seed: int, parts: Parts, mutant: str) -> None:
    again = play(seed, parts=parts, traced=True)
    console.print(f"seed {seed} fails: {again.violation}", style="bold red", markup=False, highlight=False)
    for line in again.lines[-LAST_LINES:]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    option = f" --mutant '{mutant}'" if mutant else ""
    console.print(f"the whole trace: python -m simulator.faults --seed {seed} --trace{option}", markup=False)


def _figures(
    counts: Counts, start: int, seeds: int, jobs: int, took_s: float, virtual_s: float, failed: list[int]
) -> dict[str, Any]:
    """What a run came to, for a person and for a file."""
    numbers = {name: value for name, value in vars(counts).items() if isinstance(value, int)}
    return {
        "first_seed": start,
        "seeds": seeds,
        "seeds_that_broke_a_promise": len(failed),
        "failed_seeds": failed,
        "processes": jobs,
        "wall_s": round(took_s, 1),
        "virtual_s": round(virtual_s, 1),
        **numbers,
        "faults_injected": sum(counts.faults.values()),
        "faults": dict(sorted(counts.faults.items())),
        "lies": dict(sorted(counts.lies.items())),
        "ended_as": dict(sorted(counts.ends.items())),
    }


def _table(figures: dict[str, Any]) -> Table:
    table = Table("what", "number")
    table.columns[1].justify = "right"
    for name, value in figures.items():
        if isinstance(value, int | float):
            table.add_row(name.replace("_", " "), f"{value:,}")
        elif isinstance(value, dict):
            for kind, count in value.items():
                table.add_row(f"  {name.replace('_', ' ')}: {kind}", f"{count:,}")
    return table


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=200, show_default=True, help="How many to play.")
@click.option("--start", type=click.IntRange(min=0), default=0, show_default=True, help="The first of them.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option("--seed", type=click.IntRange(min=0), help="Play this one alone.")
@click.option("--trace", is_flag=True, help="With --seed: print everything that happens.")
@click.option("--mutant", type=click.Choice(list(MUTANTS)), help="Take one safeguard out of the product.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures there.")
def main(
    seeds: int, start: int, jobs: int, seed: int | None, trace: bool, mutant: str | None, out: Path | None
) -> None:
    """Plays seeds of the fault simulator. Exit code 1 if a promise was broken.

    Ctrl-C ends it with the figures of what has been played.
    """
    if mutant and compiled.running().usable:
        raise click.UsageError(f"--mutant needs plain Python: set {compiled.VARIABLE}=0")
    parts = MUTANTS[mutant] if mutant else Parts()
    console = Console()
    if seed is not None:
        outcome = play(seed, parts=parts, traced=trace)
        if trace:
            sys.stdout.writelines(f"{line}\n" for line in outcome.lines)
        else:
            failing = [seed] if outcome.violation else []
            console.print(_table(_figures(outcome.counts, seed, 1, 1, 0.0, outcome.virtual_s, failing)))
        if outcome.violation:
            print(f"seed {seed} fails: {outcome.violation}")
        sys.exit(1 if outcome.violation else 0)
    if mutant and jobs > 1:
        raise click.UsageError("--mutant plays in one process")
    began_s, virtual_s, counts = time.perf_counter(), 0.0, Counts()
    played, failed = 0, list[int]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Stopped early, it tells what has been played.
    with suppress(KeyboardInterrupt), Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("seeds", total=seeds)
        for outcome in _outcomes(start, seeds, jobs, parts):
            counts.add(outcome.counts)
            virtual_s += outcome.virtual_s
            if outcome.violation:
                failed.append(outcome.seed)
                _tell_failure(console, outcome.seed, parts, mutant or "")
            progress.update(task, advance=1, description=f"seeds, {len(failed)} failed")
            played += 1
            if played % TELL_EVERY == 0 and not progress.console.is_terminal:
                print(f"{played} of {seeds} seeds, {len(failed)} failed", file=sys.stderr, flush=True)
    figures = _figures(counts, start, played, jobs, time.perf_counter() - began_s, virtual_s, failed)
    console.print(_table(figures))
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")
    if failed:
        console.print(f"{len(failed)} failed: {', '.join(map(str, failed[:50]))}", style="bold red")
    sys.exit(1 if failed else 0 if played == seeds else EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
