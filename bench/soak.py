"""Half an hour at half of what a scheduler holds: does anything grow, leak or drift?

    python bench/soak.py [--minutes 30] [--steps-per-s 300] [--json bench/results/soak.json]

A real scheduler and a real store under simulated workers, requests coming and ending all the time. Exit
code 1 if, after the first sixth of the time, the memory of a process grows by more than 5% or its open files
do, or if a figure of the last third is more than 1.5 times that of the first third.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _processes import BENCH, Usage, end_on_sigterm
from scheduler import SHALLOW, SLOTS, WORKER_STEPS_PER_S, bed

ROUND_S = 10.0
MOST_GROWTH = 1.05
MOST_DRIFT = 1.5
SPARE_FILES = 2
"""A connection may just be open for a moment."""
RETENTION_S = 60.0
"""Finished requests are kept so long, so that as many are forgotten as end long before the soak does."""
SETTLING_S = 120.0
"""By then as many requests are forgotten as end: the longest ones' lives, and the retention."""
FIGURES = ("report_to_lease_p50_ms", "scheduler_us_per_step", "store_us_per_step")


def sample(processes: dict[str, Usage]) -> dict[str, Any]:
    return {
        name: {"rss_bytes": usage.rss_bytes, "open_files": usage.open_files}
        for name, usage in processes.items()
    }


def soak(folder: Path, steps_per_s: float, minutes: float) -> list[dict[str, Any]]:
    """One row per round: figures, memory and open files of each process."""
    workers = max(1, round(steps_per_s / WORKER_STEPS_PER_S))
    rounds = []
    with bed(folder, BENCH.parent, "everysec", retention_s=RETENTION_S) as here:
        here.load.ask("start", workers=workers, slots=SLOTS)
        here.load.ask("submit", count=workers * SLOTS + SHALLOW)
        processes = {"scheduler": here.scheduler.usage, "store": Usage(here.store.pid)}
        for number in range(round(minutes * 60 / ROUND_S)):
            figures = here.measure(seconds=ROUND_S, steps_per_s=steps_per_s)
            rounds.append({**figures, "processes": sample(processes)})
            memory = {name: usage.rss_bytes >> 20 for name, usage in processes.items()}
            told = {name: figures[name] for name in (*FIGURES, "report_to_lease_p99_ms")}
            print(f"{number}: {told} MiB {memory}", flush=True)
    return rounds


def changes(rounds: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Median of the first and of the last third, the time to settle left out, by what was measured."""
    settled = rounds[len(rounds) // 6 :]
    third = max(1, len(settled) // 3)
    columns = {
        f"{process} {name}": [row["processes"][process][name] for row in settled]
        for process in settled[0]["processes"]
        for name in ("rss_bytes", "open_files")
    } | {name: [row[name] for row in settled] for name in FIGURES}
    return {
        name: (statistics.median(values[:third]), statistics.median(values[-third:]))
        for name, values in columns.items()
    }


def faults(found: dict[str, tuple[float, float]]) -> list[str]:
    """What grew or drifted, in words."""
    told = []
    for name, (first, last) in found.items():
        if name.endswith("open_files"):
            most = first + SPARE_FILES
        else:
            most = first * (MOST_GROWTH if name.endswith("rss_bytes") else MOST_DRIFT)
        if last > most:
            told.append(f"{name} went from {first:.6g} to {last:.6g}, at most {most:.6g} is allowed")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps-per-s", type=float, default=300.0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="laps-bench-") as name:
        rounds = soak(Path(name) / "soak", arguments.steps_per_s, arguments.minutes)
    found = changes(rounds)
    for name, (first, last) in found.items():
        print(f"{name}: {first:.6g}, at the end {last:.6g} ({last / first - 1:+.1%})")
    told = faults(found)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"faults": told, "first_and_last_third": found, "rounds": rounds}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(told) or "nothing grew, leaked or drifted")
    if arguments.minutes * 60.0 < SETTLING_S * 6:
        print(f"that was too short: finished requests are still gathering for the first {SETTLING_S:.0f} s")
    sys.exit(bool(told))


if __name__ == "__main__":
    end_on_sigterm()
    main()
