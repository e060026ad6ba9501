"""How a simulated worker computes prompts: as the engine does it, see `worker_svc/engine/prefill.py`."""

from __future__ import annotations

import math
from typing import Protocol

SHARE = 0.7
"""Of a step that others decode in, what prefill may take beside it; more where more requests wait for their
prefill than for their next token: so many times as many."""
LEAST_TOKENS = 16
"""The first prompt gets on by so many tokens a step, whatever that takes."""


def prompt_left(prompt_tokens: int, cached_tokens: int) -> int:
    """Tokens of a new prompt that are to be computed: its last one is fed by the first step."""
    return max(0, prompt_tokens - 1 - cached_tokens)


class Prompted(Protocol):
    """Whoever enters a slot."""

    prompt_left: int
    """Tokens of its prompt that are still to be computed."""


class Prefill:
    """The requests in slots whose prompts are not computed yet, in order of entry."""

    def __init__(self, token_s: float) -> None:
        """`token_s` 0: prompts cost nothing."""
        self._token_s = token_s
        self._waiting: list[Prompted] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, entry: object) -> bool:
        return entry in self._waiting

    def enter(self, entry: Prompted) -> None:
        if self._token_s and entry.prompt_left:
            self._waiting.append(entry)

    def leave(self, entry: Prompted) -> None:
        """It may come back and goes on where it was."""
        if entry in self._waiting:
            self._waiting.remove(entry)

    def compute(self, decoding: int, step_s: float) -> float:
        """What the next step computes of prompts, in seconds, beside `decoding` requests that decode, which
        takes `step_s`."""
        limit_s = math.inf
        if decoding:
            limit_s = SHARE * max(1.0, len(self._waiting) / decoding) * step_s
        seconds = 0.0
        for place, entry in enumerate(self._waiting):
            tokens = entry.prompt_left
            if decoding:
                # A whole number of tokens is not to be missed by rounding.
                affordable = int((limit_s - seconds) / self._token_s + 1e-9)
                tokens = min(tokens, max(affordable, LEAST_TOKENS if place == 0 else 0))
            if tokens <= 0:
                break
            entry.prompt_left -= tokens
            seconds += tokens * self._token_s
        self._waiting = [entry for entry in self._waiting if entry.prompt_left]
        return seconds
