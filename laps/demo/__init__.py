"""`laps demo`: the whole stack on this machine, a burst of requests, what happens to them, the end.

Everything is real: separate processes that speak gRPC, a store, the built-in models. Nothing is left behind.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from laps import logs, runtime
from laps.cli import tables
from laps.client import AsyncClient
from laps.demo import summary
from laps.demo.burst import AT_ONCE, Burst, Item, Served, load_items
from laps.errors import LapsError
from laps.setting import SettingsError
from laps.settings import BUILT_IN_TARGET, Settings
from laps.stack import Stack

PROMPTS = Path(BUILT_IN_TARGET).parent / "prompts.jsonl"
ARRIVAL_INTERVAL_S = 0.15
PICTURE_INTERVAL_S = 0.2
LINE_INTERVAL_S = 1.0
INTERRUPTED = 130
SHOWN_CHARS = 600


def run(settings: Settings) -> int:
    """Runs the demonstration; returns the exit code."""
    logs.configure_logging("demo", level="error", form="plain")
    settings.check_models()
    if not settings.workers:
        raise SettingsError(
            f"workers: the demonstration needs at least one, not 0 (from {settings.origin('workers')})"
        )
    items = load_items(PROMPTS)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    return runtime.run(_interruptible(settings, items, console))


async def _interruptible(settings: Settings, items: Sequence[Item], console: Console) -> int:
    """Ctrl-C, SIGTERM and a closed terminal end the demonstration, and all that it started, cleanly."""
    demo = asyncio.ensure_future(_demo(settings, items, console))
    runtime.on_stop_signals(asyncio.get_running_loop(), lambda _: demo.cancel())
    try:
        return await demo
    except asyncio.CancelledError:
        console.print("Interrupted; everything is stopped.")
        return INTERRUPTED


async def _demo(settings: Settings, items: Sequence[Item], console: Console) -> int:
    with tempfile.TemporaryDirectory(prefix="laps-demo-") as folder:
        settings = settings.model_copy(update={"data_dir": Path(folder)})
        began_s = time.monotonic()
        console.print(
            f"Starting store, scheduler ({settings.policy}), gateway and {settings.workers} workers "
            f"with {settings.slots} slots each ..."
        )
        async with Stack(settings, any_ports=True) as stack, AsyncClient(stack.gateway_address) as client:
            console.print(
                f"Ready after {time.monotonic() - began_s:.1f} s: gateway {stack.gateway_address}, "
                f"store {stack.redis_url}"
            )
            burst = Burst(items)
            burst_began_s = time.monotonic()
            await _serve(client, burst, console)
            wall_s = time.monotonic() - burst_began_s
            counters = await client.queues()
            console.print(
                Panel(Text(_tail(burst.streamed)), title=f"{burst.shown.request_id}, as it was streamed")
            )
            console.print(*summary.tables(burst.served, wall_s, counters), sep="\n")
    for line in burst.failed:
        console.print(f"failed: {line}", style="red")
    console.print(
        f"Everything is stopped; {time.monotonic() - began_s:.1f} s in all. `make up` keeps it running."
    )
    return 1 if burst.failed else 0


async def _serve(client: AsyncClient, burst: Burst, console: Console) -> None:
    """Sends the burst and shows it until every request has ended."""
    watching = asyncio.create_task(_watch(client, burst))
    try:
        async with asyncio.TaskGroup() as clients:
            clients.create_task(_show(burst, console))
            for item in burst.items:
                if item.number >= AT_ONCE:
                    await asyncio.sleep(ARRIVAL_INTERVAL_S)
                clients.create_task(_one(client, burst, item))
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _one(client: AsyncClient, burst: Burst, item: Item) -> None:
    began_s = time.monotonic()
    first_s = 0.0
    try:
        async with client.stream(item.prompt, **item.options()) as stream:
            async for chunk in stream:
                first_s = first_s or time.monotonic()
                if item is burst.shown:
                    burst.streamed += chunk.text
            completion = stream.result
    except LapsError as error:
        burst.failed.append(f"{item.request_id}: {error}")
        return
    if completion.finish_reason not in ("stop", "length"):
        burst.failed.append(f"{item.request_id}: {completion.finish_reason} {completion.error}")
        return
    now_s = time.monotonic()
    burst.served.append(Served(item, now_s - began_s, (first_s or now_s) - began_s, completion))


async def _watch(client: AsyncClient, burst: Burst) -> None:
    async for snapshot in client.watch(interval_s=PICTURE_INTERVAL_S, head_limit=3):
        burst.snapshot = snapshot


async def _show(burst: Burst, console: Console) -> None:
    if not console.is_terminal:
        await _show_lines(burst, console)
        return
    with Live(_picture(burst, console.width), console=console, auto_refresh=False, transient=True) as live:
        while not burst.finished:
            await asyncio.sleep(PICTURE_INTERVAL_S / 2)
            live.update(_picture(burst, console.width), refresh=True)


async def _show_lines(burst: Burst, console: Console) -> None:
    """Where there is no terminal: a line a second, and the stream's new text below it."""
    began_s = time.monotonic()
    printed = 0
    while not burst.finished:
        await asyncio.sleep(LINE_INTERVAL_S)
        if burst.snapshot is not None:
            console.print(
                f"{time.monotonic() - began_s:5.1f} s  {summary.line(burst.snapshot, len(burst.served))}"
            )
        if len(burst.streamed) > printed:
            console.print(
                Text(f"         {burst.shown.request_id} +{burst.streamed[printed:]!r}", style="dim")
            )
            printed = len(burst.streamed)


def _picture(burst: Burst, width: int) -> Group:
    return Group(*_parts(burst, width))


def _parts(burst: Burst, width: int) -> Iterator[RenderableType]:
    if burst.snapshot is not None:
        yield tables.picture(burst.snapshot, width=width)
    progress = Progress(TextColumn("served"), BarColumn(), MofNCompleteColumn())
    progress.add_task("", total=len(burst.items), completed=len(burst.served))
    yield progress
    yield Panel(Text(_tail(burst.streamed)), title=f"{burst.shown.request_id}, token by token", height=12)


def _tail(text: str) -> str:
    """The last lines that fit the panel."""
    return "\n".join(text[-SHOWN_CHARS:].splitlines()[-10:])
