"""Tokens per second in one run: transformers, the engine alone, and the whole stack.

    python bench/stack.py [--tokens 128] [--rounds 3] [--json OUT]

The built-in pair, fp32, one compute thread each, prompts of three kinds, every request exactly
`--tokens` long. At 1 and at 8 requests at a time. Machines differ and drift: read the ratios. What the
stack's parts used of the CPU is told beside them, since that is where the difference comes from.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch is loaded: a thread that spins for work takes the core that another process needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from laps.client import AsyncClient
from laps.settings import BUILT_IN_DRAFT, BUILT_IN_TARGET, Settings
from laps.stack import Stack
from worker_svc.engine import Engine, EngineConfig, EngineRequest, StoppingConfig, load_pair

KINDS = ("code", "topic", "licence")
CONCURRENCIES = (1, 8)
Prompts = Sequence[list[int]]


def load_prompts(count: int) -> list[list[int]]:
    """`count` prompts as token ids, the kinds in turn."""
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN_TARGET)
    lines = (Path(BUILT_IN_TARGET).parent / "prompts.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "text" in record]
    by_kind = [[record["text"] for record in records if record["kind"] == kind] for kind in KINDS]
    chosen = [by_kind[n % len(KINDS)][n // len(KINDS) % len(by_kind[n % len(KINDS)])] for n in range(count)]
    return [tokenizer.encode(text) for text in chosen]


class Transformers:
    """`generate` as people call it: alone in a padded batch, or with the draft as its assistant."""

    def __init__(self, assisted: bool) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BUILT_IN_TARGET, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(BUILT_IN_TARGET, dtype=torch.float32).eval()
        self.options: dict[str, Any] = {}
        if assisted:
            draft = AutoModelForCausalLM.from_pretrained(BUILT_IN_DRAFT, dtype=torch.float32).eval()
            self.options["assistant_model"] = draft
        self.assisted = assisted

    @torch.inference_mode()
    def run(self, prompts: Prompts, tokens: int) -> None:
        # Assisted generation takes one prompt at a time.
        for batch in [[prompt] for prompt in prompts] if self.assisted else [prompts]:
            inputs = self.tokenizer.pad({"input_ids": list(batch)}, return_tensors="pt")
            self.model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=self.tokenizer.eos_token_id,
                **self.options,
            )


class EngineAlone:
    def __init__(self, speculate: bool) -> None:
        pair = load_pair(BUILT_IN_TARGET, BUILT_IN_DRAFT if speculate else None)
        config = EngineConfig(slots=max(CONCURRENCIES), threads=1, prompt_lookup=speculate)
        self.engine = Engine(pair, config)
        self.engine.calibrate()

    def run(self, prompts: Prompts, tokens: int) -> None:
        for number, prompt in enumerate(prompts):
            stopping = StoppingConfig(max_tokens=tokens, ignore_eos=True)
            self.engine.add(EngineRequest(str(number), prompt, stopping=stopping))
        while self.engine.running:
            self.engine.step()


def tokens_per_s(
    run: Callable[[Prompts, int], None], prompts: Prompts, concurrency: int, tokens: int
) -> float:
    """All prompts, `concurrency` at a time."""
    began_s = time.perf_counter()
    for first in range(0, len(prompts), concurrency):
        run(prompts[first : first + concurrency], tokens)
    return len(prompts) * tokens / (time.perf_counter() - began_s)


async def stack_tokens_per_s(client: AsyncClient, prompts: Prompts, concurrency: int, tokens: int) -> float:
    """The same through the gateway: a client that keeps `concurrency` requests under way."""
    began_s = time.perf_counter()
    slots = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> None:
        async with slots:
            made = await client.generate(prompt, max_tokens=tokens, ignore_eos=True)
            assert len(made.token_ids) == tokens

    await asyncio.gather(*map(one, prompts))
    return len(prompts) * tokens / (time.perf_counter() - began_s)


def cpu_by_thread(stack: Stack) -> dict[tuple[str, int], float]:
    """CPU seconds so far by child and thread."""
    return {
        (name, thread.id): thread.user_time + thread.system_time
        for name, child in stack.children.items()
        for thread in psutil.Process(child.pid).threads()
    }


def cpu_by_part(
    before: dict[tuple[str, int], float], after: dict[tuple[str, int], float]
) -> dict[str, float]:
    """CPU seconds between; of a worker, its engine's thread (the busiest) and the others."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for (name, thread), total_s in after.items():
        spent[name].append(total_s - before.get((name, thread), 0.0))
    parts: dict[str, float] = {}
    for name, threads_s in spent.items():
        if name.startswith("worker"):
            parts[f"{name}, engine"] = max(threads_s)
            parts[f"{name}, rest"] = sum(threads_s) - max(threads_s)
        else:
            parts[name] = sum(threads_s)
    return parts


