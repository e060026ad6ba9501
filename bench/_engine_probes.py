"""What bench/engine.py measures of the engine beside its speed: switching, stalls, sharing and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from worker_svc.engine import Engine, EngineConfig, EngineRequest, ModelPair, StepResult, StoppingConfig

_ROUNDS = 20
_STEPS_WITHOUT = 100


def _request(name: str, prompt: Sequence[int], tokens: int, output: Sequence[int] = ()) -> EngineRequest:
    return EngineRequest(name, prompt, output, stopping=StoppingConfig(max_tokens=tokens, ignore_eos=True))


def _collect(outputs: dict[str, list[int]], result: StepResult) -> StepResult:
    for row, name in enumerate(result.request_ids):
        outputs[name] += result.tokens_of(row)
    return result


def _text(kinds: dict[str, list[list[int]]], tokens: int) -> list[int]:
    """So many tokens of the prompts, one after another, from the start again where they end."""
    every = [token for prompts in kinds.values() for prompt in prompts for token in prompt]
    return (every * (tokens // len(every) + 1))[:tokens]


def switching(pair: ModelPair, kinds: dict[str, list[list[int]]], held_tokens: int = 256) -> dict[str, float]:
    """Milliseconds of a step, and of preempting one request and resuming another, with the KV in a slot and
    in host memory.
    """
    result = {}
    for place, spare in (("resident", 8), ("swapped", 0)):
        engine = Engine(pair, EngineConfig(slots=4, spare_slots=spare, draft_tokens=0, prefix_sharing=False))
        prompt = _text(kinds, held_tokens)
        outputs: dict[str, list[int]] = {str(index): [] for index in range(5)}
        for name in list(outputs)[:4]:
            engine.add(_request(name, prompt, 400))
        _collect(outputs, engine.step())
        engine.preempt("0")
        engine.add(_request("4", prompt, 400))
        _collect(outputs, engine.step())
        times, steps, out = [], [], "0"
        for _ in range(_ROUNDS):
            steps.append(_collect(outputs, engine.step()).step_s)
            began = time.perf_counter()
            name = engine.running[0]
            engine.preempt(name)
            engine.add(_request(out, prompt, 400, tuple(outputs[out])))
            outside_s = time.perf_counter() - began
            # What the engine moved inside its step counts, what the caller waited outside counts too.
            told = _collect(outputs, engine.step())
            times.append(max(outside_s, told.switch_s))
            out = name
        result[f"step_ms_{place}"] = statistics.median(steps) * 1e3
        result[f"switch_ms_{place}"] = statistics.median(times) * 1e3
        result[f"steps_per_switch_{place}"] = statistics.median(times) / statistics.median(steps)
    return result


def stalls(
    pair: ModelPair, kinds: dict[str, list[list[int]]], batches: Sequence[int], rounds: int
) -> list[dict[str, float]]:
    """The gaps between tokens of running requests, without and while a prompt of 2,000 tokens (or what the
    context takes) arrives; the two take turns in one run.
    """
    rows = []
    for batch in batches:
        engine = Engine(pair, EngineConfig(slots=batch + 1, spare_slots=0, prefix_sharing=False))
        engine.calibrate()
        prompt = _text(kinds, min(2000, engine.context_tokens - 8))
        every = [one for prompts in kinds.values() for one in prompts]
        gaps: dict[str, list[float]] = {"without": [], "with": []}
        first_token_s = []
        started = 0
        for _ in range(rounds):
            arrival_s, ended = 0.0, False
            emitted_s: dict[str, float] = {}
            without = 0
            while not ended:
                # Running requests that have ended make room for others of the same kind.
                while len(engine.running) - bool(arrival_s) < batch:
                    engine.add(_request(f"running {started}", every[started % len(every)], 256))
                    started += 1
                if not arrival_s and without >= _STEPS_WITHOUT * batch:
                    engine.add(_request("long", prompt, 2))
                    arrival_s = time.perf_counter()
                told = engine.step()
                now_s = time.perf_counter()
                for name in told.request_ids:
                    if name == "long":
                        first_token_s.append(now_s - arrival_s)
                        ended = True
                    elif name in emitted_s:
                        gaps["with" if arrival_s else "without"].append(now_s - emitted_s[name])
                        without += not arrival_s
                    emitted_s[name] = now_s
            engine.drop("long")
        for name in engine.running:
            engine.drop(name)
        p99 = {name: statistics.quantiles(values, n=100)[98] for name, values in gaps.items()}
        rows.append(
            {
                "batch": batch,
                "prompt_tokens": len(prompt),
                "itl_p99_ms_without": p99["without"] * 1e3,
                "itl_p99_ms_with": p99["with"] * 1e3,
                "ratio": p99["with"] / p99["without"],
                "itl_p50_ms_without": statistics.median(gaps["without"]) * 1e3,
                "itl_p50_ms_with": statistics.median(gaps["with"]) * 1e3,
                "time_to_first_token_s": statistics.median(first_token_s),
            }
        )
    return rows


def sharing(pair: ModelPair, kinds: dict[str, list[list[int]]], rounds: int = 5) -> dict[str, float]:
    """Milliseconds to the first token of a prompt of 1,000 tokens, alone and behind one that shares 960."""
    engine = Engine(pair, EngineConfig(slots=2, spare_slots=2))
    length = min(1000, engine.context_tokens - 64)
    common = _text(kinds, length - 40)
    times: dict[str, list[float]] = {"alone": [], "shared": []}
    cached = 0
    for turn in range(rounds):
        engine.forget_kept()
        for place, kind in enumerate(times):
            engine.add(_request(kind, [*common, *[5 + turn + place] * 40], 1))
            began = time.perf_counter()
            while engine.running:
                cached = max(cached, *engine.step().cached_tokens.values(), 0)
            times[kind].append(time.perf_counter() - began)
    alone, shared = (statistics.median(values) * 1e3 for values in times.values())
    return {"prompt_tokens": length, "cached_tokens": cached, "alone_ms": alone, "shared_ms": shared}


def leftovers(pair: ModelPair, kinds: dict[str, list[list[int]]], requests: int = 200) -> dict[str, float]:
    """KV after so many requests have gone through 8 slots: of requests, kept for sharing, and after these
    were let go.
    """
    engine = Engine(pair, EngineConfig(slots=8))
    every = [one for prompts in kinds.values() for one in prompts]
    waiting = [_request(str(n), every[n % len(every)], 8 + n % 25) for n in range(requests)]
    most_bytes = 0
    while waiting or engine.running:
        while waiting and engine.free_slots:
            engine.add(waiting.pop())
        most_bytes = max(most_bytes, engine.step().kv.allocated_bytes)
    ended = engine.step().kv
    engine.forget_kept()
    emptied = engine.step().kv
    return {
        "requests": requests,
        "most_kv_bytes": most_bytes,
        "kv_tokens_of_requests": ended.tokens,
        "kv_host_bytes": ended.host_bytes,
        "kv_tokens_kept_for_sharing": ended.kept_tokens,
        "kv_bytes_when_let_go": emptied.allocated_bytes,
    }
