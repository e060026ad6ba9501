"""Builds the tokenizer, the target and the draft: ``python models/tiny/train.py --out models/tiny``.

Budgets are in tokens, seeds are fixed, and nothing but an installed Python with torch,
transformers and tokenizers is read. The target is trained shallow first and deepened twice;
the draft is trained from scratch, then distilled on the final target's logits, first over the
corpus and last over text that the target itself wrote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

# A spinning thread pool on a shared machine costs more than it saves; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.nn.functional as F
from tiny_corpus import ASSISTANT, KINDS, REPEATS, USER, Document, load_documents
from tiny_models import (
    END_ID,
    Optimiser,
    deepen,
    draft_config,
    new_model,
    target_config,
    warm_then_decay,
)
from tiny_tokens import encode_documents, train_tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20240
WINDOW_TOKENS, BATCH_WINDOWS = 256, 12
LONG_WINDOW_TOKENS, LONG_BATCH_WINDOWS = 2048, 2
SHORT_STEP_TOKENS = WINDOW_TOKENS * BATCH_WINDOWS
LONG_STEP_TOKENS = LONG_WINDOW_TOKENS * LONG_BATCH_WINDOWS

# (layers, tokens at 256, tokens at 2048): shallow while the rate is high, deep while it falls.
TARGET_STAGES = ((4, 2_200_000, 0), (8, 245_760, 0), (16, 184_320, 49_152))
DRAFT_SCRATCH_TOKENS = 1_000_000
DRAFT_CORPUS_TOKENS = 350_000
DRAFT_SAMPLE_TOKENS, DRAFT_SAMPLE_EPOCHS = 115_000, 2
SAMPLE_ROWS, SAMPLE_TOKENS, SAMPLE_PROMPT_TOKENS = 128, 224, 24

started = time.perf_counter()


def say(text: str) -> None:
    wall, cpu = time.perf_counter() - started, time.process_time()
    print(f"[{wall:6.0f} s wall, {cpu:6.0f} s cpu] {text}", flush=True)


class Stream:
    """The training documents as one run of tokens, in a new order each epoch.

    Definitions of one file stay together and in order (long windows then hold one file);
    everything else is shuffled document by document.
    """

    def __init__(self, documents: list[Document], tokens: list[np.ndarray], seed: int) -> None:
        units: dict[str, list[np.ndarray]] = {}
        for index, (document, ids) in enumerate(zip(documents, tokens, strict=True)):
            if not document.held_out:
                key = document.source if document.kind == "code" else f"{document.kind}/{index}"
                for copy_index in range(REPEATS[document.kind]):
                    units.setdefault(f"{key}/{copy_index}", []).append(ids)
        self.units = [np.concatenate(parts) for parts in units.values()]
        self.random = np.random.default_rng(seed)

    def epoch(self) -> np.ndarray:
        order = self.random.permutation(len(self.units))
        return np.concatenate([self.units[i] for i in order]).astype(np.int64)

    def batches(self, window: int, rows: int) -> Iterator[Tensor]:
        """int64 [rows, window + 1]: inputs and, shifted by one, what follows them."""
        while True:
            stream = self.epoch()
            starts = np.arange(int(self.random.integers(window)), len(stream) - window - 1, window)
            self.random.shuffle(starts)
            for at in range(0, len(starts) - rows + 1, rows):
                rows_ids = [stream[s : s + window + 1] for s in starts[at : at + rows]]
                yield torch.from_numpy(np.stack(rows_ids))


def next_token_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean nats per token of [rows, tokens + 1] ids."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def distillation_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean KL(target || draft) in nats per token."""
    with torch.no_grad():
        wanted = F.log_softmax(target(input_ids=ids, use_cache=False).logits.flatten(0, 1).float(), dim=-1)
    given = F.log_softmax(draft(input_ids=ids, use_cache=False).logits.flatten(0, 1).float(), dim=-1)
    return F.kl_div(given, wanted, log_target=True, reduction="batchmean")


