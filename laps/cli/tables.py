"""What the inspecting commands and the live view show, made with rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from laps.client.results import Model, PoolQueues, Request, RequestDetail, Snapshot, Worker

BAR_COLUMNS = 100
"""A terminal so wide has room for bars beside numbers."""
_OVERDUE = -1e14
"""Ranks below it belong to requests past the starvation bound."""


def plain_console(width: int | None = None) -> Console:
    """Shows names and paths as they are: in rich's markup `[x]` would be a style."""
    return Console(highlight=False, markup=False, emoji=False, width=width)


def show(*parts: RenderableType) -> None:
    """Prints to standard output. Not to a terminal: without colours and not cut to a width."""
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=200)
    for part in parts:
        console.print(part)


def pool_header(pool: PoolQueues) -> Text:
    leader = f"led by {pool.leader} in epoch {pool.epoch}" if pool.leader else f"epoch {pool.epoch}"
    return Text.assemble(
        (pool.pool, "bold"),
        f": {pool.policy}, {leader}, commit {pool.commit_seq}; {pool.waiting} waiting, "
        f"{pool.running} running, backlog {pool.backlog_s:.1f} s",
    )


def levels(pool: PoolQueues) -> Table:
    """One bar a queue level."""
    table = _table("level", "below", "waiting", "")
    longest = max((level.waiting for level in pool.levels), default=0)
    for level in pool.levels:
        bar = "█" * max(round(30 * level.waiting / longest), 1) if level.waiting else ""
        threshold = f"{level.threshold_s:g} s" if level.threshold_s else "-"
        table.add_row(str(level.level), threshold, str(level.waiting), bar)
    return table


def waiting(pools: Sequence[PoolQueues]) -> Table:
    """The heads of all levels in the order in which they will run."""
    table = _table(
        "level", "waiting request", "state", "rank", "priority", "tokens", "predicted", "acceptance",
        "still needs", "had", "preempted",
    )  # fmt: skip
    for pool in pools:
        for level in pool.levels:
            for item in level.head:
                table.add_row(
                    str(level.level), item.request_id, item.state, f"{item.rank:.4g}", str(item.priority),
                    f"{item.output_tokens}/{item.max_tokens}", f"{item.predicted_output_tokens:.0f}",
                    acceptance(item), f"{item.perceived_service_s:.2f} s", f"{item.attained_service_s:.2f} s",
                    str(item.preemptions),
                )  # fmt: skip
            if level.waiting > len(level.head) > 0:
                table.add_row("", f"... {level.waiting - len(level.head)} more", *[""] * 9)
    return table


def requests(found: Sequence[Request]) -> Table:
    """Running requests, with the tokens that each step gave."""
    table = _table("running request", "worker", "slot", "tokens", "acceptance", "tokens/step", "still needs",
                   "preempted")  # fmt: skip
    for item in found:
        per_step = f"{1 + item.num_accepted_tokens / item.num_steps:.2f}" if item.num_steps else "-"
        table.add_row(
            item.request_id, item.worker_id, str(item.slot), f"{item.output_tokens}/{item.max_tokens}",
            acceptance(item), per_step, f"{item.perceived_service_s:.2f} s", str(item.preemptions),
        )  # fmt: skip
    return table


def request(detail: RequestDetail, now_s: float) -> Table:
    """Every field of a request that says something, instants as ages."""
    table = _table("", "")
    table.show_header = False
    item = detail.request
    for name in Request.__dataclass_fields__:
        value = getattr(item, name)
        if value in ("", 0, 0.0) and name not in ("level", "rank", "output_tokens"):
            continue
        if name in (
            "arrival_s",
            "deadline_s",
            "first_scheduled_s",
            "first_token_s",
            "finished_s",
            "leased_s",
        ):
            shown = age(value, now_s)
        elif name.endswith("_s"):
            shown = f"{value:.3f}"
        elif isinstance(value, float):
            shown = f"{value:.4g}"
        else:
            shown = str(value)
        table.add_row(name, shown)
    return table


