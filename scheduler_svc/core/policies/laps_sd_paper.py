"""LAPS-SD as published, the rules of the paper and nothing more.

Source: "Semi-Clairvoyant Scheduling of Speculative Decoding Requests to Minimize LLM Inference
Latency", arXiv 2505.17074 (IJCAI 2025).

Rule. `levels` queues; queue i is left downwards when attained service passes
`first_threshold_s * threshold_growth ** i`. The highest non-empty queue runs; a request of a higher
queue preempts one of a lower queue at a step boundary. Inside a queue the perceptible requests, those
whose acceptance rate has become stable, go first, shortest remaining time first, with
`T = L / (n A + 1) * (n T_ssm + T_llm)`; the others follow in order of arrival. (The paper does not
say which of the two go first; and between two perceptible requests of one queue the shorter preempts.)

Stable: over the last `stable_window_steps` steps the running mean of accepted tokens per step
stayed within `stable_tolerance` of its present value. Once perceptible, always perceptible.

Parameters: `levels` (count), `first_threshold_s` (seconds), `threshold_growth` (factor),
`stable_window_steps` (steps), `stable_tolerance` (share).

Choose it to reproduce the paper. `laps-sd` is better in every respect that was measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from scheduler_svc.core.policies.base import Policy, predicted_tokens
from scheduler_svc.core.records import Request

_NOT_PERCEPTIBLE = 1e9
"""Rank offset in seconds that puts requests without an estimate behind those with one."""


class LapsSdPaper(Policy):
    name = "laps-sd-paper"
    summary = "LAPS-SD exactly as published (arXiv 2505.17074)"
    preemptive = True

    def __init__(
        self,
        levels: int = 6,
        first_threshold_s: float = 0.5,
        threshold_growth: float = 2.0,
        stable_window_steps: int = 8,
        stable_tolerance: float = 0.1,
    ) -> None:
        super().__init__()
        if levels < 1 or first_threshold_s <= 0.0 or threshold_growth <= 1.0 or stable_window_steps < 1:
            raise ValueError(
                "levels and stable_window_steps must be at least 1, "
                "first_threshold_s above 0, threshold_growth above 1"
            )
        self.level_thresholds_s = tuple(first_threshold_s * threshold_growth**i for i in range(levels - 1))
        self._window_steps = stable_window_steps
        self._tolerance = stable_tolerance

    def admit(self, request: Request) -> None:
        request.policy_data = deque[float](maxlen=self._window_steps)
        request.perceptible = False
        self._rank(request)

    def stepped(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.perceptible:
                self._watch(request)
            self._rank(request)

    def _watch(self, request: Request) -> None:
        means = request.policy_data
        assert isinstance(means, deque)
        mean = request.output_tokens / request.steps if request.steps else 0.0
        if len(means) == self._window_steps and mean > 0.0:
            request.perceptible = max(abs(seen - mean) for seen in means) <= self._tolerance * mean
        means.append(mean)

    def _rank(self, request: Request) -> None:
        level = 0
        for threshold_s in self.level_thresholds_s:
            if request.attained_s < threshold_s:
                break
            level += 1
        request.level = level
        if request.perceptible:
            self.believe(request)
            request.rank = request.perceived_s
        else:
            request.rank = _NOT_PERCEPTIBLE + request.arrival_seq

    def believe(self, request: Request) -> None:
        if not request.steps:
            super().believe(request)
            return
        emitted = request.output_tokens
        per_step = max(emitted / request.steps, 0.1)
        length = predicted_tokens(request)
        request.acceptance_estimate = min(1.0, max(0.0, (per_step - 1.0) / self.pool.draft_tokens))
        request.predicted_output_tokens = length
        request.perceived_s = max(length - emitted, 1.0) / per_step * self.pool.step_s
