"""Tokens per second in one run: transformers, the engine alone, and the whole stack.

    python bench/stack.py [--tokens 128] [--long-tokens 384] [--requests 32] [--rounds 9] [--json OUT]

The built-in pair, fp32, one compute thread each, prompts of three kinds, every request exactly `--tokens`
long.
At 1 and at 8 requests at a time: engine and stack get `--requests` of them, and the next one whenever one has
ended; transformers, which cannot take one into a running batch, gets 8. Engine and stack do the same once
more at 8 with requests of `--long-tokens`: much of what a stack costs is by the request. (Of the 19,366
answers in Azure's published trace of conversations half are longer than 129 tokens, three in ten longer than
384.) Machines differ and drift, within
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
from typing import Any, NamedTuple

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
SLOTS = 8
REFERENCE_ROUNDS = 3
"""Measured rounds of what only the speed is compared with: transformers is slow, and its ratio large."""
Prompts = Sequence[list[int]]


class Case(NamedTuple):
    """How many requests at a time, and the output tokens of each."""

    concurrency: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.concurrency} at a time, {self.tokens} tokens"


def load_prompts(count: int, round_number: int) -> list[list[int]]:
    """`count` prompts as token ids, the kinds in turn. Those of each round begin with its number: whoever has
    kept the KV of an earlier round would otherwise have less to compute, the engine alone more of it than
    the one of a stack, which holds finished requests until their end is stored.
    """
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN_TARGET)
    lines = (Path(BUILT_IN_TARGET).parent / "prompts.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "text" in record]
    by_kind = [[record["text"] for record in records if record["kind"] == kind] for kind in KINDS]
    chosen = [by_kind[n % len(KINDS)][n // len(KINDS) % len(by_kind[n % len(KINDS)])] for n in range(count)]
    return [tokenizer.encode(f"{round_number}\n{text}") for text in chosen]


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

    def run(self, prompts: Prompts, case: Case) -> float:
        """Tokens per second of the first prompts."""
        prompts = prompts[:SLOTS]
        began_s = time.perf_counter()
        for first in range(0, len(prompts), case.concurrency):
            self._batch(prompts[first : first + case.concurrency], case.tokens)
        return len(prompts) * case.tokens / (time.perf_counter() - began_s)

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

    def run(self, prompts: Prompts, case: Case) -> float:
        """Tokens per second of all prompts; when a request ends the next one comes."""
        began_s = time.perf_counter()
        stopping = StoppingConfig(max_tokens=case.tokens, ignore_eos=True)
        waiting = [
            EngineRequest(str(number), prompt, stopping=stopping) for number, prompt in enumerate(prompts)
        ][::-1]
        while waiting or self.engine.running:
            while waiting and len(self.engine.running) < case.concurrency:
                self.engine.add(waiting.pop())
            result = self.engine.step()
            self.row_steps += len(result.request_ids)
            for request_id, finish in zip(result.request_ids, result.finish, strict=True):
                if finish is not None:
                    self.engine.drop(request_id)
        return len(prompts) * case.tokens / (time.perf_counter() - began_s)


async def stack_tokens_per_s(client: AsyncClient, prompts: Prompts, case: Case) -> tuple[float, int]:
    """The same through the gateway: a client that keeps so many requests under way. Beside the speed the
    steps of all requests together."""
    began_s = time.perf_counter()
    slots = asyncio.Semaphore(case.concurrency)

    async def one(prompt: list[int]) -> int:
        async with slots:
            made = await client.generate(prompt, max_tokens=case.tokens, ignore_eos=True)
            assert len(made.token_ids) == case.tokens
            return made.speculation.num_steps

    steps = await asyncio.gather(*map(one, prompts))
    return len(prompts) * case.tokens / (time.perf_counter() - began_s), sum(steps)


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


Medians = dict[str, dict[Case, float]]
Shares = dict[Case, list[float]]


class Figures:
    """Measurements by name and case, without those of the round that warms up."""

    def __init__(self) -> None:
        self.warm_up = True
        self._seen: defaultdict[str, defaultdict[Case, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, case: Case, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not self.warm_up:
                self._seen[name][case].append(value)

    def medians(self) -> Medians:
        return {
            name: {case: statistics.median(each) for case, each in by_case.items()}
            for name, by_case in self._seen.items()
        }

    def shares(self, name: str, of: str) -> Shares:
        """By case: one over the other in each round."""
        return {
            case: [mine / other for mine, other in zip(each, self._seen[of][case], strict=True)]
            for case, each in self._seen[name].items()
        }


async def measure(cases: Sequence[Case], requests: int, rounds: int) -> tuple[dict[str, Medians], Shares]:
    """Medians by name and case, and of each round what the stack did over the engine alone. What they are
    compared with gets the cases of the first length only."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    settings = Settings(workers=1, slots=SLOTS, threads=1)
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
                prompts = load_prompts(requests, round_number)
                for figures in (speeds, cpu_s, waits_s, gains):
                    figures.warm_up = round_number == 0
                for case in cases:
                    thousands = len(prompts) * case.tokens / 1000
                    references = round_number <= REFERENCE_ROUNDS and case.tokens == cases[0].tokens
                    for name, run in runners.items():
                        if name != "engine" and not references:
                            continue
                        began_s, engine.row_steps = time.thread_time(), 0
                        speed = run(prompts, case)
                        if name == "engine":
                            spent_s = time.thread_time() - began_s
                            cpu_s.add(case, {"engine alone": spent_s / thousands})
                            gains.add(case, {"engine": thousands * 1000 / engine.row_steps})
                        tell(speeds, name, case, speed)
                    before, waits = cpu_by_thread(stack), waits_by_thread(worker_pid)
                    began_s = time.perf_counter()
                    speed, steps = await stack_tokens_per_s(client, prompts, case)
                    waited_s = engine_waits(waits, waits_by_thread(worker_pid), time.perf_counter() - began_s)
                    parts = cpu_by_part(before, cpu_by_thread(stack))
                    cpu_s.add(case, {part: spent_s / thousands for part, spent_s in parts.items()})
                    waits_s.add(case, {why: wait_s / thousands for why, wait_s in waited_s.items()})
                    gains.add(case, {"whole stack": thousands * 1000 / steps})
                    tell(speeds, "whole stack", case, speed)
    medians = {
        "tokens_per_s": speeds.medians(),
        "cpu_s_per_1000_tokens": cpu_s.medians(),
        "engine_thread_s_per_1000_tokens": waits_s.medians(),
        "tokens_per_step": gains.medians(),
    }
    return medians, speeds.shares("whole stack", of="engine")


