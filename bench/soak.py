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

from _processes import BENCH, Usage
from scheduler import SHALLOW, SLOTS, WORKER_STEPS_PER_S, bed

ROUND_S = 10.0
MOST_GROWTH = 1.05
MOST_DRIFT = 1.5
SPARE_FILES = 2
"""A connection may just be open for a moment."""
RETENTION_S = 60.0
"""Finished requests are kept so long, so that as many are forgotten as end long before the soak does."""
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


def faults(rounds: list[dict[str, Any]]) -> list[str]:
    """What grew or drifted, in words."""
    found = []
    settled = rounds[len(rounds) // 6 :]
    third = max(1, len(settled) // 3)
    for process in settled[0]["processes"]:
        for name, allowed in (("rss_bytes", MOST_GROWTH), ("open_files", None)):
            values = [row["processes"][process][name] for row in settled]
            first, last = statistics.median(values[:third]), statistics.median(values[-third:])
            most = first * allowed if allowed else first + SPARE_FILES
            if last > most:
                found.append(f"{process}: {name} grew from {first:.0f} to {last:.0f}")
    for name in FIGURES:
        values = [row[name] for row in settled]
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        if last > MOST_DRIFT * first:
            found.append(f"{name} drifted from {first:.4g} to {last:.4g}")
    return found


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
    found = faults(rounds)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"faults": found, "rounds": rounds}, indent=1) + "\n")
    print("\n".join(found) or "nothing grew, leaked or drifted")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
