"""Tokens per second of the engine beside transformers, in one run, on one thread, in fp32, greedy.

    OMP_WAIT_POLICY=PASSIVE python bench/engine.py --json

Contenders take turns, round after round, and each is judged by its fastest round, so that a busy machine
troubles all alike; only the ratios of one run mean anything. All outputs are compared: a contender that
decodes other tokens than transformers' generate is marked. After the race: how well step times are foreseen,
what preemption costs, how long others wait for a long prompt, what a shared prefix saves, and what is left in
memory. With `--json` all of it goes to bench/results/engine.json, or to the file named.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from _contenders import Ours, contenders, read_prompts
from _engine_probes import leftovers, sharing, stalls, switching

from worker_svc.engine import load_pair

ROOT = Path(__file__).resolve().parent.parent
TARGET_ONLY = "engine, target only"
ADAPTIVE = "engine, adaptive"
RESULTS = ROOT / "bench/results/engine.json"


def race(
    found: dict[str, Any], prompts: dict[str, list[list[int]]], batches: list[int], rounds: int, tokens: int
) -> dict[int, dict[str, dict[str, float]]]:
    """Tokens per second: batch -> contender -> kind, and over all kinds under 'all'; 'equal' is 1 or 0."""
    table: dict[int, dict[str, dict[str, float]]] = {}
    for batch in batches:
        seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(lambda: float("inf")))
        equal: dict[str, bool] = defaultdict(lambda: True)
        for turn in range(rounds):
            for kind, ids in prompts.items():
                chosen = [ids[index % len(ids)] for index in range(batch)]
                reference: list[list[int]] | None = None
                for name, contender in found.items():
                    if not contender.takes(batch):
                        continue
                    run = contender.run(chosen, kind)
                    seconds[name][kind] = min(seconds[name][kind], run.seconds)
                    reference = reference or run.outputs
                    equal[name] &= run.outputs == reference
            print(f"  batch {batch}: round {turn + 1} of {rounds} done", file=sys.stderr, flush=True)
        table[batch] = {}
        for name, kinds in seconds.items():
            rates = {kind: batch * tokens / spent for kind, spent in kinds.items()}
            rates["all"] = batch * tokens * len(kinds) / sum(kinds.values())
            rates["equal"] = float(equal[name])
            table[batch][name] = rates
    return table


def print_race(table: dict[int, dict[str, dict[str, float]]]) -> None:
    for batch, rows in table.items():
        ours = rows[TARGET_ONLY]["all"]
        theirs = max(row["all"] for name, row in rows.items() if name.startswith("transformers"))
        kinds = [kind for kind in next(iter(rows.values())) if kind not in ("all", "equal")]
        print(
            f"\nbatch {batch}, tokens/s {'':12}" + "".join(f"{kind:>10}" for kind in [*kinds, "all"]), end=""
        )
        print("   x target only   x best of transformers")
        for name, row in rows.items():
            print(f"{name:32}" + "".join(f"{row[kind]:10.0f}" for kind in [*kinds, "all"]), end="")
            mark = "" if row["equal"] else "   other tokens than transformers generate"
            print(f"{row['all'] / ours:16.2f}{row['all'] / theirs:25.2f}{mark}")


def speculation(contender: Ours) -> list[dict[str, Any]]:
    """Acceptance and chosen draft length by kind and batch, and how well the step time was foreseen."""
    rows = []
    for (kind, batch), told in sorted(contender.steps.items(), key=lambda item: (item[0][1], item[0][0])):
        rows.append(
            {
                "kind": kind,
                "batch": batch,
                "acceptance": told.accepted / told.drafted if told.drafted else None,
                "drafted_per_step": told.drafted / told.rows,
                "tokens_per_step": 1 + told.accepted / told.rows,
                "median_step_time_error": statistics.median(map(abs, told.errors)) if told.errors else None,
                "drafters": {
                    drafter: {
                        "share": told.rows_of[drafter] / told.rows,
                        "mean_length": told.drafted_of[drafter] / told.rows_of[drafter],
                        "accepted_per_step": told.accepted_of[drafter] / told.rows_of[drafter],
                    }
                    for drafter in sorted(told.rows_of)
                },
            }
        )
    return rows


def print_speculation(rows: list[dict[str, Any]]) -> None:
    print("\nadaptive: batch, kind      acceptance  drafted/step  tokens/step  step time off by (median)")
    for row in rows:
        acceptance = f"{row['acceptance']:.2f}" if row["acceptance"] is not None else "-"
        error = f"{row['median_step_time_error']:.0%}" if row["median_step_time_error"] is not None else "-"
        print(
            f"{row['batch']:8}, {row['kind']:14}{acceptance:>12}{row['drafted_per_step']:14.2f}"
            f"{row['tokens_per_step']:13.2f}{error:>27}"
        )


def print_drafters(rows: list[dict[str, Any]]) -> None:
    names = ("draft", "lookup", "none")
    print("\nadaptive: share of rows, mean length, accepted of it")
    print("   batch, kind    " + "".join(f"{name:>20}" for name in names))
    for row in rows:
        print(f"{row['batch']:8}, {row['kind']:8}", end="")
        for name in names:
            told = row["drafters"].get(name)
            text = (
                f"{told['share']:.0%} {told['mean_length']:.1f} {told['accepted_per_step']:.1f}"
                if told
                else "-"
            )
            print(f"{text:>20}", end="")
        print()


def step_time_errors(contender: Ours) -> dict[int, dict[str, float]]:
    """By batch: median of |expected / measured - 1| over steps without prefill, and of the signed error."""
    found: dict[int, list[float]] = defaultdict(list)
    for (_, batch), told in contender.steps.items():
        found[batch] += told.errors
    return {
        batch: {
            "steps": len(errors),
            "median_absolute": statistics.median(map(abs, errors)),
            "median_signed": statistics.median(errors),
        }
        for batch, errors in sorted(found.items())
        if errors
    }


def print_probes(report: dict[str, Any]) -> None:
    print("\nstep time, expected against measured (median): ", end="")
    print(
        ", ".join(
            f"batch {batch} off by {row['median_absolute']:.1%} (bias {row['median_signed']:+.1%})"
            for batch, row in report["step_time_errors"].items()
        )
    )
    switch = report["switching"]
    print("preempting one request and resuming another, 256 tokens held:")
    for place in ("resident", "swapped"):
        print(
            f"  {place}: {switch[f'switch_ms_{place}']:.2f} ms, "
            f"{switch[f'steps_per_switch_{place}']:.2f} of a step of {switch[f'step_ms_{place}']:.2f}"
        )
    print("gaps between tokens of running requests while a long prompt arrives (p99):")
    for row in report["stalls"]:
        print(
            f"  {row['batch']} running, {row['prompt_tokens']} tokens: {row['itl_p99_ms_without']:.1f} ms "
            f"without, {row['itl_p99_ms_with']:.1f} with: x {row['ratio']:.2f}; "
            f"first token after {row['time_to_first_token_s']:.2f} s"
        )
    shared = report["sharing"]
    print(
        f"first token of {shared['prompt_tokens']} tokens: {shared['alone_ms']:.0f} ms alone, "
        f"{shared['shared_ms']:.0f} ms with {shared['cached_tokens']} of them shared"
    )
    left = report["memory"]
    print(
        f"{left['requests']} requests through 8 slots: {left['kv_tokens_of_requests']} tokens of KV and "
        f"{left['kv_host_bytes']} bytes in the host are left of them, {left['kv_tokens_kept_for_sharing']} "
        f"tokens kept for sharing, {left['kv_bytes_when_let_go']} bytes when these are let go; "
        f"at most {left['most_kv_bytes'] / 2**20:.1f} MiB of KV"
    )
    print(f"peak RSS {report['peak_rss_mib']:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--target", type=Path, default=ROOT / "models/tiny/target")
    parser.add_argument("--draft", type=Path, default=ROOT / "models/tiny/draft")
    parser.add_argument("--prompts", type=Path, default=ROOT / "models/tiny/prompts.jsonl")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each prompt")
    parser.add_argument("--kinds", type=int, default=3, help="kinds of prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--draft-tokens", type=int, default=6, help="upper bound of the adaptive draft length"
    )
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"write all figures to this file ({RESULTS.name})"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    pair = load_pair(options.target, options.draft)
    found = read_prompts(options.prompts, pair, pair.context_tokens - options.tokens - 16)
    prompts = dict(list(found.items())[: options.kinds])
    found = contenders(pair, options.tokens, max(options.batches), options.draft_tokens)
    table = race(found, prompts, options.batches, options.rounds, options.tokens)
    report: dict[str, Any] = {
        "race": table,
        "speculation": speculation(found[ADAPTIVE]),
        "step_time_errors": step_time_errors(found[ADAPTIVE]),
        "switching": switching(pair, prompts),
        "stalls": stalls(
            pair, prompts, [min(size, 8) for size in options.batches if size < 16], options.rounds
        ),
        "sharing": sharing(pair, prompts),
        "memory": leftovers(pair, prompts),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": time.perf_counter() - began,
    }
    print_race(table)
    print_speculation(report["speculation"])
    print_drafters(report["speculation"])
    print_probes(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
