"""What the end of a process's log says, in one line for a person."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from typing import Any

REASON_FIELDS = ("error", "because", "why")
"""Of a logged event: the first of these that it has says more than its name."""
_TROUBLE = frozenset({"warning", "error", "critical"})
_STORE_LINE = re.compile(r"^\d+:\w \d+ \w+ \d+ [\d:.]+ (?P<level>[-.*#]) (?P<text>.*)")
"""Process, time and level in a line of Valkey's or Redis's log; # is a warning."""


def explain(lines: Sequence[str]) -> str:
    """The last of a log's lines that tells of trouble; empty: none does.

    That is an event from "warning" on, or a line that is no event: what a service says as it ends, the end of
    a traceback, a library's complaint.
    """
    for line in reversed(lines):
        if not line.strip():
            continue
        event = read_event(line)
        if event is not None:
            if event.get("level") in _TROUBLE:
                return sentence(event)
        elif (stored := _STORE_LINE.match(line)) is None:
            return " ".join(line.split())
        elif stored["level"] == "#":
            return stored["text"]
    return ""


def read_event(line: str) -> dict[str, Any] | None:
    """A line of our logs; None: it is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def sentence(event: dict[str, Any]) -> str:
    """What happened, and why."""
    reason = next((event[name] for name in REASON_FIELDS if event.get(name)), "")
    return " ".join(f"{event['event']}: {reason}".removesuffix(": ").split())


def describe_exit(code: int) -> str:
    """An exit code as asyncio and subprocess give it: negative is a signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
