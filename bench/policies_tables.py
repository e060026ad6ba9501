"""The page of all cells, from the rows of `bench/results/policies.json`.

    python bench/policies_tables.py > docs/policies-cells.md
    python bench/policies_tables.py --failing          only the cells over the tolerance

Rows of other code than the present one count as not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from _cells import POLICIES, RECORDED, TOLERANCE, Cell, Results, cells, load_results, median, verdicts

Row = dict[str, Any]

HEAD = """\
# All cells of the comparison

Made by `python bench/policies.py run` and `python bench/policies_tables.py > docs/policies-cells.md`;
[the policies](policies.md) says what is compared. `ratio` is the mean latency of `laps-sd` over that of the
best of fcfs, sjf, srpt, las, fastserve and laps-sd-paper in that cell; **fails** stands where it is over
1.02. `share` is the part of the gap from that best one to the oracle that `laps-sd` closes, where the gap is
over 2%. `error` is the log-error of the predicted lengths, `own` the predictions that the file brings. The
oracle does not count the price of a switch, so it can be beaten.
The recorded workloads are not part of this repository; the
mixes are made from a seed.
"""


def table(titles: str, lines: Iterator[str]) -> None:
    names = titles.split(",")
    print(f"| {' | '.join(names)} |")
    print("| --- " * len(names) + "|")
    for line in lines:
        print(line)
    print()


def error_name(cell: Cell) -> str:
    return "own" if cell.error is None else f"{cell.error:g}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def all_cells(rows: list[Row], failing: bool) -> Iterator[str]:
    for row in rows:
        cell = row["cell"]
        begin = (
            f"| {cell.workload} | {cell.slots} | {cell.load:g} | {cell.switch_ms:g} | {error_name(cell)} |"
        )
        if row["missing"]:
            if not failing:
                yield f"{begin} not run: {', '.join(row['missing'])} | | | | | |"
            continue
        fails, means, best = row["ratio"] > TOLERANCE, row["means"], row["best"]
        if fails or not failing:
            ratio = f"**{row['ratio']:.3f} fails**" if fails else f"{row['ratio']:.3f}"
            yield (
                f"{begin} {best} | {means[best]:.3f} | {means['laps-sd']:.3f} | {ratio} "
                f"| {means['oracle']:.3f} | {percent(row['share'])} |"
            )


def summary(rows: list[Row]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row["missing"]:
            groups.setdefault((row["cell"].workload, error_name(row["cell"])), []).append(row)
    for (name, error), group in sorted(groups.items()):
        ratios = [row["ratio"] for row in group]
        share = median([row["share"] for row in group if row["share"] is not None])
        over = sum(ratio > TOLERANCE for ratio in ratios)
        yield (
            f"| {name} | {error} | {len(group)} | {over} | {min(ratios):.3f} | {median(ratios):.3f} "
            f"| {max(ratios):.3f} | {percent(share)} |"
        )


def one_slot(rows: list[Row]) -> Iterator[str]:
    """Lower mean latency than fcfs and las, where requests are served one at a time and the load is high."""
    for row in rows:
        cell = row["cell"]
        if not row["missing"] and cell.slots == 1 and cell.load >= 0.9 and cell.error in (0.0, None):
            ours, below = row["means"]["laps-sd"], []
            for policy in ("fcfs", "las", "srpt"):
                below.append(f"{100 * (1 - ours / row['means'][policy]):.0f}%")
            yield (
                f"| {cell.workload} | {cell.load:g} | {cell.switch_ms:g} | {error_name(cell)} "
                f"| {' | '.join(below)} |"
            )


def fairness(results: Results) -> Iterator[str]:
    """The price of a low mean: who waits longest under each policy."""
    for cell in cells():
        if cell.workload in RECORDED and (cell.slots, cell.load, cell.switch_ms, cell.error) == (
            8,
            0.9,
            5.0,
            None,
        ):
            for policy in POLICIES:
                figures = results.get(cell.key(policy))
                if figures is not None:
                    yield (
                        f"| {cell.workload} | {policy} | {figures['mean_latency_s']:.2f} "
                        f"| {figures['p99_latency_s']:.1f} | {figures['max_latency_s']:.1f} "
                        f"| {figures['mean_slowdown']:.2f} | {figures['max_slowdown']:.1f} |"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--failing", action="store_true", help="only the cells over the tolerance")
    failing = parser.parse_args().failing
    results = load_results()
    rows = list(verdicts(results))
    columns = "workload,slots,load,switch ms,error,best,best s,laps-sd s,ratio,oracle s,share"
    if failing:
        table(columns, all_cells(rows, failing=True))
        return
    print(HEAD)
    unfinished = sum(bool(row["missing"]) for row in rows)
    over = sum(not row["missing"] and row["ratio"] > TOLERANCE for row in rows)
    print(f"{len(rows)} cells, {unfinished} of them not run completely; {over} over {TOLERANCE}.\n")
    sections: tuple[tuple[str, str, Callable[[], Iterator[str]]], ...] = (
        (
            "What they come to",
            "workload,error,cells,over 1.02,least ratio,median ratio,worst ratio,median share",
            lambda: summary(rows),
        ),
        (
            "One slot, load 0.9 or more: mean latency of laps-sd below that of others",
            "workload,load,switch ms,error,below fcfs,below las,below srpt",
            lambda: one_slot(rows),
        ),
        (
            "Fairness: 8 slots, load 0.9, 5 ms a switch, the files' own predictions",
            "workload,policy,mean s,p99 s,longest s,mean slowdown,longest slowdown",
            lambda: fairness(results),
        ),
        ("All cells", columns, lambda: all_cells(rows, failing=False)),
    )
    for title, titles, lines in sections:
        print(f"## {title}\n")
        table(titles, lines())


if __name__ == "__main__":
    main()
