"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.tokenizer import Tokenizer
from laps.v1 import generation_pb2

LEAST = -9999.0
"""What OpenAI gives for a probability of zero, whose logarithm JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One output token."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]
    offset_chars: int
    """Where its text begins in the output."""


class Entries:
    """Reads the tokens of one output, in order."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """`before`: the prompt's last tokens."""
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder(before)
        self._chars = 0

    def read(self, chunk: generation_pb2.Chunk) -> list[Entry]:
        return [
            self._read(token_id, logprob)
            for token_id, logprob in zip(chunk.token_ids, chunk.logprobs, strict=False)
        ]

    def _read(self, token_id: int, given: generation_pb2.TokenLogprob) -> Entry:
        offset_chars = self._chars
        self._chars += len(self._decoder.push(token_id))
        top = [(self._tokenizer.token_bytes(each.token_id), _finite(each.logprob)) for each in given.top]
        return Entry(self._tokenizer.token_bytes(token_id), _finite(given.logprob), top, offset_chars)


def for_chat(entries: Iterable[Entry]) -> dict[str, Any]:
    content = [
        _named(entry.token, entry.logprob)
        | {"top_logprobs": [_named(token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def for_completions(entries: Iterable[Entry]) -> dict[str, Any]:
    entries = list(entries)
    tops = [{_escaped(token): logprob for token, logprob in entry.top} for entry in entries]
    return {
        "tokens": [_escaped(entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": [entry.offset_chars for entry in entries],
    }


def _named(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


def _escaped(token: bytes) -> str:
    """As the completions endpoint writes what is no whole character: `bytes:\\xe6\\x97`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST) if math.isfinite(logprob) else LEAST
