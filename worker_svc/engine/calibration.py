"""Measuring the cost of drafting, verifying and prefilling before the first request comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .clock import BusyClock
from .config import EngineConfig
from .costs import PrefillCost, StepCosts
from .forward import Runner

_ROUNDS = 3
# On a GPU the first passes of a shape are those in which it is recorded and checked.
_ROUNDS_ON_GPU = 6
_FIRST_ROUND_SHARE_ON_GPU = 0.5
_HELD_TOKENS = 128
_LONG_TOKENS = 1024
_CHUNK_TOKENS = 128
# Beyond 4 the cost grows smoothly enough for an estimate between neighbours.
_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class _Probe:
    """Passes of the given widths one after another over `rows` rows that hold `held` tokens, with the choice
    of a token after each. logits: positions whose logits are wanted, 0 for all.
    """

    runner: Runner
    rows: int
    widths: tuple[int, ...]
    held: int
    logits: int = 0

    def seconds(self, clock: BusyClock) -> float:
        began_s = clock.now_s()
        for width in self.widths:
            tokens = torch.zeros((self.rows, width), dtype=torch.long, device=self.runner.cache.device)
            held = [self.held] * self.rows
            chosen = self.runner.forward(tokens, range(self.rows), held, self.logits or width).argmax(-1)
        chosen.tolist()
        return clock.now_s() - began_s


@torch.inference_mode()
def calibrate(
    runners: Sequence[Runner],
    clock: BusyClock,
    config: EngineConfig,
    context_tokens: int,
    costs: StepCosts,
    budget_s: float,
) -> None:
    """Fills the cost tables at 1, 2, 4 ... slots rows and the draft lengths that may be asked for, within the
    budget, each entry the best of a few rounds.

    All sizes take their turn in each round: a phase in which the machine is slower must not make some of them
    look dearer than the others, for by their ratios drafts are chosen. The caches' contents are overwritten.
    Sizes that the budget leaves out are estimated from the others.
    """
    held = min(_HELD_TOKENS, context_tokens // 2)
    lengths = _lengths(config, len(runners))
    points = [(rows, length) for rows in _batch_sizes(config.slots) for length in lengths]
    # The corners first: four points are enough for a fit, and the fit should not have to guess beyond them.
    extremes = (1, config.slots), (0, lengths[-1])
    points.sort(key=lambda point: (point[0] not in extremes[0]) + (point[1] not in extremes[1]))
    verify = {(rows, length): _Probe(runners[0], rows, (length + 1,), held) for rows, length in points}
    draft = {
        (rows, length): _Probe(runners[1], rows, (2,) + (1,) * (length - 1), held)
        for rows, length in points
        if 0 < length <= config.draft_tokens and len(runners) > 1
    }
    kv = _KvProbes(runners[0], min(4, config.slots), min(4, lengths[-1]), held, context_tokens - lengths[-1])
    prefills = [_PrefillProbes(runner, context_tokens) for runner in runners]
    needed = [*kv.probes, *(probe for prefill in prefills for probe in prefill.probes)]
    optional: list[_Probe] = []
    for count, point in enumerate(points):
        chosen = needed if count < 4 else optional
        chosen.extend(table[point] for table in (verify, draft) if point in table)
    best_s = _best_of_rounds(needed, optional, clock, budget_s)
    for table, probes in ((costs.verify, verify), (costs.draft, draft)):
        for (rows, length), probe in probes.items():
            if probe in best_s:
                table.set(rows, length + (table is costs.verify), best_s[probe])
    costs.held_tokens = held
    costs.kv_s = kv.slopes(best_s)
    for prefill, cost in zip(prefills, (costs.prefill, costs.draft_prefill), strict=False):
        prefill.fill(cost, best_s)
    costs.calibrated = True


def _best_of_rounds(
    needed: Sequence[_Probe], optional: Sequence[_Probe], clock: BusyClock, budget_s: float
) -> dict[_Probe, float]:
    """The least seconds of each probe, of those that are optional as far as the budget goes."""
    on_gpu = clock.device.type == "cuda"
    rounds = _ROUNDS_ON_GPU if on_gpu else _ROUNDS
    first_round_s = budget_s * (_FIRST_ROUND_SHARE_ON_GPU if on_gpu else 1 / rounds)
    began_s = clock.now_s()
    best_s = {probe: probe.seconds(clock) for probe in needed}
    for probe in optional:
        if clock.now_s() - began_s > first_round_s:
            break
        best_s[probe] = probe.seconds(clock)
    for _ in range(rounds - 1):
        for probe, known_s in best_s.items():
            best_s[probe] = min(known_s, probe.seconds(clock))
    return best_s


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


class _KvProbes:
    """What each row and token of KV costs: two widths, each behind few and behind many tokens. None where the
    context is too short to tell.
    """

    def __init__(self, runner: Runner, rows: int, drafted: int, held: int, limit_tokens: int) -> None:
        long = min(_LONG_TOKENS, limit_tokens - 1)
        self._drafted = drafted
        self._row_tokens = rows * (long - held)
        widths = (1, drafted + 1) if drafted else (1,)
        self._pairs = [
            (_Probe(runner, rows, (width,), long), _Probe(runner, rows, (width,), held)) for width in widths
        ]
        if long < 2 * held:
            self._pairs = []
        self.probes = [probe for pair in self._pairs for probe in pair]

    def slopes(self, best_s: dict[_Probe, float]) -> tuple[float, float]:
        """Seconds for each row and token, as (a, b) in a + b * width."""
        slopes = [(best_s[late] - best_s[early]) / self._row_tokens for late, early in self._pairs]
        if not slopes:
            return 0.0, 0.0
        if len(slopes) == 1:
            return max(slopes[0], 0.0), 0.0
        by_width = max((slopes[1] - slopes[0]) / self._drafted, 0.0)
        return max(slopes[0] - by_width, 0.0), by_width


class _PrefillProbes:
    """Three chunks tell the three parts: a short one, a long one, and the long one behind many tokens."""

    def __init__(self, runner: Runner, context_tokens: int) -> None:
        self._long = min(_CHUNK_TOKENS, context_tokens // 2)
        self._short = max(1, self._long // 8)
        self._start = min(_LONG_TOKENS, context_tokens - self._long)
        chunks = (self._short, 0), (self._long, 0), (self._long, self._start)
        self.probes = [_Probe(runner, 1, (width,), held, logits=1) for width, held in chunks]

    def fill(self, cost: PrefillCost, best_s: dict[_Probe, float]) -> None:
        short_s, long_s, late_s = (best_s[probe] for probe in self.probes)
        short, long = self._short, self._long
        pair_s = max(late_s - long_s, 0.0) / (long * self._start)
        slope_s = (long_s - short_s) / (long - short) - 0.5 * (long + short) * pair_s
        token_s = max(slope_s, 0.1 * long_s / long)
        cost.set(short_s - short * token_s - 0.5 * short * short * pair_s, token_s, pair_s)