Medians = dict[str, dict[int, float]]


async def measure(tokens: int, rounds: int) -> tuple[Medians, Medians]:
    """Median tokens/s by engine and concurrency, and CPU seconds per 1,000 tokens by part of the stack; the
    engines take turns in every round."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    prompts = load_prompts(max(CONCURRENCIES))
    runners = {
        "transformers generate": Transformers(assisted=False).run,
        "transformers assisted": Transformers(assisted=True).run,
        "engine, target only": EngineAlone(speculate=False).run,
        "engine": EngineAlone(speculate=True).run,
    }
    seen: dict[str, dict[int, list[float]]] = {
        name: {concurrency: [] for concurrency in CONCURRENCIES} for name in [*runners, "whole stack"]
    }
    used: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="laps-bench-") as folder:
        settings = Settings(data_dir=Path(folder), workers=1, slots=max(CONCURRENCIES), threads=1)
        stack = Stack(settings, any_ports=True)
        async with stack, AsyncClient(stack.gateway_address) as client:
            for round_number in range(rounds + 1):
                for concurrency in CONCURRENCIES:
                    for name, run in runners.items():
                        began_s = time.thread_time()
                        speed = tokens_per_s(run, prompts, concurrency, tokens)
                        if round_number and name == "engine":
                            per_1000 = (time.thread_time() - began_s) / (len(prompts) * tokens) * 1000
                            used.setdefault("engine alone", {}).setdefault(concurrency, []).append(per_1000)
                        report(seen, name, concurrency, speed, warm_up=round_number == 0)
                    before = cpu_by_thread(stack)
                    speed = await stack_tokens_per_s(client, prompts, concurrency, tokens)
                    for part, spent_s in cpu_by_part(before, cpu_by_thread(stack)).items():
                        if round_number:
                            per_1000 = spent_s / (len(prompts) * tokens) * 1000
                            used.setdefault(part, {}).setdefault(concurrency, []).append(per_1000)
                    report(seen, "whole stack", concurrency, speed, warm_up=round_number == 0)
    return medians_of(seen), medians_of(used)


def medians_of(values: dict[str, dict[int, list[float]]]) -> Medians:
    return {
        name: {concurrency: statistics.median(each) for concurrency, each in by_concurrency.items()}
        for name, by_concurrency in values.items()
    }


def report(
    seen: dict[str, dict[int, list[float]]], name: str, concurrency: int, speed: float, *, warm_up: bool
) -> None:
    print(
        f"  {'warm-up' if warm_up else 'measured'}: {name}, {concurrency} at a time: {speed:.0f} tokens/s",
        flush=True,
    )
    if not warm_up:
        seen[name][concurrency].append(speed)


def show(medians: Medians, cpu_s: Medians) -> None:
    base = medians["engine, target only"]
    heads = "".join(f"{concurrency:>9} at a time" for concurrency in CONCURRENCIES)
    print(f"\n{'tokens/s (and times the engine, target only)':<46}{heads}")
    for name, speeds in medians.items():
        cells = (f"{speeds[c]:>11.0f} ({speeds[c] / base[c]:.2f}x)" for c in CONCURRENCIES)
        print(f"{name:<46}{''.join(cells)}")
    for c in CONCURRENCIES:
        share = medians["whole stack"][c] / medians["engine"][c]
        print(f"whole stack / engine alone, {c} at a time: {share:.2f}")
        told = ", ".join(f"{part} {spent[c]:.2f}" for part, spent in cpu_s.items())
        print(f"  CPU seconds per 1,000 tokens: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that warms up")
    parser.add_argument("--json", type=Path, help="write the medians here")
    arguments = parser.parse_args()
    medians, cpu_s = asyncio.run(measure(arguments.tokens, arguments.rounds))
    show(medians, cpu_s)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"tokens_per_s": medians, "cpu_s_per_1000_tokens": cpu_s}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
