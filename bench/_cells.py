"""The cells of the comparison of policies, and the rows of `bench/results/policies.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from simulator.code_hash import CORE, ROOT, code_hash, policy_files
from simulator.mixes import CHAT_MIX, WIDE_MIX, make_mix, with_coarse_predictions
from simulator.workload import Workload, read_workload

RESULTS = Path(__file__).parent / "results" / "policies.json"
BASELINES = ("fcfs", "sjf", "srpt", "las", "fastserve", "laps-sd-paper")
POLICIES = ("laps-sd", "oracle", *BASELINES)
RECORDED = ("specbench_draft68m_poisson", "specbench_draft68m_azure_arrivals", "mtbench_mixed_drafters")
MIXES = {"wide_mix_301": (WIDE_MIX, 301), "chat_mix_302": (CHAT_MIX, 302)}
"""Generated, by seed; nothing was chosen by looking at them."""
SLOTS, LOADS, SWITCHES_MS = (8, 32, 1), (0.9, 1.05, 0.7), (0.5, 5.0, 20.0)
RECORDED_ERRORS = (0.0, 0.3, 0.8, None)
MIX_ERRORS = (0.0, 0.3, 0.6, None)
SEED = 1
LEAST_GAP = 0.02
"""To the oracle, of the best baseline's mean: below it shares mean nothing."""
TOLERANCE = 1.02
"""Ratio of mean latencies up to which a cell counts as dominated."""


@dataclass(frozen=True, slots=True)
class Cell:
    workload: str
    slots: int
    load: float
    switch_ms: float
    error: float | None
    """Log-error of the predicted lengths; None: the file's own."""

    def key(self, policy: str) -> str:
        """Of the run that gives the policy's figures here: cells share runs that cannot differ."""
        kind = {"fcfs": (False, False), "sjf": (False, True), "oracle": (True, False)}
        switches, predicts = kind.get(policy, (True, policy not in ("las", "fastserve")))
        switch = f"{self.switch_ms:g}" if switches else "any"
        error = ("own" if self.error is None else f"{self.error:g}") if predicts else "any"
        return f"{self.workload}/slots {self.slots}/load {self.load:g}/switch {switch}/error {error}/{policy}"


def cells(quick: bool = False) -> Iterator[Cell]:
    for slots in SLOTS:
        for name in (*RECORDED, *MIXES):
            for load in LOADS:
                if quick and (load != 0.9 or slots == 1):
                    continue
                if name in MIXES and load == 0.7:
                    continue
                for switch_ms in SWITCHES_MS:
                    if name in MIXES and switch_ms == 20.0:
                        continue
                    for error in RECORDED_ERRORS if name in RECORDED else MIX_ERRORS:
                        yield Cell(name, slots, load, switch_ms, error)


@cache
def code_of(policy: str) -> str:
    """A hash of the code that decides what a replay under the policy gives. Drivers and records of the
    core are not in it: they keep the replay model, which the tests check."""
    replay = (ROOT / "simulator" / f"{name}.py" for name in ("replay", "prefill", "workload", "mixes"))
    return code_hash([*policy_files(policy), *replay, CORE / "placement.py"])


Results = dict[str, dict[str, Any]]


def load_results() -> Results:
    """The rows of the code as it is now."""
    rows: Results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {key: row for key, row in rows.items() if row.get("code") == code_of(key.rpartition("/")[2])}


def save_results(results: Results) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results)]
    part = RESULTS.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    part.replace(RESULTS)


def workload_of(name: str, data: Path) -> Workload:
    if name in MIXES:
        tasks, seed = MIXES[name]
        return with_coarse_predictions(make_mix(tasks, jobs=2000, seed=seed), seed)
    return read_workload(data / f"{name}.jsonl.gz")


def verdicts(results: Results) -> Iterator[dict[str, Any]]:
    for cell in sorted(
        cells(), key=lambda cell: (cell.workload, cell.slots, cell.load, cell.switch_ms, str(cell.error))
    ):
        runs = {policy: results.get(cell.key(policy)) for policy in POLICIES}
        missing = [policy for policy, figures in runs.items() if figures is None]
        if missing:
            yield {"cell": cell, "missing": missing}
            continue
        means = {policy: figures["mean_latency_s"] for policy, figures in runs.items() if figures}
        best = min(BASELINES, key=means.__getitem__)
        yield {
            "cell": cell,
            "missing": [],
            "means": means,
            "best": best,
            "ratio": means["laps-sd"] / means[best],
            "share": share_of_gap(means["laps-sd"], means[best], means["oracle"]),
            "p99": {policy: figures["p99_latency_s"] for policy, figures in runs.items() if figures},
        }


def share_of_gap(ours_s: float, best_s: float, oracle_s: float) -> float | None:
    """Of the gap from the best other mean latency to the oracle's: what ours closes; None where there is
    hardly one."""
    gap_s = best_s - oracle_s
    return (best_s - ours_s) / gap_s if gap_s > LEAST_GAP * best_s else None


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
