"""A tokenizer that spells rare characters in tokens for bytes, as Llama 2 does."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers


def byte_fallback_backend(*words: str) -> Tokenizer:
    """What is none of the `words`, nor a space, "a", "b" or " a", is spelled in bytes."""
    entries = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", *words]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    merges = [("\u2581", "a")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend
