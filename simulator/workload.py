"""Workload files: requests with their arrivals and their recorded steps.

JSON Lines, `.gz` or not, a request a line: `{"arrival_s": 12.5, "prompt_tokens": 120,
"emitted_per_step": [3, 1, 5], "task": "qa", "predicted_output_tokens": 140.0, "cached_tokens": 64}`; the last
three are optional.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


class WorkloadError(ValueError):
    """A workload that cannot be used; the message names the file and line."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload."""

    arrival_s: float
    emitted_per_step: tuple[int, ...]
    """Tokens emitted by each step; 0 is a step too."""
    prompt_tokens: int = 1
    task: str = ""
    predicted_output_tokens: float | None = None
    cached_tokens: int = 0
    """Of the prompt: those whose KV cache was there already, and cost no prefill."""

    @property
    def output_tokens(self) -> int:
        return sum(self.emitted_per_step)

    @property
    def steps(self) -> int:
        """Verification passes of the target."""
        return len(self.emitted_per_step)


Workload = tuple[Job, ...]
"""In order of arrival; jobs that arrive together stay in the order of the file."""


def read_workload(path: str | Path) -> Workload:
    """Reads a workload file. Raises WorkloadError naming the first line that is wrong, OSError where
    it cannot be opened."""
    path = Path(path)
    jobs = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        jobs.append(_job(json.loads(line)))
                    except (ValueError, TypeError, KeyError) as error:
                        raise WorkloadError(f"{path}:{number}: {error}") from error
    except (gzip.BadGzipFile, UnicodeDecodeError, EOFError) as error:
        raise WorkloadError(f"{path}: {error}") from error
    if not jobs:
        raise WorkloadError(f"{path}: no requests in it")
    return order(jobs)


def write_workload(path: str | Path, workload: Workload) -> None:
    """Writes a workload file, gzip where the name ends in .gz. Same jobs, same bytes."""
    lines = []
    for job in workload:
        entry: dict[str, Any] = {
            "arrival_s": round(job.arrival_s, 6),
            "prompt_tokens": job.prompt_tokens,
            "emitted_per_step": list(job.emitted_per_step),
        }
        if job.task:
            entry["task"] = job.task
        if job.predicted_output_tokens is not None:
            entry["predicted_output_tokens"] = job.predicted_output_tokens
        if job.cached_tokens:
            entry["cached_tokens"] = job.cached_tokens
        lines.append(json.dumps(entry, separators=(",", ":")) + "\n")
    data = "".join(lines).encode()
    Path(path).write_bytes(gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def _job(entry: Any) -> Job:
    if not isinstance(entry, dict):
        raise ValueError("a line must be a JSON object")
    missing = {"arrival_s", "emitted_per_step"} - entry.keys()
    if missing:
        raise ValueError(f"{sorted(missing)[0]} is missing")
    emitted = entry["emitted_per_step"]
    if not isinstance(emitted, list) or not emitted:
        raise ValueError("emitted_per_step must be a list of at least one count")
    if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in emitted):
        raise ValueError("emitted_per_step must hold whole numbers of at least 0")
    arrival_s = float(entry["arrival_s"])
    predicted = entry.get("predicted_output_tokens")
    predicted = None if predicted is None else float(predicted)
    if not (math.isfinite(arrival_s) and arrival_s >= 0.0):
        raise ValueError("arrival_s must be a number of at least 0")
    if predicted is not None and not (math.isfinite(predicted) and predicted >= 0.0):
        raise ValueError("predicted_output_tokens must be a number of at least 0")
    return Job(
        arrival_s=arrival_s,
        emitted_per_step=tuple(emitted),
        prompt_tokens=max(1, int(entry.get("prompt_tokens", 1))),
        task=str(entry.get("task", "")),
        predicted_output_tokens=predicted,
        cached_tokens=max(0, int(entry.get("cached_tokens", 0))),
    )


def order(jobs: Iterable[Job]) -> Workload:
    """By arrival; the sort is stable."""
    return tuple(sorted(jobs, key=lambda job: job.arrival_s))


def rescale(workload: Workload, slots: int, load: float, step_s: float) -> Workload:
    """Stretches the arrivals linearly so that `sum of all steps * step_s / (slots * span of arrivals)`
    is `load`. Raises WorkloadError when all arrive at one instant."""
    span_s = workload[-1].arrival_s - workload[0].arrival_s
    if span_s <= 0.0:
        raise WorkloadError("all requests arrive at the same instant: there is no load to rescale to")
    work_s = sum(job.steps for job in workload) * step_s
    factor = work_s / (slots * load * span_s)
    return tuple(replace(job, arrival_s=job.arrival_s * factor) for job in workload)


def with_length_error(workload: Workload, log_error: float, seed: int) -> Workload:
    """Replaces the predicted lengths by the true ones times exp(log_error * N(0, 1)): 0 is exact."""
    noise = random.Random(seed)
    return tuple(
        replace(
            job, predicted_output_tokens=max(1.0, job.output_tokens * math.exp(log_error * noise.gauss(0, 1)))
        )
        for job in workload
    )
