"""When an output ends, judged token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .config import StoppingConfig
from .results import FinishReason

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
# Longer than any character's bytes: what is incomplete after so many tokens will stay so.
_MAX_UNREAD_TOKENS = 16


class _TextTail:
    """Detokenizes incrementally and keeps only as many characters as a stop string could still need."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._keep_chars = max(len(stop) for stop in stops) - 1
        self._tail = ""
        # Tokens before the unread ones are decoded with them, since many tokenizers write a leading space by
        # context.
        self._ids = list(context)[-_CONTEXT_TOKENS:]
        self._read_from = len(self._ids)

    def push(self, token_id: int) -> str | None:
        """Adds a token; returns the stop string that it completes, the one that ends first if there are
        several.
        """
        self._ids.append(token_id)
        known = self._decode(self._ids[: self._read_from])
        text = self._decode(self._ids)
        # Not for ever: each token would cost more than the one before it.
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._read_from < _MAX_UNREAD_TOKENS:
            return None
        fresh = text[len(known) :]
        self._ids = self._ids[-_CONTEXT_TOKENS:]
        self._read_from = len(self._ids)
        tail_chars = len(self._tail)
        window = self._tail + fresh
        self._tail = window[-self._keep_chars :] if self._keep_chars else ""
        ends = []
        for stop in self._stops:
            # One that ended before was reported then; it may have been too early to count.
            begin = window.find(stop, max(0, tail_chars - len(stop) + 1))
            if begin >= 0:
                ends.append((begin + len(stop), stop))
        return min(ends)[1] if ends else None

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopChecker:
    """Decides after each emitted token whether the request ends; holds the text that stop strings may span.

    limit_tokens: output tokens at which the request ends with LENGTH (max_tokens, or what the context
    leaves).
    """

    def __init__(
        self,
        stopping: StoppingConfig,
        eos_token_ids: Iterable[int],
        limit_tokens: int,
        tokenizer: Any,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
    ) -> None:
        eos = () if stopping.ignore_eos else tuple(eos_token_ids)
        self.end_token_ids = frozenset(eos) | frozenset(stopping.stop_token_ids)
        self.limit_tokens = limit_tokens
        self.min_tokens = stopping.min_tokens
        self.count = 0
        self._text = _TextTail(tokenizer, stopping.stop, prompt_token_ids) if stopping.stop else None
        for token_id in output_token_ids:
            self.push(token_id)

    def push(self, token_id: int) -> tuple[FinishReason | None, str | int | None]:
        """Takes the next output token; returns the reason, if it ends the request, and what matched."""
        self.count += 1
        matched = self._text.push(token_id) if self._text is not None else None
        if self.count >= self.min_tokens:
            if token_id in self.end_token_ids:
                return FinishReason.STOP, token_id
            if matched is not None:
                return FinishReason.STOP, matched
        if self.count >= self.limit_tokens:
            return FinishReason.LENGTH, None
        return None, None