def tell(speeds: Figures, name: str, case: Case, speed: float) -> None:
    kind = "warm-up" if speeds.warm_up else "measured"
    print(f"  {kind}: {name}, {case}: {speed:.0f} tokens/s", flush=True)
    speeds.add(case, {name: speed})


def show(measured: dict[str, Medians], shares: Shares) -> None:
    speeds = measured["tokens_per_s"]
    base = speeds["engine, target only"]
    heads = "".join(f"{case!s:>28}" for case in base)
    print(f"\n{'tokens/s (and times the engine, target only)':<46}{heads}")
    for name, by_case in speeds.items():
        cells = (f"{by_case[case]:>20.0f} ({by_case[case] / base[case]:.2f}x)" for case in base)
        print(f"{name:<46}{''.join(cells)}")
    for case, ratios in shares.items():
        rounds = ", ".join(f"{share:.2f}" for share in sorted(ratios))
        print(f"whole stack / engine alone, {case}: {statistics.median(ratios):.2f} (median of {rounds})")
        for title, key in (
            ("CPU seconds per 1,000 tokens", "cpu_s_per_1000_tokens"),
            ("the worker's engine, seconds per 1,000 tokens", "engine_thread_s_per_1000_tokens"),
            ("tokens of a request in a step", "tokens_per_step"),
        ):
            told = ", ".join(f"{name} {values[case]:.2f}" for name, values in measured[key].items())
            print(f"  {title}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each request")
    parser.add_argument("--long-tokens", type=int, default=384, help="the same of the long ones; 0: none")
    parser.add_argument("--requests", type=int, default=32, help="of engine and stack, at least 8")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, after one that warms up")
    parser.add_argument("--json", type=Path, help="write the medians here")
    arguments = parser.parse_args()
    cases = [Case(1, arguments.tokens), Case(SLOTS, arguments.tokens)]
    if arguments.long_tokens:
        cases.append(Case(SLOTS, arguments.long_tokens))
    measured, shares = asyncio.run(measure(cases, arguments.requests, arguments.rounds))
    show(measured, shares)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        written = {
            figure: {
                name: {str(case): value for case, value in values.items()} for name, values in named.items()
            }
            for figure, named in measured.items()
        }
        ratios = {str(case): each for case, each in shares.items()}
        arguments.json.write_text(json.dumps(written | {"stack_over_engine": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    from _processes import end_on_sigterm

    end_on_sigterm()
    main()
