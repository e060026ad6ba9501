"""Tokens per second in one run: transformers, the engine alone, and the whole stack.

    python bench/stack.py [--tokens 128] [--requests 32] [--rounds 9] [--json OUT]

The built-in pair, fp32, one compute thread each, prompts of three kinds, every request exactly `--tokens`
long.
At 1 and at 8 requests at a time: engine and stack get `--requests` of them, and the next one whenever one has
ended; transformers, which cannot take one into a running batch, gets 8. Machines differ and drift, within
seconds too: read the ratios, and of stack and engine the median of those of each round, in which one follows
the other. Beside them stands what tells where the difference comes from: what the stack's parts used of the
CPU, how long the worker's engine waited for a core and for work, and how many tokens a request gained in a
step.
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
from collections.abc import Mapping, Sequence
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
from worker_svc.engine import EngineRequest, StoppingConfig, load_pair
from worker_svc.main import make_engine

KINDS = ("code", "topic", "licence")
CONCURRENCIES = (1, 8)
REFERENCE_ROUNDS = 3
"""Measured rounds of what only the speed is compared with: transformers is slow, and its ratio large."""
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

    def run(self, prompts: Prompts, concurrency: int, tokens: int) -> float:
        """Tokens per second of the first prompts, `concurrency` at a time."""
        prompts = prompts[: max(CONCURRENCIES)]
        began_s = time.perf_counter()
        for first in range(0, len(prompts), concurrency):
            self._batch(prompts[first : first + concurrency], tokens)
        return len(prompts) * tokens / (time.perf_counter() - began_s)

    @torch.inference_mode()
    def _batch(self, prompts: Prompts, tokens: int) -> None:
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
    """Set as the worker sets it."""

    def __init__(self, settings: Settings, speculate: bool) -> None:
        pair = load_pair(BUILT_IN_TARGET, BUILT_IN_DRAFT if speculate else None)
        self.engine = make_engine(
            settings if speculate else settings.model_copy(update={"lookup_tokens": 0}), pair
        )
        self.engine.calibrate()
        self.row_steps = 0

    def run(self, prompts: Prompts, concurrency: int, tokens: int) -> float:
        """Tokens per second of all prompts; when a request ends the next one comes."""
        began_s = time.perf_counter()
        waiting = [
            EngineRequest(str(number), prompt, stopping=StoppingConfig(max_tokens=tokens, ignore_eos=True))
            for number, prompt in enumerate(prompts)
        ][::-1]
        while waiting or self.engine.running:
            while waiting and len(self.engine.running) < concurrency:
                self.engine.add(waiting.pop())
            result = self.engine.step()
            self.row_steps += len(result.request_ids)
            for request_id, finish in zip(result.request_ids, result.finish, strict=True):
                if finish is not None:
                    self.engine.drop(request_id)
        return len(prompts) * tokens / (time.perf_counter() - began_s)


async def stack_tokens_per_s(
    client: AsyncClient, prompts: Prompts, concurrency: int, tokens: int
) -> tuple[float, int]:
    """The same through the gateway: a client that keeps `concurrency` requests under way. Beside the speed
    the steps of all requests together."""
    began_s = time.perf_counter()
    slots = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> int:
        async with slots:
            made = await client.generate(prompt, max_tokens=tokens, ignore_eos=True)
            assert len(made.token_ids) == tokens
            return made.speculation.num_steps

    steps = await asyncio.gather(*map(one, prompts))
    return len(prompts) * tokens / (time.perf_counter() - began_s), sum(steps)


def cpu_by_thread(stack: Stack) -> dict[tuple[str, int], float]:
    """CPU seconds so far by child and thread."""
    return {
        (name, thread.id): thread.user_time + thread.system_time
        for name, child in stack.children.items()
        for thread in psutil.Process(child.pid).threads()
    }


def waits_by_thread(pid: int) -> dict[str, tuple[float, float]]:
    """Seconds that each thread of a process has run, and waited for a core, so far (Linux: schedstat)."""
    waits = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        ran_ns, waited_ns, _ = map(int, (task / "schedstat").read_text().split())
        waits[task.name] = (ran_ns / 1e9, waited_ns / 1e9)
    return waits


def engine_waits(
    before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]], wall_s: float
) -> dict[str, float]:
    """How the worker's busiest thread, the engine's, spent `wall_s` seconds without running: it waited for a
    core, or for something else (work, the interpreter's lock)."""
    ran_s, waited_s = max(
        (ran_s - before.get(thread, (0.0, 0.0))[0], waited_s - before.get(thread, (0.0, 0.0))[1])
        for thread, (ran_s, waited_s) in after.items()
    )
    return {"waits for a core": waited_s, "waits for work or lock": max(0.0, wall_s - ran_s - waited_s)}


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
Shares = dict[int, list[float]]


class Figures:
    """Measurements by name and concurrency, without those of the round that warms up."""

    def __init__(self) -> None:
        self.warm_up = True
        self._seen: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, concurrency: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not self.warm_up:
                self._seen[name][concurrency].append(value)

    def medians(self) -> Medians:
        return {
            name: {concurrency: statistics.median(each) for concurrency, each in by_concurrency.items()}
            for name, by_concurrency in self._seen.items()
        }

    def shares(self, name: str, of: str) -> Shares:
        """By concurrency: one over the other in each round."""
        return {
            concurrency: [mine / other for mine, other in zip(each, self._seen[of][concurrency], strict=True)]
            for concurrency, each in self._seen[name].items()
        }


async def measure(tokens: int, requests: int, rounds: int) -> tuple[dict[str, Medians], Shares]:
    """Medians by name and concurrency, and of each round what the stack did over the engine alone."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    prompts = load_prompts(requests)
    thousands = len(prompts) * tokens / 1000
    settings = Settings(workers=1, slots=max(CONCURRENCIES), threads=1)
    engine = EngineAlone(settings, speculate=True)
    runners = {
        "transformers generate": Transformers(assisted=False).run,
        "transformers assisted": Transformers(assisted=True).run,
        "engine, target only": EngineAlone(settings, speculate=False).run,
        "engine": engine.run,
    }
    speeds, cpu_s, waits_s, gains = Figures(), Figures(), Figures(), Figures()
    with tempfile.TemporaryDirectory(prefix="laps-bench-") as folder:
        stack = Stack(settings.model_copy(update={"data_dir": Path(folder)}), any_ports=True)
        async with stack, AsyncClient(stack.gateway_address) as client:
            worker_pid = psutil.Process(stack.children["worker-0"].pid).pid
            for round_number in range(rounds + 1):
                for figures in (speeds, cpu_s, waits_s, gains):
                    figures.warm_up = round_number == 0
                for concurrency in CONCURRENCIES:
                    for name, run in runners.items():
                        if name != "engine" and round_number > REFERENCE_ROUNDS:
                            continue
                        began_s, engine.row_steps = time.thread_time(), 0
                        speed = run(prompts, concurrency, tokens)
                        if name == "engine":
                            spent_s = time.thread_time() - began_s
                            cpu_s.add(concurrency, {"engine alone": spent_s / thousands})
                            gains.add(concurrency, {"engine": thousands * 1000 / engine.row_steps})
                        tell(speeds, name, concurrency, speed)
                    before, waits = cpu_by_thread(stack), waits_by_thread(worker_pid)
                    began_s = time.perf_counter()
                    speed, steps = await stack_tokens_per_s(client, prompts, concurrency, tokens)
                    waited_s = engine_waits(waits, waits_by_thread(worker_pid), time.perf_counter() - began_s)
                    parts = cpu_by_part(before, cpu_by_thread(stack))
                    cpu_s.add(concurrency, {part: spent_s / thousands for part, spent_s in parts.items()})
                    waits_s.add(concurrency, {why: wait_s / thousands for why, wait_s in waited_s.items()})
                    gains.add(concurrency, {"whole stack": thousands * 1000 / steps})
                    tell(speeds, "whole stack", concurrency, speed)
    medians = {
        "tokens_per_s": speeds.medians(),
        "cpu_s_per_1000_tokens": cpu_s.medians(),
        "engine_thread_s_per_1000_tokens": waits_s.medians(),
        "tokens_per_step": gains.medians(),
    }
    return medians, speeds.shares("whole stack", of="engine")


def tell(speeds: Figures, name: str, concurrency: int, speed: float) -> None:
    kind = "warm-up" if speeds.warm_up else "measured"
    print(f"  {kind}: {name}, {concurrency} at a time: {speed:.0f} tokens/s", flush=True)
    speeds.add(concurrency, {name: speed})


def show(measured: dict[str, Medians], shares: Shares) -> None:
    speeds = measured["tokens_per_s"]
    base = speeds["engine, target only"]
    heads = "".join(f"{concurrency:>9} at a time" for concurrency in CONCURRENCIES)
    print(f"\n{'tokens/s (and times the engine, target only)':<46}{heads}")
    for name, by_concurrency in speeds.items():
        cells = (f"{by_concurrency[c]:>11.0f} ({by_concurrency[c] / base[c]:.2f}x)" for c in CONCURRENCIES)
        print(f"{name:<46}{''.join(cells)}")
    for c in CONCURRENCIES:
        rounds = ", ".join(f"{share:.2f}" for share in sorted(shares[c]))
        share = statistics.median(shares[c])
        print(f"whole stack / engine alone, {c} at a time: {share:.2f} (median of {rounds})")
        for title, key in (
            ("CPU seconds per 1,000 tokens", "cpu_s_per_1000_tokens"),
            ("the worker's engine, seconds per 1,000 tokens", "engine_thread_s_per_1000_tokens"),
            ("tokens of a request in a step", "tokens_per_step"),
        ):
            told = ", ".join(f"{name} {values[c]:.2f}" for name, values in measured[key].items())
            print(f"  {title}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each request")
    parser.add_argument("--requests", type=int, default=32, help="of engine and stack, at least 8")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, after one that warms up")
    parser.add_argument("--json", type=Path, help="write the medians here")
    arguments = parser.parse_args()
    measured, shares = asyncio.run(measure(arguments.tokens, arguments.requests, arguments.rounds))
    show(measured, shares)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        written = measured | {"stack_over_engine": shares}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    from _processes import end_on_sigterm

    end_on_sigterm()
    main()
