"""Tokens per second of the engine beside vLLM on the same weights and prompts: fp32, greedy, one thread each.

    make peers          (sets up vLLM in .bench/vllm, then runs this with --json bench/results/peers.json)

Every mode of vLLM is a process of its own that waits while others run; contenders take turns round after
round, and each is judged by its fastest round, so a busy machine troubles all alike. Outputs are compared
token for token with the engine's target-only ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _contenders import Ours, read_prompts
from _processes import bound_to_us, end_on_sigterm

from worker_svc.engine import ModelPair, load_pair

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "engine, target only"
ADAPTIVE = "engine, adaptive"


@dataclass
class Told:
    """What one contender did at one batch size."""

    seconds: float = float("inf")
    cpu_seconds: float = 0.0
    prompts: int = 0
    equal: int = 0
    first_difference: list[int] = field(default_factory=list)
    drafted: float = 0.0
    accepted: float = 0.0


class Vllm:
    """One mode of vLLM in its own process."""

    def __init__(self, python: Path, log: Path, options: argparse.Namespace, *mode: str) -> None:
        openmp = python.parent.parent / "lib" / "libiomp5.so"
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            # Without it the lookup's own threads and OpenMP's wait for each other.
            "NUMBA_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(log.parent / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # vLLM's own advice for CPUs.
            **({"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}),
        }
        environment.pop("PYTHONPATH", None)
        command = [
            str(python), str(ROOT / "bench" / "peers_vllm.py"), "--target", str(options.target),
            "--tokens", str(options.tokens), "--batch", str(max(options.batches)), *mode,
        ]  # fmt: skip
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                bound_to_us(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        self.version: str = self._read()["ready"]

    def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        if self._process.stdin is None:
            raise AssertionError("stdin is piped")
        self._process.stdin.write(json.dumps({"prompts": prompts}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise SystemExit(f"vLLM ended; its log is {self._log}")
        reply: dict[str, Any] = json.loads(line)
        return reply


class Engine:
    """The engine in one configuration, in this process."""

    def __init__(self, pair: ModelPair, options: argparse.Namespace, **config: Any) -> None:
        self._ours = Ours(pair, options.tokens, max(options.batches), **config)

    def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        told = self._ours.steps["", len(prompts)]
        drafted, accepted, cpu = told.drafted, told.accepted, time.process_time()
        run = self._ours.run(prompts, "")
        return {
            "seconds": run.seconds,
            "cpu_seconds": time.process_time() - cpu,
            "outputs": run.outputs,
            "drafted": told.drafted - drafted,
            "accepted": told.accepted - accepted,
        }

    def close(self) -> None:
        return None


def mixed_prompts(path: Path, pair: ModelPair, longest: int) -> list[list[int]]:
    """All prompts as token ids, kinds taking turns, so that every batch is a mixture of them."""
    kinds = read_prompts(path, pair, longest)
    columns = max(map(len, kinds.values()))
    return [rows[place] for place in range(columns) for rows in kinds.values() if place < len(rows)]


def race(
    found: dict[str, Any], prompts: list[list[int]], options: argparse.Namespace
) -> dict[int, dict[str, Told]]:
    table: dict[int, dict[str, Told]] = {}
    for batch in options.batches:
        groups = [
            [prompts[(group * batch + row) % len(prompts)] for row in range(batch)]
            for group in range(options.groups)
        ]
        best: dict[str, list[float]] = {name: [float("inf")] * len(groups) for name in found}
        table[batch] = {name: Told() for name in found}
        # Round 0 warms up: kernels are compiled and caches grow at their first use.
        for turn in range(options.rounds + 1):
            for place, group in enumerate(groups):
                expected: list[list[int]] = []
                for name, contender in found.items():
                    reply = contender.run(group)
                    if name == REFERENCE:
                        expected = reply["outputs"]
                    if turn == 0:
                        continue
                    told = table[batch][name]
                    best[name][place] = min(best[name][place], reply["seconds"])
                    told.cpu_seconds = max(told.cpu_seconds, reply["cpu_seconds"] / reply["seconds"])
                    told.drafted += reply["drafted"]
                    told.accepted += reply["accepted"]
                    if turn == 1:
                        compare(told, expected, reply["outputs"])
            print(f"  batch {batch}: round {turn} of {options.rounds} done", file=sys.stderr, flush=True)
        for name, seconds in best.items():
            table[batch][name].seconds = sum(seconds)
    return table


def compare(told: Told, expected: list[list[int]], outputs: list[list[int]]) -> None:
    for ours, theirs in zip(expected, outputs, strict=True):
        told.prompts += 1
        if ours == theirs:
            told.equal += 1
        else:
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            told.first_difference.append(same)


def report(table: dict[int, dict[str, Told]], options: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; returns the same figures for JSON."""
    figures: dict[str, Any] = {}
    for batch, rows in table.items():
        generated = batch * options.tokens * options.groups
        best = max(generated / told.seconds for name, told in rows.items() if name.startswith("vllm"))
        print(
            f"\nbatch {batch:3}                 tokens/s  x best of vLLM  accepted  cpu/wall  equal outputs"
        )
        figures[str(batch)] = {}
        for name, told in rows.items():
            rate = generated / told.seconds
            share = told.accepted / told.drafted if told.drafted else None
            shown = f"{share:.2f}" if share is not None else "-"
            differs = f", first differ at {sorted(told.first_difference)}" if told.first_difference else ""
            print(
                f"{name:24}{rate:12.0f}{rate / best:16.2f}{shown:>10}{told.cpu_seconds:10.2f}"
                f"  {told.equal} of {told.prompts}{differs}"
            )
            figures[str(batch)][name] = {
                "tokens_per_s": rate,
                "ratio_to_best_of_vllm": rate / best,
                "acceptance": share,
                "max_cpu_per_wall": told.cpu_seconds,
                "equal_outputs": told.equal,
                "outputs": told.prompts,
                "first_differences": sorted(told.first_difference),
            }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--target", type=Path, default=ROOT / "models/tiny/target")
    parser.add_argument("--draft", type=Path, default=ROOT / "models/tiny/draft")
    parser.add_argument("--prompts", type=Path, default=ROOT / "models/tiny/prompts.jsonl")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".bench/vllm/bin/python", help="Python of vLLM")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each prompt")
    parser.add_argument("--groups", type=int, default=3, help="different batches of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--draft-lengths", type=int, nargs="+", default=[2, 4], help="vLLM's, one process each"
    )
    parser.add_argument(
        "--draft-tokens", type=int, default=6, help="upper bound of the engine's draft length"
    )
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation: starts faster")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if not options.vllm.exists():
        raise SystemExit(f"no vLLM at {options.vllm}; make peers sets it up")
    torch.set_num_threads(1)
    pair = load_pair(options.target, options.draft)
    prompts = mixed_prompts(options.prompts, pair, 512)
    eager = ["--eager"] if options.eager else []
    modes = {"vllm, target only": eager}
    for length in options.draft_lengths:
        modes[f"vllm, draft of {length}"] = [
            "--draft",
            str(options.draft),
            "--draft-tokens",
            str(length),
            *eager,
        ]
    modes["vllm, ngram of 4"] = ["--ngram", "--draft-tokens", "4", *eager]
    logs = ROOT / ".bench"
    logs.mkdir(exist_ok=True)
    found: dict[str, Any] = {
        REFERENCE: Engine(pair, options, draft_tokens=0),
        ADAPTIVE: Engine(pair, options, draft_tokens=options.draft_tokens),
    }
    version = ""
    try:
        for index, (name, mode) in enumerate(modes.items()):
            print(f"  starting {name}", file=sys.stderr, flush=True)
            found[name] = Vllm(options.vllm, logs / f"peers-{index}.log", options, *mode)
            version = found[name].version
        table = race(found, prompts, options)
    finally:
        for contender in found.values():
            contender.close()
    print(f"vLLM {version}, {'without' if options.eager else 'with'} its compilation; fp32, one thread")
    figures = report(table, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        described = {"vllm": version, "tokens": options.tokens, "batches": figures}
        options.json.write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    end_on_sigterm()
    main()
