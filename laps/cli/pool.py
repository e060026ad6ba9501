"""`laps pool`: whether a pool is stopped, and letting it go on. Asks the store itself: nobody leads then."""

from __future__ import annotations

import asyncio
import getpass
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from laps.cli.options import NOT_OF_THE_STORE, print_json, settings_options, store_connection
from laps.errors import LocalError
from laps.settings import Settings

if TYPE_CHECKING:
    from scheduler_svc.store.custody import PoolState
    from scheduler_svc.store.store import Store

Answer = TypeVar("Answer")


@click.group()
def pool() -> None:
    """Show whether a pool is stopped by an alarm, and let it go on."""


@pool.command()
@settings_options(hide=NOT_OF_THE_STORE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(settings: Settings, as_json: bool) -> None:
    """Show who leads a pool, or why nobody may."""
    state = asyncio.run(_read(settings))
    if as_json:
        print_json({"pool": settings.pool, **state.to_dict()})
    else:
        click.echo(describe(settings.pool, state, time.time()))


@pool.command()
@settings_options(hide=NOT_OF_THE_STORE)
@click.option("--yes", is_flag=True, help="Do not ask.")
def resume(settings: Settings, yes: bool) -> None:
    """Let a stopped pool go on with its store as it is, without what that has lost."""
    state = asyncio.run(_read(settings))
    click.echo(describe(settings.pool, state, time.time()))
    if state.stopped is None:
        return
    if not yes:
        click.confirm("Go on with the store as it is?", abort=True)
    timeline = asyncio.run(_resume(settings))
    click.echo(
        f"pool {settings.pool}: resumed, timeline {timeline}" if timeline else "it was resumed already"
    )


def describe(name: str, state: PoolState, now_s: float) -> str:
    """What an operator must know, in lines."""
    lines = []
    if state.stopped is None:
        leads = f"{state.holder} leads at {state.address}" if state.holder else "nobody leads"
        lines.append(f"pool {name}: not stopped; {leads}")
        lines.append(f"  stored   {state.stored}")
    else:
        stopped = state.stopped
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(stopped.at_s))
        lines.append(f"pool {name}: STOPPED at {at} by {stopped.by}")
        lines.append(f"  because  {stopped.reason}")
        lines.append(f"  seen     {stopped.seen}")
        lines.append(f"  stored   {stopped.stored}")
        if (lost := stopped.lost_commits) is not None:
            lines.append(
                f"  lost     at least {lost} commits, and what they held: accepted requests, tokens, ends"
            )
    age_s = f", the last one {now_s - state.committed_s:.0f} s ago" if state.committed_s else ""
    lines.append(f"  kept     {state.live} live requests, {state.finished} ended ones{age_s}")
    if state.stopped is not None:
        lines.append("Put the right data back and restart the store, or accept these: laps pool resume")
    return "\n".join(lines)


async def _read(settings: Settings) -> PoolState:
    from scheduler_svc.store.custody import read_pool_state

    return await _with_store(settings, read_pool_state)


async def _resume(settings: Settings) -> int:
    operator = f"{getpass.getuser()}@{socket.gethostname()}"

    return await _with_store(settings, lambda store: store.resume_pool(operator))


async def _with_store(settings: Settings, work: Callable[[Store], Awaitable[Answer]]) -> Answer:
    from scheduler_svc.store.errors import StoreError
    from scheduler_svc.store.store import Store

    store = Store(settings.redis_url, settings.pool, **store_connection(settings))
    try:
        return await work(store)
    except StoreError as error:
        raise LocalError(str(error)) from None
    finally:
        await store.close()
