"""Files that people bring: what is wrong with one is a WorkloadError that names it.

Not in workload.py: the rows of bench/results/policies.json carry a hash of that file, and how a complaint
reads decides none of them.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from scheduler_svc.core.records import MAX_DRAFTED_TOKENS
from simulator.workload import Job, Workload, WorkloadError, _job, read_workload


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, unpacked where its name ends in .gz, without the byte order mark that spreadsheets write.
    Errors of its contents, also those that the block raises, name the file."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as lines:
            yield lines
    except (WorkloadError, csv.Error, EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise WorkloadError(f"{path}: {error}") from error


def read_workload_file(path: Path) -> Workload:
    """As read_workload, with the first arrival at 0, and WorkloadError also for damaged compression and
    numbers beyond any use."""
    try:
        jobs = read_workload(path)
    except zlib.error as error:
        raise WorkloadError(f"{path}: {error}") from error
    except (OverflowError, RecursionError) as error:
        raise WorkloadError(f"{path}:{_first_line(path, lambda job: False)}: {error}") from error
    if any(_too_long(job) for job in jobs):
        raise WorkloadError(
            f"{path}:{_first_line(path, _too_long)}: emitted_per_step: "
            f"a step emits {MAX_DRAFTED_TOKENS + 1} tokens at most"
        )
    # Times of a log may be seconds since 1970: stretched to a load they would lie beyond what a replay knows.
    first_s = jobs[0].arrival_s
    return tuple(replace(job, arrival_s=job.arrival_s - first_s) for job in jobs)


def _too_long(job: Job) -> bool:
    """The scheduler believes no step that emitted more than it may draft and the target's own token."""
    return max(job.emitted_per_step) > MAX_DRAFTED_TOKENS + 1


def _first_line(path: Path, wrong: Callable[[Job], bool]) -> int:
    """The first one that is wrong, or cannot be read at all."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and wrong(_job(json.loads(line))):
                    return number
            except (OverflowError, RecursionError):
                return number
    raise AssertionError("the file changed while it was read")
