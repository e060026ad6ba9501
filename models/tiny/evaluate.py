"""Measures the pair: ``python models/tiny/evaluate.py``; every figure of the model card comes from here.

Acceptance needs no speculative engine. Speculative decoding gives the target's own text, so
the target writes first, in batches, and the draft is then read over that text in one pass:

greedy         a drafted token is accepted where the draft's best token is the target's;
temperature 1  with p, q the target's and draft's probabilities of the token that came out, it
               had been drafted and accepted with probability min(1, q / p).

Walking over these marks with ``DRAFTED`` tokens a step gives the counts that an engine counts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from tiny_corpus import ASSISTANT, KINDS, Document, load_documents
from tiny_models import END_ID
from tiny_tokens import encode_documents, prompt_ids
from train import held_out_bits
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent
DRAFTED = 4
HELD_OUT_PROMPTS = 24
HELD_OUT_PROMPT_TOKENS, HELD_OUT_NEW_TOKENS = 32, 96

ACCEPTANCE_COLUMNS = (
    "prompts",
    "mean tokens",
    "ended",
    "accepted per position",
    "accepted/drafted",
    "tokens/step",
)


@dataclass
class Acceptance:
    """Counts over a set of prompts, for ``DRAFTED`` drafted tokens a step."""

    prompts: int = 0
    ended: int = 0
    tokens: int = 0
    matches: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0

    def add(self, accepted_here: Sequence[bool], ended: bool) -> None:
        """One output: for each of its tokens, whether the draft's token there is accepted."""
        self.prompts += 1
        self.ended += ended
        self.tokens += len(accepted_here)
        self.matches += sum(accepted_here)
        at = 0
        while at < len(accepted_here):
            window = accepted_here[at : at + DRAFTED]
            run = window.index(False) if False in window else len(window)
            self.drafted += len(window)
            self.accepted += run
            self.steps += 1
            at += run + 1

    def row(self, name: str) -> str:
        return (
            f"| {name} | {self.prompts} | {self.tokens / self.prompts:.0f} | {self.ended / self.prompts:.2f} "
            f"| {self.matches / self.tokens:.2f} | {self.accepted / self.drafted:.2f} "
            f"| {self.tokens / self.steps:.2f} |"
        )


@torch.no_grad()
def accepted_marks(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    prompt: Sequence[int],
    output: Sequence[int],
    greedy: bool,
    generator: torch.Generator,
) -> list[bool]:
    """For each output token, whether a draft that stands just before it gets it accepted."""
    ids = torch.tensor([[*prompt, *output]])
    wanted = torch.tensor(output)
    before = slice(len(prompt) - 1, -1)
    given = draft(input_ids=ids).logits[0, before].float()
    if greedy:
        return [bool(x) for x in given.argmax(-1) == wanted]
    true = target(input_ids=ids).logits[0, before].float()
    ratio = (given.log_softmax(-1) - true.log_softmax(-1)).gather(1, wanted[:, None]).squeeze(1).exp()
    return [bool(x) for x in torch.rand(len(wanted), generator=generator) < ratio]


@torch.no_grad()
def write(
    target: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    most_tokens: Sequence[int],
    greedy: bool,
) -> list[tuple[list[int], bool]]:
    """(output with its end token, whether it ended by itself) per prompt; one left-padded batch."""
    longest = max(map(len, prompts))
    pad = target.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    made = target.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(most_tokens),
        do_sample=not greedy,
        **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    outputs = []
    for row, most in zip(made[:, longest:].tolist(), most_tokens, strict=True):
        output = row[:most]
        ended = END_ID in output
        outputs.append((output[: output.index(END_ID) + 1] if ended else output, ended))
    return outputs


def measure(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    prompts: dict[str, list[tuple[list[int], int]]],
    greedy: bool,
) -> dict[str, Acceptance]:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    results = {}
    for kind, items in prompts.items():
        result = results[kind] = Acceptance()
        outputs = write(target, [p for p, _ in items], [n for _, n in items], greedy)
        for (prompt, _), (output, ended) in zip(items, outputs, strict=True):
            result.add(accepted_marks(target, draft, prompt, output, greedy, generator), ended)
    return results


