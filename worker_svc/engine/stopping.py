"""When an output ends, judged token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .config import StoppingConfig
from .results import FinishReason

_REPLACEMENT = "\ufffd"
# At least so many tokens before the unread ones are decoded with them, since many tokenizers write a leading
# space by context. With more than the second number the oldest go.
_CONTEXT_TOKENS = 6
_LONGEST_CONTEXT_TOKENS = 12
# A character of UTF-8 is spread over so many tokens at most.
_CHARACTER_TOKENS = 4
# What is incomplete after so many tokens will stay so.
_MAX_UNREAD_TOKENS = 16


class _TextTail:
    """Detokenizes incrementally and keeps only as many characters as a stop string could still need.

    What is decoded begins with a whole character: where bytes are tokens, a broken character may make all
    bytes that follow it unreadable.
    """

    def __init__(
        self, tokenizer: Any, stops: tuple[str, ...], prompt: Sequence[int], output: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._keep_chars = max(len(stop) for stop in stops) - 1
        self._tail = self._known = ""
        self._ids: list[int] = []
        self._known_tokens = 0
        # How many of the known tokens were read at once: a cut between two chunks breaks no character.
        self._chunks: list[int] = []
        tail_tokens = _CHARACTER_TOKENS * self._keep_chars
        while not self._begin(prompt, output, tail_tokens):
            tail_tokens *= 2

    def push(self, token_id: int) -> str | None:
        """Adds a token; returns the stop string that it completes, the one that ends first if there are
        several.
        """
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # Not for ever: each token would cost more than the one before it.
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._known_tokens < _MAX_UNREAD_TOKENS:
            return None
        fresh = text[len(self._known) :]
        self._advance(text)
        tail_chars = len(self._tail)
        window = self._tail + fresh
        self._tail = self._last_chars(window)
        ends = []
        for stop in self._stops:
            # One that ended before was reported then; it may have been too early to count.
            begin = window.find(stop, max(0, tail_chars - len(stop) + 1))
            if begin >= 0:
                ends.append((begin + len(stop), stop))
        return min(ends)[1] if ends else None

    def _begin(self, prompt: Sequence[int], output: Sequence[int], tail_tokens: int) -> bool:
        """Reads the last `tail_tokens` of the output. False: their text is shorter than what must be kept."""
        cut = max(0, len(output) - tail_tokens)
        reach = _CONTEXT_TOKENS + _CHARACTER_TOKENS
        before = [*prompt[-reach:], *output[max(0, cut - reach) : cut]][-reach:]
        ids = [*before, *output[cut:]]
        begin = self._whole_from(ids, len(before) - _CONTEXT_TOKENS)
        ids = ids[begin:]
        start = self._whole_to(ids, len(before) - begin, _CHARACTER_TOKENS)
        end = self._whole_to(ids, len(ids), _MAX_UNREAD_TOKENS)
        text = self._decode(ids[:end])[len(self._decode(ids[:start])) :]
        self._tail = self._last_chars(text)
        begin = self._whole_from(ids, end - _CONTEXT_TOKENS)
        self._ids = ids[begin:]
        self._known_tokens = end - begin
        self._known = self._decode(ids[begin:end])
        self._chunks = [self._known_tokens]
        return cut == 0 or len(text) >= self._keep_chars

    def _advance(self, text: str) -> None:
        self._known = text
        self._chunks.append(len(self._ids) - self._known_tokens)
        if len(self._ids) > _LONGEST_CONTEXT_TOKENS:
            while len(self._ids) - self._chunks[0] >= _CONTEXT_TOKENS:
                del self._ids[: self._chunks.pop(0)]
            self._known = self._decode(self._ids)
        self._known_tokens = len(self._ids)

    def _last_chars(self, text: str) -> str:
        return text[-self._keep_chars :] if self._keep_chars else ""

    def _whole_from(self, ids: list[int], position: int) -> int:
        """The last position up to this one at which a character begins, if there is one near by."""
        position = max(0, position)
        for begin in range(position, max(-1, position - _CHARACTER_TOKENS), -1):
            for end in range(begin + 1, begin + 1 + _CHARACTER_TOKENS):
                if not self._decode(ids[begin:end]).startswith(_REPLACEMENT):
                    return begin
        return position

    def _whole_to(self, ids: list[int], position: int, within_tokens: int) -> int:
        """The last position up to this one at which a character ends, if there is one so near."""
        for end in range(position, max(-1, position - within_tokens), -1):
            if not self._decode(ids[:end]).endswith(_REPLACEMENT):
                return end
        return position

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
        self.count = len(output_token_ids)
        self._text: _TextTail | None = None
        if stopping.stop:
            self._text = _TextTail(tokenizer, stopping.stop, prompt_token_ids, output_token_ids)

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
