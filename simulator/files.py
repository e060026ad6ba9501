"""Files that people bring: what is wrong with one is a WorkloadError that names it.

Not in workload.py: the rows of bench/results/policies.json carry a hash of that file, and how a complaint
reads decides none of them.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from simulator.workload import Workload, WorkloadError, _job, read_workload


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
        raise WorkloadError(f"{path}:{_first_impossible(path)}: {error}") from error
    # Times of a log may be seconds since 1970: stretched to a load they would lie beyond what a replay knows.
    first_s = jobs[0].arrival_s
    return tuple(replace(job, arrival_s=job.arrival_s - first_s) for job in jobs)


def _first_impossible(path: Path) -> int:
    """The line at which reading ended so."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    _job(json.loads(line))
            except (OverflowError, RecursionError):
                return number
    raise AssertionError("the file changed while it was read")
