"""Tokens to text, one token at a time.

A decoder gives out a character when its last byte is there. Joined, its texts are the decode of
all its tokens; where a byte sequence can never become a character, U+FFFD stands for it.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer as BackendTokenizer

REPLACEMENT = "\ufffd"

_WINDOW_TOKENS = 6
"""At least so many tokens before the unread ones are decoded with them: many tokenizers space words by what
precedes."""
_LONGEST_WINDOW_TOKENS = 12
"""With more the oldest go. Not with each token: what is left has to be decoded anew."""
_CHARACTER_TOKENS = 4
"""A character is spread over so many tokens at most."""
CONTEXT_TOKENS = _WINDOW_TOKENS + _CHARACTER_TOKENS
"""Of what precedes an output."""
_MAX_PENDING_TOKENS = 16
"""Longer than any character's bytes: what is incomplete after so many tokens will stay so."""


class TextDecoder(Protocol):
    """The text of one output, in order."""

    @property
    def pending(self) -> bool:
        """Whether the last token ends inside a character."""

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""

    def push_whole(self, token_ids: Sequence[int]) -> str | None:
        """The text of several tokens at once, where nothing is pending before, between or after their
        characters. None, and nothing is taken: push them one at a time."""

    def flush(self) -> str:
        """What stands for an incomplete character at the end of the output."""


class ByteLevelDecoder:
    """For byte-level BPE: every token is a fixed string of bytes, so decoding costs O(1) per token."""

    __slots__ = ("_decode", "_token_bytes", "pending")

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self.pending = False

    def push(self, token_id: int) -> str:
        raw = self._token_bytes[token_id]
        if not raw:
            return ""
        text = self._decode.decode(raw)
        self.pending = bool(self._decode.getstate()[0])
        return text

    def push_whole(self, token_ids: Sequence[int]) -> str | None:
        if self.pending:
            return None
        try:
            return b"".join(map(self._token_bytes.__getitem__, token_ids)).decode()
        except UnicodeDecodeError:
            return None

    def flush(self) -> str:
        self.pending = False
        return self._decode.decode(b"", final=True)


class TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, filled in as they are asked for.

    Special tokens and ids without a token have no text.
    """

    def __init__(self, backend: BackendTokenizer) -> None:
        super().__init__()
        self._backend = backend
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._backend.id_to_token(token_id)
        raw = self[token_id] = b"" if token is None else token_to_bytes(token)
        return raw


def token_to_bytes(token: str) -> bytes:
    """A byte-level token's bytes. Added tokens are plain text: a character outside the alphabet tells."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's mapping: printable bytes stand for themselves, the others for the code points from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


class WindowDecoder:
    """For any other tokenizer: decodes each token together with a few before it and takes what is new.

    Those before begin with a whole character: where bytes are tokens, a broken character may make all bytes
    that follow it unreadable.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """`before`: the last tokens of what the output follows, its prompt's."""
        self._decode = decode
        self._ids = list(before[-CONTEXT_TOKENS:])
        del self._ids[: self._whole_from()]
        known_tokens = self._known_tokens = self._whole_to(len(self._ids))
        """Of `_ids`, those whose text has been given out or is not the output's."""
        self._known = decode(self._ids[:known_tokens])
        self._chunks = [known_tokens]
        """How many of the known tokens each advance took; a cut between two of them breaks no character."""
        self._pushed = False

    def _whole_from(self) -> int:
        """The first position at which a character begins, if there is one so near."""
        for begin in range(min(_CHARACTER_TOKENS, len(self._ids))):
            for end in range(begin + 1, begin + 1 + _CHARACTER_TOKENS):
                if not self._decode(self._ids[begin:end]).startswith(REPLACEMENT):
                    return begin
        return 0

    def _whole_to(self, position: int) -> int:
        """The last position up to this one at which a character ends, if there is one so near."""
        for end in range(position, max(-1, position - _CHARACTER_TOKENS), -1):
            if not self._decode(self._ids[:end]).endswith(REPLACEMENT):
                return end
        return position

    @property
    def pending(self) -> bool:
        # A prompt that ends inside a character leaves it to the output to complete it.
        return self._pushed and self._known_tokens < len(self._ids)

    def push(self, token_id: int) -> str:
        self._pushed = True
        self._ids.append(token_id)
        text = self._decode(self._ids)
        unread = len(self._ids) - self._known_tokens
        if text.endswith(REPLACEMENT) and unread < _MAX_PENDING_TOKENS:
            return ""
        return self._advance(text)

    def push_whole(self, token_ids: Sequence[int]) -> str | None:
        return None  # the text of a token depends on those before it

    def flush(self) -> str:
        return self._advance(self._decode(self._ids)) if self.pending else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._known) :]
        self._known = text
        self._chunks.append(len(self._ids) - self._known_tokens)
        if len(self._ids) > _LONGEST_WINDOW_TOKENS:
            while len(self._ids) - self._chunks[0] >= _WINDOW_TOKENS:
                del self._ids[: self._chunks.pop(0)]
            self._known = self._decode(self._ids)
        self._known_tokens = len(self._ids)
        return new
