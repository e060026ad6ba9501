"""Commands that look into the queue, and `laps cancel`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from laps.cli.options import client_options, print_json

if TYPE_CHECKING:
    from laps.client import Client


@click.command()
@click.option("--pool", default="", help="Only this pool.")
@click.option("--head", "head_limit", type=click.IntRange(0, 1000), default=20, show_default=True,
              help="Requests to show of each level.")  # fmt: skip
@client_options
def queue(client: Client, as_json: bool, pool: str, head_limit: int) -> None:
    """Show what waits, level by level in the order in which it will run, and what runs."""
    pools = client.queues(pool, head_limit=head_limit)
    if as_json:
        print_json({"pools": pools})
        return
    from laps.cli import tables

    running = client.requests("running", pool=pool)
    tables.show(*map(tables.pool_header, pools))
    if running:
        tables.show(tables.requests(running))
    if any(level.head for each in pools for level in each.levels):
        tables.show(tables.waiting(pools))


@click.command()
@click.argument("request_id")
@click.option("--output", "include_output", is_flag=True, help="Show the output so far as well.")
@client_options
def request(client: Client, as_json: bool, request_id: str, include_output: bool) -> None:
    """Show everything that the scheduler knows and believes about a request."""
    detail = client.get(request_id, include_output=include_output)
    if as_json:
        print_json(detail)
        return
    from laps.cli import tables

    tables.show(tables.request(detail, time.time()))
    if include_output:
        click.echo(detail.text)


@click.command()
@click.argument("request_id")
@client_options
def cancel(client: Client, as_json: bool, request_id: str) -> None:
    """Cancel a request in any state; a finished one stays as it is."""
    state = client.cancel(request_id)
    if as_json:
        print_json({"request_id": request_id, "state": state})
    else:
        click.echo(f"{request_id}: {state}")


@click.command()
@click.option("--pool", default="", help="Only this pool.")
@client_options
def workers(client: Client, as_json: bool, pool: str) -> None:
    """Show the workers, their measured speed, and what runs in each slot."""
    found = client.workers(pool)
    if as_json:
        print_json({"workers": found})
        return
    from laps.cli import tables

    tables.show(tables.workers(found, time.time()))


@click.command()
@client_options
def models(client: Client, as_json: bool) -> None:
    """Show the models that can be asked for."""
    found = client.models()
    if as_json:
        print_json({"models": found})
        return
    from laps.cli import tables

    tables.show(tables.models(found))
