"""The policies compared: every cell of workloads x slots x load x switch cost x length prediction.

    python bench/policies.py run [--quick] [--data FOLDER]   adds what is missing to results/policies.json
    python bench/policies.py table [--failing]               prints the table of all cells (Markdown)
    python bench/policies.py starvation [--data FOLDER]      what the starvation bound costs
    python bench/policies.py agreement [--data FOLDER]       compares with an independent simulator

FOLDER holds the workload files (LAPS_TEST_DATA/workloads by default). Runs go through the real scheduler
core on a virtual clock, one after the other; stop it at any time, what has been run is kept. A row
carries a hash of the code that its policy runs; those of other code are run anew and in no table.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from simulator.mixes import CHAT_MIX, WIDE_MIX, make_mix, with_coarse_predictions
from simulator.replay import simulate
from simulator.workload import Workload, read_workload

RESULTS = Path(__file__).parent / "results" / "policies.json"
BASELINES = ("fcfs", "sjf", "srpt", "las", "fastserve", "laps-sd-paper")
POLICIES = ("laps-sd", "oracle", *BASELINES)
RECORDED = ("specbench_draft68m_poisson", "specbench_draft68m_azure_arrivals", "mtbench_mixed_drafters")
MIXES = {"wide_mix_301": (WIDE_MIX, 301), "chat_mix_302": (CHAT_MIX, 302)}
"""Generated, by seed; nothing was chosen by looking at them."""
SLOTS, LOADS, SWITCHES_MS = (8, 32, 1), (0.9, 1.05, 0.7), (0.5, 5.0, 20.0)
RECORDED_ERRORS = (0.0, 0.3, 0.8, None)
MIX_ERRORS = (0.0, 0.3, 0.6, None)
SEED = 1
TOLERANCE = 1.02

AGREEMENT = (
    ("specbench_draft68m_poisson", 1, 0.9, (20.068, 13.918, 13.333, 8.198)),
    ("specbench_draft68m_poisson", 8, 1.05, (25.557, 14.966, 15.135, 8.350)),
    ("specbench_draft68m_azure_arrivals", 1, 0.7, (9.654, 7.266, 6.895, 4.904)),
    ("specbench_draft68m_azure_arrivals", 8, 0.9, (13.958, 8.688, 8.771, 5.218)),
    ("mtbench_mixed_drafters", 1, 0.9, (30.479, 23.875, 23.543, 14.906)),
    ("mtbench_mixed_drafters", 8, 0.9, (6.435, 5.857, 5.751, 4.978)),
)


@dataclass(frozen=True, slots=True)
class Cell:
    workload: str
    slots: int
    load: float
    switch_ms: float
    error: float | None
    """Log-error of the predicted lengths; None: the file's own."""

    def key(self, policy: str) -> str:
        """Of the run that gives the policy's figures here: cells share runs that cannot differ."""
        kind = {"fcfs": (False, False), "sjf": (False, True), "oracle": (True, False)}
        switches, predicts = kind.get(policy, (True, policy not in ("las", "fastserve")))
        switch = f"{self.switch_ms:g}" if switches else "any"
        error = ("own" if self.error is None else f"{self.error:g}") if predicts else "any"
        return f"{self.workload}/slots {self.slots}/load {self.load:g}/switch {switch}/error {error}/{policy}"


def cells(quick: bool = False) -> Iterator[Cell]:
    for slots in SLOTS:
        for name in (*RECORDED, *MIXES):
            for load in LOADS:
                if quick and (load != 0.9 or slots == 1):
                    continue
                if name in MIXES and load == 0.7:
                    continue
                for switch_ms in SWITCHES_MS:
                    if name in MIXES and switch_ms == 20.0:
                        continue
                    for error in RECORDED_ERRORS if name in RECORDED else MIX_ERRORS:
                        yield Cell(name, slots, load, switch_ms, error)


@cache
def code_of(policy: str) -> str:
    """A hash of the code that decides what a replay under the policy gives, comments and docstrings aside.
    Drivers and records of the core are not in it: they keep the replay model, which the tests check."""
    root = Path(__file__).parents[1]
    core = root / "scheduler_svc" / "core"
    paths = [
        *(core / "policies" / f"{name}.py" for name in ("base", policy.replace("-", "_"))),
        *([core / "learning.py"] if policy == "laps-sd" else []),
        *(root / "simulator" / f"{name}.py" for name in ("replay", "workload", "mixes")),
        core / "placement.py",
    ]
    digest = hashlib.sha256()
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                # Strings that stand alone are docstrings.
                node.body = [
                    entry
                    for entry in node.body
                    if not (isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant))
                ]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


Results = dict[str, dict[str, Any]]


def load_results() -> Results:
    """The rows of the code as it is now."""
    rows: Results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {key: row for key, row in rows.items() if row.get("code") == code_of(key.rpartition("/")[2])}


def save_results(results: Results) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results)]
    part = RESULTS.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    part.replace(RESULTS)


