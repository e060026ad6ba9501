"""A small byte-level model folder, made on the spot, and how a worker finds stop strings in its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|end|>"
CONTEXT_TOKENS = 200_000
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TEXT = [
    "the end of the story, and then the END",
    "naïve café größer 日本語 日本 🙂🙂 ✓ ends",
    "a\n\nb\n\nc the the the",
]


def make_model_folder(folder: Path) -> Path:
    """tokenizer.json with its configuration; no weights."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[END, "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT * 4, trainer=trainer)
    backend.save(str(folder / "tokenizer.json"))
    size = backend.get_vocab_size(with_added_tokens=True)
    write(folder / "config.json", vocab_size=size, max_position_embeddings=CONTEXT_TOKENS, eos_token_id=0)
    write(
        folder / "tokenizer_config.json",
        tokenizer_class="TokenizersBackend",
        eos_token=END,
        chat_template=TEMPLATE,
    )
    return folder


def write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def stop_end(tokenizer: Tokenizer, planned: list[int], stopping: Any) -> tuple[int, str, int] | None:
    """As the engine judges: after each token, where the text so far ends with a whole character.

    Returns the output's length in tokens, the stop string that ended it and where in the text that begins.
    """
    if not stopping.stop:
        return None
    judged = 0
    for count in range(1, len(planned) + 1):
        text = tokenizer.decode(planned[:count], skip_special_tokens=True)
        if text.endswith("\ufffd") or len(text) == judged:
            continue
        ends = []
        for stop in stopping.stop:
            position = text.find(stop, max(judged - len(stop) + 1, 0))
            if position >= 0:
                ends.append((position + len(stop), stop, position))
        judged = len(text)
        if ends and count >= stopping.min_tokens:
            return count, *min(ends)[1:]
    return None
