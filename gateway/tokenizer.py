"""The target model's tokenizer: prompts to token ids, token ids to text."""

from __future__ import annotations

import asyncio
import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from gateway.chat import ChatTemplate
from gateway.text_decoding import (
    CONTEXT_TOKENS,
    ByteLevelDecoder,
    TextDecoder,
    TokenBytes,
    WindowDecoder,
    token_to_bytes,
)
from laps.errors import LocalError

_OFF_LOOP_CHARS = 8_192
"""Longer prompts are tokenized on a thread: from here on it takes longer than a millisecond."""
_MAX_TOKENIZING = 4
"""Prompts tokenized at a time; more wait. Each costs a core."""

_PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Tokenizer classes that are tokenizer.json and nothing else. Loading that file alone takes
milliseconds, where importing transformers takes seconds."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenizerError(LocalError):
    """The target's folder holds no tokenizer that we can use."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model's configuration says. 0: it does not."""

    vocabulary_size: int = 0
    context_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()


class Tokenizer:
    """Made by `load_tokenizer`. Safe to use from several threads."""

    def __init__(self, backend: BackendTokenizer, chat: ChatTemplate, limits: ModelLimits) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.limits = limits
        self._backend = backend
        self._chat = chat
        self._threads = asyncio.Semaphore(_MAX_TOKENIZING)
        self._token_bytes: TokenBytes | None = None
        self._max_token_bytes = 0
        if type(backend.decoder).__name__ == "ByteLevel":
            self._token_bytes = TokenBytes(backend)
            if backend.normalizer is None:
                vocabulary = backend.get_vocab(with_added_tokens=True)
                self._max_token_bytes = max((len(token_to_bytes(token)) for token in vocabulary), default=0)

    @property
    def vocabulary_size(self) -> int:
        """Token ids of the model. May be more than the tokenizer has: models pad their vocabulary."""
        return self.limits.vocabulary_size or self._backend.get_vocab_size(with_added_tokens=True)

    def least_tokens(self, text: str) -> int:
        """A lower bound of the text's tokens that costs nothing."""
        return len(text) // self._max_token_bytes if self._max_token_bytes else 0

    async def encode(self, text: str) -> array[int]:
        """Token ids of a plain prompt, as the model's tokenizer frames it (for many with a leading token)."""
        return await self._encode(text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[tuple[str, str]]) -> array[int]:
        """Token ids of (role, content) turns, up to where the answer begins."""
        chars = sum(len(content) for _, content in messages)
        if chars > _OFF_LOOP_CHARS or len(messages) > _OFF_LOOP_CHARS // 64:
            async with self._threads:
                text = await asyncio.to_thread(self._chat.render, messages)
        else:
            text = self._chat.render(messages)
        return await self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text, without special tokens."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    @property
    def context_tokens(self) -> int:
        """So many of a prompt's last tokens must be known for the text of what follows it."""
        return CONTEXT_TOKENS if self._token_bytes is None else 0

    def decoder(self, before: Sequence[int] = ()) -> TextDecoder:
        """A decoder for one output, with the `context_tokens` before it."""
        if self._token_bytes is not None:
            return ByteLevelDecoder(self._token_bytes)
        return WindowDecoder(self.decode, before)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; a special one for its name. Not always whole characters."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._token_bytes is not None:
            return self._token_bytes[token_id] or token_to_bytes(token)
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes.fromhex(byte[1])
        # Where SentencePiece made the vocabulary, this character stands for a space.
        return token.replace("\u2581", " ").encode()

    async def _encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        if len(text) <= _OFF_LOOP_CHARS:
            return self._encode_now(text, add_special_tokens)
        async with self._threads:
            return await asyncio.to_thread(self._encode_now, text, add_special_tokens)

    def _encode_now(self, text: str, add_special_tokens: bool) -> array[int]:
        return array("I", self._backend.encode(text, add_special_tokens=add_special_tokens).ids)


def load_tokenizer(target: str) -> Tokenizer:
    """Loads the tokenizer of a model's folder, or of a Hugging Face name that is in the local cache.

    Never fetches anything and runs no code that comes with a model. Raises TokenizerError.
    """
    folder = _local_folder(target)
    try:
        config = _read_json(folder / "tokenizer_config.json")
        plain = (folder / "tokenizer.json").is_file() and config.get("tokenizer_class") in _PLAIN_CLASSES
        backend = (
            BackendTokenizer.from_file(str(folder / "tokenizer.json"))
            if plain
            else _from_transformers(folder)
        )
        return Tokenizer(backend, ChatTemplate.load(folder), _model_limits(folder))
    except TokenizerError:
        raise
    except Exception as error:  # The backend raises bare Exceptions.
        raise TokenizerError(f"target: the tokenizer in {folder} cannot be loaded: {error}") from error


def _local_folder(target: str) -> Path:
    if Path(target).is_dir():
        return Path(target)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(target, local_files_only=True))
    except Exception:
        raise TokenizerError(
            f"target: there is no model folder {target}, nor a cached model of that name"
        ) from None


def _from_transformers(folder: Path) -> BackendTokenizer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    backend: BackendTokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"target: {folder} has a tokenizer without a fast implementation, which is needed"
        )
    return backend


def _model_limits(folder: Path) -> ModelLimits:
    config = _read_json(folder / "config.json")
    text = config.get("text_config") or config
    eos = _read_json(folder / "generation_config.json").get("eos_token_id", text.get("eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return ModelLimits(
        vocabulary_size=int(text.get("vocab_size") or 0),
        context_tokens=int(text.get("max_position_embeddings") or text.get("n_positions") or 0),
        eos_token_ids=frozenset(int(token_id) for token_id in eos_ids),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}
