"""Bounded log files of processes that write into a descriptor which somebody else has opened for them.

As logrotate's `copytruncate` does it: a file that has grown past the bound is copied to NAME.1 and emptied.
Its writer keeps its descriptor, and nothing has to stop or be told; whatever it writes (a line, a traceback,
what a library prints while the process crashes) is bounded alike. Descriptors must be opened for appending.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MAX_LOG_BYTES = 16 << 20
"""A log that is larger moves to NAME.1, over what was there."""
INTERVAL_S = 1.0
"""Between two looks: a log is longer by what comes in this time."""


def older(path: Path) -> Path:
    """Where the lines before those in `path` are."""
    return path.with_name(path.name + ".1")


def bound(path: Path) -> bool:
    """Moves what `path` holds to `older(path)` if that is more than `MAX_LOG_BYTES`. True: it did.

    What is written in the moment between copying and emptying is lost, as with every copytruncate. Raises
    OSError, for example when the disk is full.
    """
    try:
        if path.stat().st_size <= MAX_LOG_BYTES:
            return False
        # Under another name first: a crash in the midst of it leaves the older log whole.
        part = path.with_name(path.name + ".part")
        with path.open("rb") as log, part.open("wb") as copy:
            shutil.copyfileobj(log, copy, 1 << 20)
            os.truncate(path, 0)
        part.replace(older(path))
    except FileNotFoundError:
        return False
    return True
