"""Makes workloads of what people have: production traces, and answers of speculative-decoding benchmarks."""

from __future__ import annotations

import csv
import itertools
import json
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from simulator.workload import Job, Workload, WorkloadError, order

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def from_azure(
    lines: Iterable[str],
    *,
    tokens_per_step: float = 2.2,
    draft_tokens: int = 4,
    acceptance: Workload | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Workload:
    """Arrivals and lengths of Azure's LLM inference trace: TIMESTAMP, ContextTokens, GeneratedTokens.

    The trace knows nothing of speculation. The steps of each request follow those of a request drawn from
    `acceptance`, repeated or cut to the length; without it, every drafted token is kept with the one
    probability that gives `tokens_per_step` on average. `limit`: only the first so many requests.
    Raises WorkloadError naming the line that is wrong, ValueError for a mean that drafting cannot give.
    """
    dice = random.Random(seed)
    donors = [job for job in acceptance or () if job.output_tokens]
    kept = 0.0 if donors else _acceptance_for(tokens_per_step, draft_tokens)
    jobs: list[Job] = []
    begin: datetime | None = None
    # A row without output is no request.
    rows = (row for row in _azure_rows(lines) if row[2] > 0)
    for arrival, prompt_tokens, output_tokens in itertools.islice(rows, limit):
        begin = begin or arrival
        if donors:
            steps: Iterator[int] = itertools.cycle(dice.choice(donors).emitted_per_step)
        else:
            steps = _geometric_steps(dice, kept, draft_tokens)
        jobs.append(
            Job(
                (arrival - begin).total_seconds(),
                cut_to(steps, output_tokens),
                max(1, prompt_tokens),
            )
        )
    if not jobs:
        raise WorkloadError("no requests in it")
    first_s = min(job.arrival_s for job in jobs)
    return order(Job(job.arrival_s - first_s, job.emitted_per_step, job.prompt_tokens) for job in jobs)


def _azure_rows(lines: Iterable[str]) -> Iterator[tuple[datetime, int, int]]:
    """Arrival, tokens of the prompt and of the output."""
    reader = csv.DictReader(lines)
    try:
        if any(column not in (reader.fieldnames or ()) for column in _AZURE_COLUMNS):
            raise WorkloadError(f"the first line must name the columns {', '.join(_AZURE_COLUMNS)}")
        for row in reader:
            yield _instant(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])
    except (UnicodeDecodeError, WorkloadError):
        raise
    except (TypeError, ValueError, csv.Error) as error:
        # The inner reader's: DictReader counts a line only once it has been read well.
        raise WorkloadError(f"line {reader.reader.line_num}: {error}") from error


def _instant(text: str | None) -> datetime:
    """With or without fractions of a second (beyond microseconds they are cut) and a zone; without one, UTC.
    The published traces differ in both, also from line to line."""
    try:
        instant = datetime.fromisoformat((text or "").strip())
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except (OverflowError, ValueError):
        raise ValueError(f"TIMESTAMP must be a date and a time, not {(text or '')[:40]!r}") from None


