"""Workloads made from a seed, for tests and for questions that recorded ones do not answer."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from simulator.workload import Job, Workload


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of request. Lengths are log-normal, acceptance is beta-distributed over requests and geometric
    within a step."""

    name: str
    share: float
    median_output_tokens: float
    length_log_sd: float
    acceptance: float
    """Mean probability that the target keeps a drafted token."""
    acceptance_sd: float = 0.05


WIDE_MIX = (
    Task("code_edit", 0.25, 320.0, 0.7, 0.92, 0.03),
    Task("chat", 0.35, 220.0, 0.8, 0.60, 0.08),
    Task("translation", 0.20, 80.0, 0.5, 0.30, 0.08),
    Task("reasoning", 0.20, 700.0, 0.6, 0.72, 0.06),
)
"""Tasks whose acceptance differs widely. Invented, in the range of published acceptance by task."""

CHAT_MIX = (
    Task("chat", 0.75, 175.0, 1.0, 0.45, 0.10),
    Task("summary", 0.25, 120.0, 0.4, 0.50, 0.07),
)
"""Long tails, and little that acceptance could tell: what a public chat service sees. Invented."""


def make_mix(
    tasks: tuple[Task, ...] = WIDE_MIX,
    jobs: int = 2000,
    seed: int = 0,
    draft_tokens: int = 4,
    length_error: float = 0.0,
) -> Workload:
    """Poisson arrivals of rate 1/s (to be rescaled), tasks by their shares, predictions with a log-error."""
    dice = random.Random(seed)
    made = []
    now_s = 0.0
    for _ in range(jobs):
        now_s += dice.expovariate(1.0)
        task = dice.choices(tasks, [task.share for task in tasks])[0]
        length = max(4, round(task.median_output_tokens * math.exp(task.length_log_sd * dice.gauss(0, 1))))
        kept = min(0.98, max(0.02, dice.gauss(task.acceptance, task.acceptance_sd)))
        emitted: list[int] = []
        left = length
        while left > 0:
            accepted = 0
            while accepted < draft_tokens and dice.random() < kept:
                accepted += 1
            emitted.append(min(left, accepted + 1))
            left -= emitted[-1]
        predicted = max(1.0, length * math.exp(length_error * dice.gauss(0, 1)))
        made.append(Job(now_s, tuple(emitted), dice.randint(20, 1500), task.name, predicted))
    return tuple(made)


def with_coarse_predictions(workload: Workload, seed: int, log_error: float = 0.7) -> Workload:
    """Predictions of a classifier that is blind to the task: three classes of equal size by a length that
    it misjudges by `log_error`; the prediction is the class's mean length."""
    dice = random.Random(seed)
    judged = [job.output_tokens * math.exp(log_error * dice.gauss(0, 1)) for job in workload]
    ordered = sorted(judged)
    bounds = [ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3]]
    classes = [sum(length >= bound for bound in bounds) for length in judged]
    means = []
    for kind in range(3):
        lengths = [job.output_tokens for job, found in zip(workload, classes, strict=True) if found == kind]
        means.append(sum(lengths) / max(1, len(lengths)))
    return tuple(
        replace(job, predicted_output_tokens=means[kind]) for job, kind in zip(workload, classes, strict=True)
    )
