"""The pair's tokenizer: byte-level BPE of 2048 tokens, an end token and chat markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tiny_corpus import ASSISTANT, END, PAD, SYSTEM, USER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_TOKENS = 2048
CONTEXT_TOKENS = 2048
SPECIAL_TOKENS = (END, PAD, SYSTEM, USER, ASSISTANT)

# One turn is a marker, a line break, the text and a line break; only an assistant's turn ends
# with the end token, so that generation stops where the answer does.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'system' %}"
    "{{ '<|system|>\\n' + message['content'] + '\\n' }}"
    "{% else %}"
    "{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_tokens: int = VOCAB_TOKENS) -> PreTrainedTokenizerFast:
    """Learns the merges from ``texts``; the same texts in the same order give the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_tokens,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """One uint16 array per text, each closed by the end token."""
    end_id = tokenizer.convert_tokens_to_ids(END)
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array([*encoding.ids, end_id], dtype=np.uint16) for encoding in encodings]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, entry: dict[str, Any]) -> list[int]:
    """Token ids of one entry of ``prompts.jsonl``: its ``text``, or its ``messages`` laid out."""
    if "messages" in entry:
        text = tokenizer.apply_chat_template(entry["messages"], tokenize=False, add_generation_prompt=True)
    else:
        text = entry["text"]
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
