"""`laps simulate`: what each policy would have done with a workload."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from scheduler_svc.core.policies import policies
from scheduler_svc.core.records import MAX_DRAFTED_TOKENS
from simulator.files import read_workload_file
from simulator.replay import simulate as replay
from simulator.result import Result
from simulator.workload import Workload, WorkloadError, rescale


def _policy_names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    known = policies()
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not a policy; known are {', '.join(known)}, or all")
    if not names:
        raise click.BadParameter("no policy given")
    return list(dict.fromkeys(names))


class _Number(click.FloatRange):
    """In a range that ends: infinity is beyond it. What is no number is in no range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


_POSITIVE = _Number(min=1e-6, max=1e6)
_AT_LEAST_ZERO = _Number(min=0.0, max=1e6)

_BY_PREDICTION = ("sjf", "srpt")
"""They rank by nothing else."""

_LONGEST_SPAN_S = 1e11
"""A replay's clock goes a little further."""


@click.command(name="simulate")
@click.argument("workload", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--policies",
    "policy_names",
    callback=_policy_names,
    default="fcfs,srpt,laps-sd",
    show_default=True,
    help="Names separated by commas, or all.",
)
@click.option(
    "--slots", type=click.IntRange(min=1), default=8, show_default=True, help="Slots of the worker."
)
@click.option(
    "--load", type=_POSITIVE, default=0.9, show_default=True, help="Arrivals are stretched to this load."
)
@click.option("--as-recorded", is_flag=True, help="Leave the arrivals as they are instead.")
@click.option("--draft-tokens", type=click.IntRange(1, MAX_DRAFTED_TOKENS), default=4, show_default=True)
@click.option("--draft-ms", type=_AT_LEAST_ZERO, default=2.0, show_default=True, help="One drafted token.")
@click.option("--verify-ms", type=_POSITIVE, default=24.0, show_default=True, help="One verification.")
@click.option(
    "--switch-ms", type=_AT_LEAST_ZERO, default=1.0, show_default=True, help="One return to a slot."
)
@click.option(
    "--prefill-ms",
    type=_AT_LEAST_ZERO,
    default=0.0,
    show_default=True,
    help="One prompt token at first entry.",
)
@click.option(
    "--row-ms",
    type=_AT_LEAST_ZERO,
    default=0.0,
    show_default=True,
    help="What each request beyond the first adds to a step.",
)
@click.option(
    "--start-ms",
    type=_AT_LEAST_ZERO,
    default=0.0,
    show_default=True,
    help="From a decision of the scheduler until the worker acts on it.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--length-error",
    type=_Number(min=0.0, max=100.0),
    default=None,
    help="Predict the true lengths with this log-error, drawn from the seed, instead of as the file says.",
)
@click.option(
    "--starvation-bound-s",
    type=_Number(min=1e-6, max=1e9),
    default=None,
    help="After this wait a request goes before all later ones.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write figures here."
)
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw a PNG here.")
def simulate(
    workload: Path,
    policy_names: list[str],
    slots: int,
    load: float,
    as_recorded: bool,
    draft_tokens: int,
    draft_ms: float,
    verify_ms: float,
    switch_ms: float,
    prefill_ms: float,
    row_ms: float,
    start_ms: float,
    seed: int,
    length_error: float | None,
    starvation_bound_s: float | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Replay WORKLOAD (JSON Lines, .gz or not) through the real scheduler under each policy.

    The clock is virtual: nothing sleeps, and the same seed gives the same output, byte for byte.
    """
    if plot_path is not None:
        _require_matplotlib()
    try:
        jobs = read_workload_file(workload)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error

    if length_error is None and all(job.predicted_output_tokens is None for job in jobs):
        blind = [name for name in policy_names if name in _BY_PREDICTION]
        if blind:
            click.echo(
                f"{workload}: no request has predicted_output_tokens: {' and '.join(blind)} then "
                f"rank{'s' if len(blind) == 1 else ''} as fcfs does; --length-error predicts",
                err=True,
            )

    full_step_s = (draft_tokens * draft_ms + verify_ms + row_ms * (slots - 1)) / 1000.0

    def run(name: str, at_load: float | None, progress: Progress, record_stays: bool = False) -> Result:
        arrivals = jobs if at_load is None else rescale(jobs, slots, at_load, full_step_s)
        span_s = arrivals[-1].arrival_s - arrivals[0].arrival_s
        if not span_s <= _LONGEST_SPAN_S:
            at = "as recorded" if at_load is None else f"at load {at_load:g}"
            raise WorkloadError(f"{workload}: {at} the arrivals span {span_s:g} s, too long to replay")
        label = name if at_load is None else f"{name} at load {at_load:g}"
        task = progress.add_task(label, total=len(jobs))
        return replay(
            jobs,
            name,
            slots,
            at_load,
            draft_tokens,
            draft_ms,
            verify_ms,
            switch_ms,
            seed,
            prefill_ms=prefill_ms,
            row_ms=row_ms,
            start_ms=start_ms,
            length_error=length_error,
            starvation_bound_s=starvation_bound_s,
            progress=lambda finished: progress.update(task, completed=finished),
            record_stays=record_stays,
        )

    asked = None if as_recorded else load
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            results = {name: run(name, asked, progress, plot_path is not None) for name in policy_names}
            if plot_path is not None and asked is not None:
                for name in policy_names:
                    curves[name] = [
                        (
                            at,
                            results[name].mean_latency_s
                            if at == asked
                            else run(name, at, progress).mean_latency_s,
                        )
                        for at in sorted({0.5, 0.7, 0.8, 0.9, 1.0, asked})
                    ]
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except OverflowError as error:
        # A whole number of a line may have any length.
        raise click.ClickException(f"{workload}: a number in it is too large: {error}") from error
    console = Console()
    # A file or a pipe has no width of its own; names must not be cut there.
    (console if console.is_terminal else Console(width=120)).print(_table(results, jobs))
    if json_path is not None:
        report: dict[str, Any] = {"policies": {name: result.summary() for name, result in results.items()}}
        if prefill_ms or row_ms or start_ms:
            report["costs"] = {"prefill_ms": prefill_ms, "row_ms": row_ms, "start_ms": start_ms}
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if plot_path is not None:
        from simulator.plots import draw

        draw(plot_path, results, curves, slots)
        click.echo(f"drawn: {plot_path}", err=True)


def _table(results: dict[str, Result], jobs: Workload) -> Table:
    table = Table(title=f"{len(jobs)} requests")
    table.add_column("policy")
    for heading in (
        "mean s",
        "p50 s",
        "p90 s",
        "p99 s",
        "slowdown",
        "max slowdown",
        "switches",
        "makespan s",
    ):
        table.add_column(heading, justify="right")
    best = min(result.mean_latency_s for result in results.values())
    for name, result in results.items():
        figures = result.summary()
        table.add_row(
            name,
            *(
                f"{figures[key]:.3f}"
                for key in ("mean_latency_s", "p50_latency_s", "p90_latency_s", "p99_latency_s")
            ),
            f"{figures['mean_slowdown']:.2f}",
            f"{figures['max_slowdown']:.1f}",
            str(figures["switches"]),
            f"{figures['makespan_s']:.1f}",
            style="bold" if result.mean_latency_s == best else None,
        )
    return table


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plot needs matplotlib: pip install 'laps[plot]'")
