"""The demonstration's burst: its prompts, and what became of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laps.client.requests import GenerateOptions, Prompt
from laps.client.results import Completion, Snapshot
from laps.errors import LocalError

AT_ONCE = 24
"""Requests of the first burst; the others come one by one while it is being served."""


class DemoError(LocalError):
    """The demonstration cannot run. One line."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt of the burst."""

    number: int
    kind: str
    prompt: Prompt
    max_tokens: int
    streamed: bool = False
    """Shown token by token."""

    @property
    def request_id(self) -> str:
        return f"{self.kind}-{self.number:02}"

    def options(self) -> GenerateOptions:
        options: GenerateOptions = {
            "request_id": self.request_id,
            "max_tokens": self.max_tokens,
            "request_class": self.kind,
        }
        if self.streamed:
            # Somebody is watching this one: it goes before the others.
            options["priority"] = 1
        if self.number % 3 == 2:
            # Every third one is sampled; the seed makes the demonstration repeat itself.
            options |= {"temperature": 0.8, "top_p": 0.95, "seed": self.number}
        return options


@dataclass(slots=True)
class Served:
    """A request as its client saw it."""

    item: Item
    latency_s: float
    first_token_s: float
    completion: Completion


@dataclass
class Burst:
    """The run as it is: filled by the clients, read by the view."""

    items: Sequence[Item]
    served: list[Served] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    streamed: str = ""
    snapshot: Snapshot | None = None

    @property
    def shown(self) -> Item:
        return next(item for item in self.items if item.streamed)

    @property
    def finished(self) -> bool:
        return len(self.served) + len(self.failed) == len(self.items)


def load_items(path: Path) -> list[Item]:
    """The prompts of the burst. Raises DemoError if the file is not there."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DemoError(f"the demonstration's prompts cannot be read: {error}") from None
    records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    longest = max(range(AT_ONCE), key=lambda number: records[number]["max_tokens"])
    return [
        Item(
            number,
            record["kind"],
            record.get("text") or record["messages"],
            record["max_tokens"],
            streamed=number == longest,
        )
        for number, record in enumerate(records)
    ]
