"""`laps workload`: makes workload files of production traces, benchmark answers and a running pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import click

from laps.cli.options import NOT_OF_THE_STORE, settings_options, store_connection
from laps.settings import Settings
from scheduler_svc.core.records import MAX_DRAFTED_TOKENS
from simulator import convert
from simulator.files import open_text, read_workload_file
from simulator.workload import Workload, write_workload

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUT = click.Path(dir_okay=False, path_type=Path)


@click.group()
def workload() -> None:
    """Make a workload file for `laps simulate`. OUT is JSON Lines, compressed where its name ends in .gz."""


@workload.command()
@click.argument("trace", type=_FILE)
@click.argument("out", type=_OUT)
@click.option("--acceptance", "acceptance_path", type=_FILE, help="Workload whose steps the requests follow.")
@click.option("--tokens-per-step", type=float, default=2.2, show_default=True, help="Without --acceptance.")
@click.option("--draft-tokens", type=click.IntRange(1, MAX_DRAFTED_TOKENS), default=4, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many requests.")
@click.option("--seed", type=int, default=0, show_default=True)
def azure(
    trace: Path,
    out: Path,
    acceptance_path: Path | None,
    tokens_per_step: float,
    draft_tokens: int,
    limit: int | None,
    seed: int,
) -> None:
    """Arrivals and lengths of TRACE, a CSV file of Azure's public LLM inference traces."""

    def make() -> Workload:
        donors = None if acceptance_path is None else read_workload_file(acceptance_path)
        with open_text(trace) as lines:
            return convert.from_azure(
                lines,
                tokens_per_step=tokens_per_step,
                draft_tokens=draft_tokens,
                acceptance=donors,
                limit=limit,
                seed=seed,
            )

    _write(out, make)


@workload.command("spec-bench")
@click.argument("answers", type=_FILE)
@click.argument("out", type=_OUT)
@click.option("--accepted-only", is_flag=True, help="The lengths do not count the target's own token.")
@click.option("--seed", type=int, default=0, show_default=True)
def spec_bench(answers: Path, out: Path, accepted_only: bool, seed: int) -> None:
    """Acceptance of ANSWERS, a file of model answers as Spec-Bench writes them (with `accept_lengths`)."""

    def make() -> Workload:
        with open_text(answers) as lines:
            return convert.from_spec_bench(
                lines,
                accepted_only=accepted_only,
                seed=seed,
                warn=lambda message: click.echo(f"{answers}: {message}", err=True),
            )

    _write(out, make)


@workload.command()
@click.argument("out", type=_OUT)
@settings_options(hide=NOT_OF_THE_STORE - {"starvation_bound_s"})
@click.option("--class", "request_class", help="Only requests of this class.")
def pool(out: Path, settings: Settings, request_class: str | None) -> None:
    """What a LAPS pool has served: its finished requests that the store still keeps (see `retention_s`).

    Prints the command that replays them with the costs that the pool's workers have measured. The store does
    not know the pool's starvation bound: it is that of the settings here.
    """
    from simulator.pool_costs import bound_option
    from simulator.pool_log import PoolLog, from_pool

    read: list[PoolLog] = []
    connection = store_connection(settings)

    def make() -> Workload:
        read.append(asyncio.run(from_pool(settings.redis_url, settings.pool, request_class, **connection)))
        return read[0].workload

    _write(out, make)
    click.echo(f"mean latency as served: {read[0].mean_latency_s:.3f} s. To replay it under other policies:")
    costs, bound_s = read[0].costs, settings.starvation_bound_s
    if costs is None:
        click.echo("(its costs are not known: no worker is in session, or every request was preempted)")
        click.echo(f"laps simulate {out} --as-recorded{bound_option(bound_s)}")
    else:
        click.echo(f"laps simulate {out} --as-recorded {costs.options(bound_s)}")


def _write(out: Path, make: Callable[[], Workload]) -> None:
    from scheduler_svc.store.errors import StoreError

    try:
        made = make()
        write_workload(out, made)
    except (OSError, ValueError, StoreError) as error:
        raise click.ClickException(str(error)) from error
    tokens, steps = sum(job.output_tokens for job in made), sum(job.steps for job in made)
    span_s = made[-1].arrival_s - made[0].arrival_s
    click.echo(
        f"{out}: {len(made)} requests in {span_s:.1f} s, {tokens} tokens in {steps} steps "
        f"({tokens / steps:.2f} a step)"
    )
