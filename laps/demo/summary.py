"""What the demonstration says about its burst: one line while it runs, two tables at the end."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table

from laps.client.results import Completion, PoolQueues, Snapshot
from laps.demo.burst import Served


def line(snapshot: Snapshot, served: int) -> str:
    """The queue in one line."""
    pool = snapshot.pools[0]
    waiting = " ".join(f"L{level.level}:{level.waiting}" for level in pool.levels)
    shares = [
        f"{item.num_accepted_tokens / item.num_draft_tokens:.0%}" if item.num_draft_tokens else "-"
        for item in snapshot.running
    ]
    return (
        f"served {served:2}  waiting {waiting}  in slots {len(snapshot.running)}"
        f"  acceptance {' '.join(shares) or '-'}  backlog {pool.backlog_s:.1f} s"
    )


def tables(served: Sequence[Served], wall_s: float, pools: Sequence[PoolQueues]) -> list[RenderableType]:
    """Latency and throughput, then acceptance by kind of prompt."""
    if not served:
        return ["Nothing was served."]
    completions = [one.completion for one in served]
    tokens = sum(len(one.token_ids) for one in completions)
    latency = Table(title="The burst, as its clients saw it", title_justify="left")
    for column in ("", "mean", "p50", "p99"):
        latency.add_column(column, justify="left" if not column else "right")
    latency.add_row("latency", *_seconds([one.latency_s for one in served]))
    latency.add_row("time to first token", *_seconds([one.first_token_s for one in served]))
    queue_s = [one.timing.queue_time_ms / 1e3 for one in completions]
    latency.add_row("waiting for the first slot", *_seconds(queue_s))
    reasons = Counter(one.finish_reason for one in completions)
    ended = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    preemptions = sum(one.timing.preemptions for one in completions)
    preempted = sum(one.timing.preemptions > 0 for one in completions)
    policy = pools[0].policy if pools else "?"
    return [
        latency,
        f"{len(served)} requests, {tokens} tokens in {wall_s:.1f} s: {tokens / wall_s:.0f} tokens/s; "
        f"ended by {ended}; policy {policy}, {preemptions} preemptions of {preempted} requests",
        _acceptance(served),
    ]


def _acceptance(served: Iterable[Served]) -> Table:
    by_kind: dict[str, list[Completion]] = defaultdict(list)
    for one in served:
        by_kind[one.item.kind].append(one.completion)
    table = Table(title="Speculation by kind of prompt", title_justify="left")
    table.add_column("kind")
    for column in ("requests", "tokens", "acceptance", "tokens/step"):
        table.add_column(column, justify="right")
    for kind, completions in sorted(by_kind.items()):
        table.add_row(kind, *_speculation(completions))
    table.add_section()
    table.add_row("all", *_speculation([one for kind in by_kind.values() for one in kind]))
    return table


def _speculation(completions: Sequence[Completion]) -> tuple[str, str, str, str]:
    tokens = sum(len(one.token_ids) for one in completions)
    steps = sum(one.speculation.num_steps for one in completions)
    drafted = sum(one.speculation.num_draft_tokens for one in completions)
    accepted = sum(one.speculation.num_accepted_tokens for one in completions)
    return (
        str(len(completions)),
        str(tokens),
        f"{accepted / drafted:.0%}" if drafted else "-",
        f"{tokens / steps:.2f}" if steps else "-",
    )


def _seconds(values: Sequence[float]) -> tuple[str, str, str]:
    """Mean, median and 99th percentile."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return tuple(f"{value:.2f} s" for value in (statistics.mean(values), statistics.median(values), p99))  # type: ignore[return-value]