def workload_of(name: str, data: Path) -> Workload:
    if name in MIXES:
        tasks, seed = MIXES[name]
        return with_coarse_predictions(make_mix(tasks, jobs=2000, seed=seed), seed)
    return read_workload(data / f"{name}.jsonl.gz")


DATA = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: Path(os.environ.get("LAPS_TEST_DATA", "../shared/data")) / "workloads",
    help="Folder of the recorded workloads.",
)


@click.group()
def main() -> None:
    """Compares the policies."""


@main.command()
@click.option("--quick", is_flag=True, help="A slice: load 0.9 at 8 and 32 slots.")
@click.option("--slots", type=int, multiple=True, help="Only cells with so many slots; may be repeated.")
@click.option("--load", type=float, multiple=True, help="Only cells at this load; may be repeated.")
@click.option("--mixes-only", is_flag=True, help="Generated workloads only; needs no data.")
@DATA
def run(quick: bool, slots: tuple[int, ...], load: tuple[float, ...], mixes_only: bool, data: Path) -> None:
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
    workloads: dict[str, Workload] = {}
    with Progress() as progress:
        task = progress.add_task("replaying", total=len(wanted))
        for done, (key, (cell, policy)) in enumerate(wanted.items(), 1):
            if cell.workload not in workloads:
                workloads[cell.workload] = workload_of(cell.workload, data)
            result = simulate(
                workloads[cell.workload],
                policy,
                cell.slots,
                cell.load,
                switch_ms=cell.switch_ms,
                seed=SEED,
                length_error=cell.error,
            )
            figures = {name: round(value, 4) for name, value in result.summary().items()}
            results[key] = {"code": code_of(policy), **figures}
            progress.update(task, advance=1, description=key)
            if done % 20 == 0:
                save_results(results)
    save_results(results)


def verdicts(results: Results) -> Iterator[dict[str, Any]]:
    for cell in sorted(
        cells(), key=lambda cell: (cell.workload, cell.slots, cell.load, cell.switch_ms, str(cell.error))
    ):
        runs = {policy: results.get(cell.key(policy)) for policy in POLICIES}
        missing = [policy for policy, figures in runs.items() if figures is None]
        if missing:
            yield {"cell": cell, "missing": missing}
            continue
        means = {policy: figures["mean_latency_s"] for policy, figures in runs.items() if figures}
        best = min(BASELINES, key=means.__getitem__)
        gap = means[best] - means["oracle"]
        yield {
            "cell": cell,
            "missing": [],
            "means": means,
            "best": best,
            "ratio": means["laps-sd"] / means[best],
            "share": (means[best] - means["laps-sd"]) / gap if gap > 0.02 * means[best] else None,
            "p99": {policy: figures["p99_latency_s"] for policy, figures in runs.items() if figures},
        }


def median(values: list[float]) -> float | None:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


@main.command()
@click.option("--failing", is_flag=True, help="Only cells over the tolerance.")
def table(failing: bool) -> None:
    """Print all cells, and what they come to."""
    rows = list(verdicts(load_results()))
    click.echo(
        "| workload | slots | load | switch ms | error | best | best s | laps-sd s | ratio | oracle s "
        "| share |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cell = row["cell"]
        error = "own" if cell.error is None else f"{cell.error:g}"
        begin = f"| {cell.workload} | {cell.slots} | {cell.load:g} | {cell.switch_ms:g} | {error} |"
        if row["missing"]:
            if not failing:
                click.echo(f"{begin} not run: {', '.join(row['missing'])} | | | | | |")
            continue
        groups.setdefault((cell.workload, error), []).append(row)
        fails = row["ratio"] > TOLERANCE
        if failing and not fails:
            continue
        share = "" if row["share"] is None else f"{100 * row['share']:.0f}%"
        ratio = f"**{row['ratio']:.3f} fails**" if fails else f"{row['ratio']:.3f}"
        means = row["means"]
        click.echo(
            f"{begin} {row['best']} | {means[row['best']]:.3f} | {means['laps-sd']:.3f} | {ratio} | "
            f"{means['oracle']:.3f} | {share} |"
        )
    click.echo(
        "\n| workload | error | cells | over 1.02 | worst ratio | median ratio | median share of the gap |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, error), group in sorted(groups.items()):
        ratios = [row["ratio"] for row in group]
        share_median = median([row["share"] for row in group if row["share"] is not None])
        share = "" if share_median is None else f"{100 * share_median:.0f}%"
        over = sum(ratio > TOLERANCE for ratio in ratios)
        click.echo(
            f"| {name} | {error} | {len(group)} | {over} | {max(ratios):.3f} | {median(ratios):.3f} "
            f"| {share} |"
        )
    unfinished = sum(bool(row["missing"]) for row in rows)
    click.echo(f"\n{len(rows)} cells, {unfinished} of them not run completely.")


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


if __name__ == "__main__":
    main()
