"""Measuring the cost of drafting, verifying and prefilling before the first request comes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .config import EngineConfig
from .costs import PrefillCost, StepCosts
from .forward import Runner

_REPEATS = 3
# On a GPU the first passes of a shape are those in which it is recorded and checked.
_REPEATS_ON_GPU = 6
_HELD_TOKENS = 128
_LONG_TOKENS = 1024
_CHUNK_TOKENS = 128
# Beyond 4 the cost grows smoothly enough for an estimate between neighbours.
_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16)


@torch.inference_mode()
def calibrate(
    runners: Sequence[Runner], config: EngineConfig, context_tokens: int, costs: StepCosts, budget_s: float
) -> None:
    """Fills the cost tables at 1, 2, 4 ... slots rows and the draft lengths that may be asked for, best of a
    few runs, within the budget.

    The caches' contents are overwritten. Points that the budget leaves out are estimated from the others.
    """
    held = min(_HELD_TOKENS, context_tokens // 2)
    deadline = time.perf_counter() + budget_s
    lengths = _lengths(config, len(runners))
    points = [(rows, length) for rows in _batch_sizes(config.slots) for length in lengths]
    # The corners first: four points are enough for a fit, and the fit should not have to guess beyond them.
    extremes = (1, config.slots), (0, lengths[-1])
    points.sort(key=lambda point: (point[0] not in extremes[0]) + (point[1] not in extremes[1]))
    for count, (rows, length) in enumerate(points):
        if count >= 4 and time.perf_counter() > deadline:
            break
        costs.verify.set(rows, length + 1, _best_s(runners[0], rows, [length + 1], held))
        if 0 < length <= config.draft_tokens and len(runners) > 1:
            costs.draft.set(rows, length, _best_s(runners[1], rows, [2] + [1] * (length - 1), held))
    costs.held_tokens = held
    long = min(_LONG_TOKENS, context_tokens - lengths[-1] - 1)
    costs.kv_s = _kv_s(runners[0], min(4, config.slots), min(4, lengths[-1]), held, long)
    _measure_prefill(runners[0], costs.prefill, context_tokens)
    if len(runners) > 1:
        _measure_prefill(runners[1], costs.draft_prefill, context_tokens)
    costs.calibrated = True


def _batch_sizes(slots: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 <= slots:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == slots else [*sizes, slots]


def _lengths(config: EngineConfig, models: int) -> list[int]:
    longest = max(
        config.draft_tokens if models > 1 else 0, config.lookup_tokens if config.prompt_lookup else 0
    )
    return sorted({length for length in _LENGTHS if length < longest} | {longest})


def _kv_s(runner: Runner, rows: int, drafted: int, held: int, long: int) -> tuple[float, float]:
    """Seconds for each row and token of KV, as (a, b) in a + b * width; zeros where the context is too short
    to tell.
    """
    if long < 2 * held:
        return 0.0, 0.0
    widths = (1, drafted + 1)
    slopes = [
        (_best_s(runner, rows, [width], long) - _best_s(runner, rows, [width], held)) / (rows * (long - held))
        for width in widths
    ]
    if drafted == 0:
        return max(slopes[0], 0.0), 0.0
    by_width = max((slopes[1] - slopes[0]) / drafted, 0.0)
    return max(slopes[0] - by_width, 0.0), by_width


def _measure_prefill(runner: Runner, cost: PrefillCost, context_tokens: int) -> None:
    """Three chunks tell the three parts: a short one, a long one, and the long one behind many tokens."""
    long = min(_CHUNK_TOKENS, context_tokens // 2)
    short = max(1, long // 8)
    start = min(_LONG_TOKENS, context_tokens - long)
    short_s, long_s, late_s = (
        _best_s(runner, 1, [width], held, logits=1) for width, held in ((short, 0), (long, 0), (long, start))
    )
    pair_s = max(late_s - long_s, 0.0) / (long * start)
    token_s = max((long_s - short_s) / (long - short) - 0.5 * (long + short) * pair_s, 0.1 * long_s / long)
    cost.set(short_s - short * token_s - 0.5 * short * short * pair_s, token_s, pair_s)


def _best_s(runner: Runner, rows: int, widths: Sequence[int], held: int, logits: int = 0) -> float:
    """Seconds of passes of the given widths one after another, with the choice of a token after each.

    logits: positions whose logits are wanted, 0 for all.
    """
    best = float("inf")
    on_gpu = runner.cache.device.type == "cuda"
    # What one thread computes by itself is not to look slower for the processes that start beside it.
    alone = runner.cache.device.type == "cpu" and torch.get_num_threads() == 1
    now = time.thread_time if alone else time.perf_counter
    for _ in range(_REPEATS_ON_GPU if on_gpu else _REPEATS):
        began = now()
        for width in widths:
            tokens = torch.zeros((rows, width), dtype=torch.long, device=runner.cache.device)
            chosen = runner.forward(tokens, 0, [held] * rows, logits or width).argmax(-1)
        chosen.tolist()
        best = min(best, now() - began)
    return best