@torch.no_grad()
def held_out_bits(
    model: LlamaForCausalLM, documents: list[Document], tokens: list[np.ndarray], most_tokens: int = 8_000
) -> dict[str, float]:
    """Bits per byte by kind over held-out documents, each read alone after an end token."""
    model.eval()
    result = {}
    for kind in KINDS:
        nats, text_bytes, read = 0.0, 0, 0
        for document, ids in zip(documents, tokens, strict=True):
            if document.kind != kind or not document.held_out or read >= most_tokens:
                continue
            if len(ids) > 1024:
                continue
            row = torch.from_numpy(np.concatenate([[END_ID], ids]).astype(np.int64))[None]
            nats += float(next_token_loss(model, row)) * len(ids)
            text_bytes += len(document.text.encode())
            read += len(ids)
        result[kind] = nats / np.log(2) / max(1, text_bytes)
    model.train()
    return result


def describe(bits: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.3f}" for kind, value in bits.items())


def train_target(
    stream: Stream, held_out: tuple[list[Document], list[np.ndarray]], share: float
) -> LlamaForCausalLM:
    model = new_model(target_config(TARGET_STAGES[0][0]), SEED)
    for layers, short_tokens, long_tokens in TARGET_STAGES:
        if layers != model.config.num_hidden_layers:
            model = deepen(model, layers)
        short_steps = int(short_tokens * share) // SHORT_STEP_TOKENS
        long_steps = int(long_tokens * share) // LONG_STEP_TOKENS
        short = stream.batches(WINDOW_TOKENS, BATCH_WINDOWS)
        long = stream.batches(LONG_WINDOW_TOKENS, LONG_BATCH_WINDOWS)
        last = layers == TARGET_STAGES[-1][0]
        steps = short_steps + long_steps
        scale = warm_then_decay(steps, warm_steps=10 if last else 30, decay_from=0.0 if last else 1.0)
        optimiser = Optimiser(model, muon_rate=0.02, adam_rate=3e-3)
        tokens = short_steps * SHORT_STEP_TOKENS + long_steps * LONG_STEP_TOKENS
        say(f"target, {layers} layers: {steps} steps, {tokens:,} tokens")
        running = 0.0
        for step in range(steps):
            # Long windows are spread over the whole stage: at its end the rate is near zero.
            is_long = (step + 1) * long_steps // steps > step * long_steps // steps
            loss = next_token_loss(model, next(long) if is_long else next(short))
            loss.backward()
            optimiser.step(scale(step))
            running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
            if step % 40 == 0:
                say(f"  step {step}: training loss {running:.3f} nats/token")
        say(f"  held-out bits/byte: {describe(held_out_bits(model, *held_out, most_tokens=4_000))}")
    # The draft must learn the target that is shipped, so the rounding to fp16 comes first.
    return model.half().float().eval()


def fit_draft(
    draft: LlamaForCausalLM,
    target: LlamaForCausalLM | None,
    batches: Iterator[Tensor],
    steps: int,
    rate: float,
    warm_steps: int,
    decay_from: float,
) -> None:
    """Trains on the text (no target) or on the target's logits over the text."""
    optimiser = Optimiser(draft, muon_rate=0.02 * rate, adam_rate=4e-3 * rate)
    scale = warm_then_decay(steps, warm_steps, decay_from)
    running = 0.0
    for step in range(steps):
        ids = next(batches)
        if target is None:
            loss = next_token_loss(draft, ids)
        else:
            loss = distillation_loss(draft, target, ids[:, :-1])
        loss.backward()
        optimiser.step(scale(step))
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 80 == 0:
            say(f"  step {step}: loss {running:.3f} nats/token")