def demo_prompts(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[tuple[list[int], int]]]:
    found: dict[str, list[tuple[list[int], int]]] = {kind: [] for kind in KINDS}
    for line in (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        found[entry["kind"]].append((prompt_ids(tokenizer, entry), entry["max_tokens"]))
    return found


def held_out_prompts(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> dict[str, list[tuple[list[int], int]]]:
    """Openings of held-out documents; a chat is cut where the answer begins."""
    found: dict[str, list[tuple[list[int], int]]] = {}
    for kind in KINDS:
        texts = [d.text for d in documents if d.held_out and d.kind == kind and len(d.text) > 150]
        if kind == "licence":  # few files, so each is opened at several paragraphs
            texts = [p for t in texts for p in t.split("\n\n") if len(p) > 150]
        spread = np.linspace(0, len(texts) - 1, min(HELD_OUT_PROMPTS, len(texts)), dtype=int)
        texts = [texts[i] for i in spread]
        rows = []
        for text in texts:
            if kind == "chat":
                ids = tokenizer(text[: text.index(ASSISTANT)] + ASSISTANT + "\n").input_ids
            else:
                ids = tokenizer(text).input_ids[:HELD_OUT_PROMPT_TOKENS]
            rows.append((ids, HELD_OUT_NEW_TOKENS))
        found[kind] = rows
    return found


@torch.no_grad()
def bits_by_position(model: LlamaForCausalLM, stream: np.ndarray, edges: Sequence[int]) -> list[float]:
    """Bits per token between each pair of edges, over consecutive windows of the longest edge."""
    window = edges[-1]
    rows = [stream[i : i + window + 1] for i in range(0, len(stream) - window, window)][:12]
    total = np.zeros(window)
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))[None]
        scores = model(input_ids=ids[:, :-1]).logits[0].float().log_softmax(-1)
        total -= scores.gather(1, ids[0, 1:, None]).squeeze(1).numpy()
    bits = total / len(rows) / np.log(2)
    return [float(bits[a:b].mean()) for a, b in pairwise(edges)]


def print_head(names: Sequence[str]) -> None:
    print(f"\n| {' | '.join(names)} |\n| --- |{' ---: |' * (len(names) - 1)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", type=Path, default=FOLDER, help="folder that holds target/ and draft/")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", action="store_true", help="also print what the target writes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.pair / "target")
    models = {
        name: AutoModelForCausalLM.from_pretrained(arguments.pair / name, dtype=torch.float32).eval()
        for name in ("target", "draft")
    }
    documents = load_documents()
    tokens = encode_documents(tokenizer, [d.text for d in documents])
    held_out = [i for i, d in enumerate(documents) if d.held_out]
    documents, tokens = [documents[i] for i in held_out], [tokens[i] for i in held_out]
    print_head(["held-out bits/byte", "parameters", *KINDS])
    for name, model in models.items():
        bits = held_out_bits(model, documents, tokens, most_tokens=20_000)
        count = sum(p.numel() for p in model.parameters())
        print(f"| {name} | {count:,} | {' | '.join(f'{bits[k]:.2f}' for k in KINDS)} |", flush=True)
        model.eval()
    edges = (0, 16, 64, 256, 512, 1024, 2048)
    code = np.concatenate([t for d, t in zip(documents, tokens, strict=True) if d.kind == "code"])
    by_position = bits_by_position(models["target"], code, edges)
    print_head(["positions, target, code", *(f"{a}-{b - 1}" for a, b in pairwise(edges))])
    print(f"| bits/token | {' | '.join(f'{x:.2f}' for x in by_position)} |", flush=True)
    sets = {
        "held-out openings": held_out_prompts(tokenizer, documents),
        "prompts.jsonl": demo_prompts(tokenizer),
    }
    for set_name, prompts in sets.items():
        for greedy in (True, False):
            how = "greedy" if greedy else "temperature 1"
            print_head([f"{set_name}, {how}", *ACCEPTANCE_COLUMNS])
            results = measure(models["target"], models["draft"], prompts, greedy)
            for kind, result in results.items():
                print(result.row(kind))
            every = Acceptance(*(sum(getattr(r, f) for r in results.values()) for f in vars(Acceptance())))
            print(every.row("all"), flush=True)
    if arguments.samples:
        for kind, items in sets["prompts.jsonl"].items():
            outputs = write(models["target"], [p for p, _ in items], [n for _, n in items], greedy=True)
            for (prompt, _), (output, _) in zip(items, outputs, strict=True):
                print(f"\n=== {kind} ===\n{tokenizer.decode(prompt)}>>>{tokenizer.decode(output)}")


if __name__ == "__main__":
    main()