def workers(found: Sequence[Worker], now_s: float) -> Table:
    table = _table("worker", "pool", "device", "slots", "KV", "draft", "verify", "switch", "steps", "seen")
    for worker in found:
        busy = sum(1 for slot in worker.slots if slot.request_id)
        kv = f"{worker.kv_used_tokens}/{worker.kv_capacity_tokens}" if worker.kv_capacity_tokens else "-"
        table.add_row(
            worker.worker_id + (" (draining)" if worker.draining else ""), worker.pool, worker.device,
            f"{busy}/{len(worker.slots)}", kv, f"{worker.draft_ms:.2f} ms", f"{worker.verify_ms:.2f} ms",
            f"{worker.switch_ms:.2f} ms", str(worker.num_steps), age(worker.last_seen_s, now_s),
        )  # fmt: skip
    return table


def slots(
    found: Sequence[Worker], running: Sequence[Request], now_s: float, width: int = BAR_COLUMNS
) -> Table:
    """One row a slot: what runs there, since when, and how well it speculates. Bars only where the terminal,
    `width` columns, has room for them."""
    by_id = {item.request_id: item for item in running}
    bars = width >= BAR_COLUMNS
    table = _table("worker", "slot", "request", "tokens", *[""] * bars, "accept.", "per step", "needs",
                   "held for")  # fmt: skip
    # Ids are the longest: they are cut first.
    table.columns[2].no_wrap = False
    for worker in found:
        for slot in worker.slots:
            item = by_id.get(slot.request_id)
            if item is None:
                table.add_row(worker.worker_id, str(slot.slot), _cut(slot.request_id or "free", "dim"))
                continue
            share = min(item.output_tokens / item.max_tokens, 1.0) if item.max_tokens else 0.0
            per_step = f"{1 + item.num_accepted_tokens / item.num_steps:.2f}" if item.num_steps else "-"
            table.add_row(
                worker.worker_id, str(slot.slot), _cut(item.request_id),
                f"{item.output_tokens}/{item.max_tokens}",
                *[Text("█" * round(12 * share), style="green")] * bars, acceptance(item), per_step,
                f"{item.perceived_service_s:.2f} s",
                f"{max(now_s - item.leased_s, 0.0):.1f} s" if item.leased_s else "-",
            )  # fmt: skip
    return table


def upcoming(pool: PoolQueues, limit: int) -> Table:
    """The first of the waiting in the order in which they will run, each with why it waits there."""
    table = _table("next", "level", "rank", "tokens", "acceptance", "still needs", "why")
    # The reasons are long: they are cut first.
    table.columns[-1].no_wrap = False
    # A higher priority goes first from whatever level; the sort keeps the order inside each.
    heads = sorted((item for level in pool.levels for item in level.head), key=lambda item: -item.priority)
    for item in heads[:limit]:
        table.add_row(
            item.request_id, str(item.level), "overdue" if item.rank < _OVERDUE else f"{item.rank:.4g}",
            f"{item.output_tokens}/{item.max_tokens}", acceptance(item),
            f"{item.perceived_service_s:.2f} s" + ("" if item.perceptible else " ?"),
            _cut(item.preempted_because),
        )  # fmt: skip
    return table


def models(found: Sequence[Model]) -> Table:
    table = _table("model", "pool", "target", "draft", "vocabulary", "context", "workers", "slots")
    for model in found:
        table.add_row(
            model.name, model.pool, model.target, model.draft or "-", str(model.vocabulary_size),
            str(model.context_tokens), str(model.workers), str(model.slots),
        )  # fmt: skip
    return table


def picture(snapshot: Snapshot, waiting_limit: int = 0, width: int = BAR_COLUMNS) -> Group:
    """The live view: queue levels, slots, acceptance of each running request, the next of the waiting.
    `width`: columns of the terminal."""
    parts: list[RenderableType] = []
    for pool in snapshot.pools:
        parts += [pool_header(pool), levels(pool)]
    parts.append(slots(snapshot.workers, snapshot.running, snapshot.time_s, width))
    if waiting_limit:
        parts += [upcoming(pool, waiting_limit) for pool in snapshot.pools if pool.waiting]
    return Group(*parts)


def acceptance(item: Request) -> str:
    """Measured where there is something measured, else the estimate, marked as such."""
    if item.num_draft_tokens:
        return f"{item.num_accepted_tokens / item.num_draft_tokens:.0%}"
    return f"~{item.acceptance_estimate:.0%}"


def age(instant_s: float, now_s: float) -> str:
    if not instant_s:
        return "-"
    passed_s = now_s - instant_s
    return f"{passed_s:.1f} s ago" if passed_s >= 0 else f"in {-passed_s:.1f} s"


def _cut(text: str, style: str = "") -> Text:
    """Ends with dots where there is no room, and takes one line."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table