@torch.no_grad()
def target_samples(target: LlamaForCausalLM, stream: Stream, rounds: int, seed: int) -> Tensor:
    """int64 [rounds * SAMPLE_ROWS, SAMPLE_TOKENS + 1]: what the target writes after short prompts.

    Half the rows are the target's best guess and half are drawn at temperature 1, because a
    server is asked for both. Rows go on past an end token: the next document is learned too.
    """
    torch.manual_seed(seed)
    prompts = stream.batches(SAMPLE_PROMPT_TOKENS, SAMPLE_ROWS)
    greedy = (torch.arange(SAMPLE_ROWS) % 2 == 0)[:, None]
    rounds_ids = []
    for round_index in range(rounds):
        ids = next(prompts)[:, :SAMPLE_PROMPT_TOKENS]
        made, cache, feed = [ids], None, ids
        for _ in range(SAMPLE_TOKENS + 1 - SAMPLE_PROMPT_TOKENS):
            out = target(input_ids=feed, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            drawn = torch.multinomial(logits.softmax(-1), 1)
            feed = torch.where(greedy, logits.argmax(-1, keepdim=True), drawn)
            made.append(feed)
        rounds_ids.append(torch.cat(made, dim=1))
        if round_index % 4 == 0:
            say(f"  {round_index + 1} of {rounds} rounds of the target's own text")
    return torch.cat(rounds_ids)


def sample_batches(samples: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(samples), generator=generator)
        for at in range(0, len(samples) - BATCH_WINDOWS + 1, BATCH_WINDOWS):
            yield samples[order[at : at + BATCH_WINDOWS]]


def train_draft(target: LlamaForCausalLM, stream: Stream, share: float) -> LlamaForCausalLM:
    """Needs the target in its final form; ``stream`` has a seed of its own, so a kept target will do."""
    draft = new_model(draft_config(), SEED + 1)
    batches = stream.batches(WINDOW_TOKENS, BATCH_WINDOWS)
    steps = int(DRAFT_SCRATCH_TOKENS * share) // SHORT_STEP_TOKENS
    say(f"draft from scratch: {steps} steps")
    fit_draft(draft, None, batches, steps, rate=1.0, warm_steps=30, decay_from=1.0)
    steps = int(DRAFT_CORPUS_TOKENS * share) // SHORT_STEP_TOKENS
    say(f"draft distilled on the corpus: {steps} steps")
    fit_draft(draft, target, batches, steps, rate=1.0, warm_steps=0, decay_from=0.3)
    rounds = max(1, int(DRAFT_SAMPLE_TOKENS * share) // (SAMPLE_ROWS * SAMPLE_TOKENS))
    samples = target_samples(target, stream, rounds, SEED + 2)
    steps = DRAFT_SAMPLE_EPOCHS * len(samples) // BATCH_WINDOWS
    say(f"draft distilled on the target's own text: {steps} steps")
    own_text = sample_batches(samples, SEED + 3)
    fit_draft(draft, target, own_text, steps, rate=0.4, warm_steps=10, decay_from=0.0)
    return draft.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes fp16 weights beside the tokenizer; each file is swapped in whole, so readers see no half."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = LlamaForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=1)
    half.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.iterdir()):
        path.chmod(0o644)
        os.replace(path, folder / path.name)
    fresh.rmdir()
    say(f"wrote {folder.name}: {sum(p.stat().st_size for p in folder.iterdir()) / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for target/ and draft/")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="part of each token budget, for a trial")
    parser.add_argument("--reuse-target", action="store_true", help="train only the draft")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    documents = load_documents()
    texts = [document.text for document in documents]
    say(f"{len(documents):,} documents, {sum(len(t.encode()) for t in texts):,} bytes")
    tokenizer = train_tokenizer(d.text for d in documents if not d.held_out)
    tokens = encode_documents(tokenizer, texts)
    for kind in KINDS:
        for part in (False, True):
            pairs = zip(documents, tokens, strict=True)
            chosen = [t for d, t in pairs if d.kind == kind and d.held_out is part]
            name = "held out" if part else "training"
            say(f"  {kind}, {name}: {len(chosen):,} documents, {sum(map(len, chosen)):,} tokens")
    if arguments.reuse_target:
        target = LlamaForCausalLM.from_pretrained(arguments.out / "target", dtype=torch.float32).eval()
    else:
        stream = Stream(documents, tokens, SEED)
        target = train_target(stream, (documents, tokens), arguments.share)
        save(target, tokenizer, arguments.out / "target")
    draft = train_draft(target, Stream(documents, tokens, SEED + 1), arguments.share)
    save(draft, tokenizer, arguments.out / "draft")
    for name, model in (("target", target), ("draft", draft)):
        say(f"{name}, held-out bits/byte: {describe(held_out_bits(model, documents, tokens))}")
    for prompt in (f"{USER}\nWhat does os.path.join do?\n{ASSISTANT}\n", "def read_lines(path):\n", "The "):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = target.generate(input_ids=ids, max_new_tokens=80, do_sample=False)
        say(f"sample: {tokenizer.decode(made[0])!r}")
    say("done")


if __name__ == "__main__":
    main()
