"""Measuring the cost of drafting and verifying before the first request comes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .config import EngineConfig
from .costs import StepCosts
from .forward import Runner

_REPEATS = 3
_HELD_TOKENS = 128


@torch.inference_mode()
def calibrate(
    runners: Sequence[Runner], config: EngineConfig, context_tokens: int, costs: StepCosts, budget_s: float
) -> None:
    """Fills the cost tables at 1, 2, 4 ... slots rows and every draft length, best of a few runs, within the
    budget.

    The caches' contents are overwritten. Points that the budget leaves out are estimated from the others.
    """
    held = min(_HELD_TOKENS, context_tokens // 2)
    deadline = time.perf_counter() + budget_s
    points = [
        (rows, length) for rows in _batch_sizes(config.slots) for length in _lengths(config, len(runners))
    ]
    # The corners first: four points are enough for a fit, and the fit should not have to guess beyond them.
    extremes = (1, config.slots), (0, points[-1][1])
    points.sort(key=lambda point: (point[0] not in extremes[0]) + (point[1] not in extremes[1]))
    for count, (rows, length) in enumerate(points):
        if count >= 4 and time.perf_counter() > deadline:
            break
        costs.verify.set(rows, length + 1, _best_s(runners[0], rows, [length + 1], held))
        if length and len(runners) > 1:
            costs.draft.set(rows, length, _best_s(runners[1], rows, [2] + [1] * (length - 1), held))
    costs.calibrated = True
    prefill = min(64, context_tokens // 2)
    costs.prefill_s_per_token = _best_s(runners[0], 1, [prefill], 0) / prefill
    if len(runners) > 1:
        costs.draft_prefill_s_per_token = _best_s(runners[1], 1, [prefill], 0) / prefill


def _batch_sizes(slots: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 <= slots:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == slots else [*sizes, slots]


def _lengths(config: EngineConfig, models: int) -> range:
    return range(config.draft_tokens + 1 if models > 1 or config.prompt_lookup else 1)


def _best_s(runner: Runner, rows: int, widths: Sequence[int], held: int) -> float:
    """Seconds of passes of the given widths one after another, with the choice of a token after each."""
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for width in widths:
            tokens = torch.zeros((rows, width), dtype=torch.long, device=runner.cache.device)
            logits = runner.forward(tokens, 0, [held] * rows, width)
            chosen = logits.argmax(-1)
        chosen.tolist()
        best = min(best, time.perf_counter() - began)
    return best
