"""Tokens per second of the engine beside transformers, in one run, on one thread, in fp32, greedy.

    OMP_WAIT_POLICY=PASSIVE python bench/engine.py --json .bench/engine.json

Contenders take turns, round after round, and each is judged by its fastest round, so that a busy machine
troubles all alike; only the ratios of one run mean anything. All outputs are compared: a contender that
decodes other tokens than transformers' generate is marked.
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
from _contenders import Ours, contenders

from worker_svc.engine import Engine, EngineConfig, EngineRequest, ModelPair, StoppingConfig, load_pair

ROOT = Path(__file__).resolve().parent.parent
TARGET_ONLY = "engine, target only"
ADAPTIVE = "engine, adaptive"


def read_prompts(path: Path, pair: ModelPair, kinds: int, longest: int) -> dict[str, list[list[int]]]:
    """Token ids by kind of prompt."""
    found: dict[str, list[list[int]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "messages" in entry:
            ids = pair.tokenizer.apply_chat_template(
                entry["messages"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        else:
            ids = pair.tokenizer(entry["text"]).input_ids
        if ids:
            found[entry["kind"]].append(list(ids)[:longest])
    return dict(list(found.items())[:kinds])


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
                "median_step_time_error": statistics.median(told.errors) if told.errors else None,
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


def switching(pair: ModelPair, held_tokens: int) -> dict[str, float]:
    """Milliseconds of a step, and of preempting one request and resuming another, in slots and from host
    memory.
    """
    result = {}
    for place, spare in (("slot", 8), ("host", 0)):
        engine = Engine(pair, EngineConfig(slots=4, spare_slots=spare, draft_tokens=0))
        prompt = [3 + index % 97 for index in range(held_tokens)]
        outputs: dict[str, list[int]] = {str(index): [] for index in range(5)}
        stopping = StoppingConfig(max_tokens=200, ignore_eos=True)

        def step(engine: Engine = engine, outputs: dict[str, list[int]] = outputs) -> Any:
            result = engine.step()
            for row, name in enumerate(result.request_ids):
                outputs[name] += result.tokens_of(row)
            return result

        for name in list(outputs)[:4]:
            engine.add(EngineRequest(name, prompt, stopping=stopping))
        step()
        engine.preempt("0")
        engine.add(EngineRequest("4", prompt, stopping=stopping))
        step()
        times, steps, out = [], [], "0"
        for _ in range(20):
            steps.append(step().step_s)
            began = time.perf_counter()
            name = engine.running[0]
            engine.preempt(name)
            engine.add(EngineRequest(out, prompt, tuple(outputs[out]), stopping=stopping))
            outside = time.perf_counter() - began
            # What the engine moved inside its step counts, what the caller waited outside counts too.
            told = step()
            times.append(max(outside, told.switch_s))
            out = name
        result[f"step_ms ({place})"] = statistics.median(steps) * 1e3
        result[f"switch_ms ({place})"] = statistics.median(times) * 1e3
    return result


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
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = load_pair(options.target, options.draft)
    prompts = read_prompts(options.prompts, pair, options.kinds, pair.context_tokens - options.tokens - 16)
    found = contenders(pair, options.tokens, max(options.batches), options.draft_tokens)
    table = race(found, prompts, options.batches, options.rounds, options.tokens)
    print_race(table)
    spoken = speculation(found[ADAPTIVE])
    print_speculation(spoken)
    print_drafters(spoken)
    switches = switching(pair, 256)
    print(
        "\nswitching at 256 tokens held: "
        + ", ".join(f"{key} {value:.2f}" for key, value in switches.items())
    )
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak RSS {peak_mib:.0f} MiB")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"race": table, "speculation": spoken, "switching": switches, "peak_rss_mib": peak_mib}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
