"""What transformers itself generates, to compare with."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laps.settings import BUILT_IN_TARGET


@cache
def target() -> tuple[Any, Any]:
    """The built-in target in fp32, and its tokenizer."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BUILT_IN_TARGET, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(BUILT_IN_TARGET)


def encode(text: str, most_tokens: int) -> list[int]:
    """The text's token ids, cut to what fits."""
    ids: list[int] = target()[1].encode(text)
    return ids[:most_tokens]


@torch.inference_mode()
def greedy(prompt_ids: list[int], max_tokens: int) -> list[int]:
    """`target.generate(do_sample=False)`."""
    model, tokenizer = target()
    made = model.generate(
        torch.tensor([prompt_ids]),
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    return made[0, len(prompt_ids) :].tolist()


@torch.inference_mode()
def is_greedy(prompt_ids: list[int], output: list[int], max_tokens: int) -> bool:
    """Whether `output` is what `greedy` makes, told by one pass over it: each token is the likeliest after
    those before it, and it ends where it has to."""
    model, tokenizer = target()
    ended = output[-1:] == [tokenizer.eos_token_id]
    if tokenizer.eos_token_id in output[:-1] or not (len(output) == max_tokens or ended):
        return False
    logits = model(torch.tensor([prompt_ids + output])).logits[0, len(prompt_ids) - 1 : -1]
    return bool((logits.argmax(-1) == torch.tensor(output)).all())


@torch.inference_mode()
def sequence_probabilities(prompt_ids: list[int], length: int, top_k: int) -> dict[tuple[int, ...], float]:
    """Probability of every output of `length` tokens when each is drawn from the `top_k` likeliest."""
    model, _ = target()
    beams: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for output, probability in beams.items():
            logits = model(torch.tensor([[*prompt_ids, *output]])).logits[0, -1]
            values, ids = logits.topk(top_k)
            for share, token in zip(values.softmax(0).tolist(), ids.tolist(), strict=True):
                grown[*output, token] = probability * share
        beams = grown
    return beams
