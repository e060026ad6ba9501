"""`laps top`: the queue live."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import click

from laps.cli.options import client_options, print_json

if TYPE_CHECKING:
    from laps.client import Client


@click.command()
@click.option("--pool", default="", help="Only this pool.")
@click.option("--interval-s", type=click.FloatRange(0.05, 60), default=0.5, show_default=True,
              help="Time between two pictures.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), help="End after so many pictures.")
@click.option("--waiting", "waiting_limit", type=click.IntRange(0, 1000), default=8, show_default=True,
              help="Waiting requests to show, the next ones first; with --json of each level.")  # fmt: skip
@client_options
def top(
    client: Client, as_json: bool, pool: str, interval_s: float, count: int | None, waiting_limit: int
) -> None:
    """Watch queue levels, slots, each request's acceptance and who is next until Ctrl-C.

    With --json one line a picture.
    """
    snapshots = itertools.islice(client.watch(pool, interval_s=interval_s, head_limit=waiting_limit), count)
    if as_json:
        for snapshot in snapshots:
            print_json(snapshot, indent=None)
        return
    from rich.live import Live

    from laps.cli import tables

    console = tables.plain_console()
    if not console.is_terminal:
        for snapshot in snapshots:
            tables.show(tables.picture(snapshot, waiting_limit), "")
        return
    with Live(console=console, screen=count is None, auto_refresh=False) as live:
        for snapshot in snapshots:
            live.update(tables.picture(snapshot, waiting_limit, console.width), refresh=True)