def from_spec_bench(
    lines: Iterable[str],
    *,
    accepted_only: bool = False,
    seed: int = 0,
    warn: Callable[[str], None] = lambda message: None,
) -> Workload:
    """Requests of a Spec-Bench answer file, a question a line, its `choices` with `accept_lengths`: tokens
    emitted by each target pass. `accepted_only`: they count accepted tokens, without the one that the
    target adds. A question's turns become requests where `new_tokens` or `decoding_steps` tells them apart;
    `warn` hears of those that nothing tells apart. The file has no arrivals: they are Poisson, one a second,
    in random order; `laps simulate` rescales them.
    Raises WorkloadError naming the line that is wrong.
    """
    dice = random.Random(seed)
    found: list[tuple[str, tuple[int, ...]]] = []
    merged = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            task = str(entry.get("category", ""))
            for choice in entry["choices"]:
                lengths = [int(length) for length in choice["accept_lengths"]]
                if min(lengths, default=0) < 0:
                    raise ValueError("accept_lengths must be at least 0")
                lengths = [length + accepted_only for length in lengths]
                turns = _turns(lengths, choice)
                if turns is None:
                    merged += 1
                    turns = [lengths]
                for emitted in turns:
                    if sum(emitted) > 0:
                        found.append((task, tuple(emitted)))
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise WorkloadError(f"line {number}: {type(error).__name__}: {error}") from error
    if not found:
        raise WorkloadError("no requests in it")
    if merged:
        warn(
            f"{merged} answers of several turns became one request each: "
            "neither new_tokens nor decoding_steps tells their turns apart"
        )
    dice.shuffle(found)
    now_s = 0.0
    jobs = []
    for task, steps in found:
        jobs.append(Job(now_s, steps, task=task))
        now_s += dice.expovariate(1.0)
    return order(jobs)


def _turns(lengths: list[int], choice: dict[str, Any]) -> list[list[int]] | None:
    """The steps of each turn; None: there are several, and nothing tells them apart.

    What is written of a turn's steps depends on the method: their number, the index of the last one (EAGLE,
    Medusa; `idxs` in older files), or a number of tokens (PLD). So its tokens count for more.
    """
    steps = _counts(choice.get("decoding_steps", choice.get("idxs")))
    tokens = _counts(choice.get("new_tokens"))
    texts = choice.get("turns")
    if max(len(texts) if isinstance(texts, list) else 0, len(steps), len(tokens)) < 2:
        return [lengths]
    by_steps = [
        _cut(lengths, counts)
        for counts in (steps, [count + 1 for count in steps])
        if counts and sum(counts) == len(lengths)
    ]
    for turns in by_steps:
        if [sum(turn) for turn in turns] == tokens:
            return turns
    ends = list(itertools.accumulate(lengths))
    wanted = list(itertools.accumulate(tokens))
    if wanted and ends and wanted[-1] == ends[-1] and set(wanted) <= {0, *ends}:
        # Steps that emitted nothing begin the next turn, and end the last one.
        begins = [0, *(bisect_left(ends, end) + 1 if end else 0 for end in wanted[:-1]), len(lengths)]
        return [lengths[begin:end] for begin, end in itertools.pairwise(begins)]
    return by_steps[0] if by_steps else None


def _counts(value: object) -> list[int]:
    """Empty: these are none."""
    if isinstance(value, list) and all(type(count) is int and count >= 0 for count in value):
        return value
    return []


def _cut(lengths: list[int], counts: list[int]) -> list[list[int]]:
    left = iter(lengths)
    return [list(itertools.islice(left, count)) for count in counts]


def cut_to(steps: Iterable[int], output_tokens: int) -> tuple[int, ...]:
    """The first steps that emit so many tokens in all; the last one is cut. `steps` must suffice."""
    left = output_tokens
    emitted = []
    for count in steps:
        emitted.append(min(count, left))
        left -= emitted[-1]
        if not left:
            break
    return tuple(emitted)


def _geometric_steps(dice: random.Random, kept: float, draft_tokens: int) -> Iterator[int]:
    while True:
        accepted = 0
        while accepted < draft_tokens and dice.random() < kept:
            accepted += 1
        yield accepted + 1


def _acceptance_for(tokens_per_step: float, draft_tokens: int) -> float:
    """Solves `1 + p + p**2 + ... + p**draft_tokens = tokens_per_step` (Leviathan et al., 2023) for p."""
    if not 1.0 <= tokens_per_step <= draft_tokens + 1.0:
        raise ValueError(
            f"tokens per step must lie between 1 and {draft_tokens + 1} with {draft_tokens} draft tokens"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(middle**power for power in range(draft_tokens + 1)) < tokens_per_step:
            low = middle
        else:
            high = middle
    return high
