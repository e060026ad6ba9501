"""LAPS-SD as we serve it: the paper's idea with an estimate from the first step on.

Rule. Every request has, from its first step, an estimate of its tokens per step by shrinkage to the mean of
its class, `(k0 * prior + own tokens) / (k0 + own steps)`, and with its predicted length an estimate of the
seconds that it still needs. The shortest goes first. It preempts when the newcomer would be done before the
next slot falls free by itself, by more than the switch costs everyone in the system:
`remaining + 2 * switch_s * live requests < smallest remaining of the running`.

Source: arXiv 2505.17074 for semi-clairvoyance; shrinkage after James and Stein.
Parameters: `prior_steps` (steps that the prior weighs). Choose it: it is the default.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_svc.core.policies.base import PRIOR_TOKENS_PER_STEP, Policy, predicted_tokens
from scheduler_svc.core.records import Request


class LapsSd(Policy):
    name = "laps-sd"
    summary = "least perceived service, with acceptance and length learnt online (the default)"
    preemptive = True

    def __init__(self, prior_steps: float = 20.0) -> None:
        super().__init__()
        if prior_steps <= 0.0:
            raise ValueError("prior_steps must be above 0")
        self._prior_steps = prior_steps

    def admit(self, request: Request) -> None:
        self._rank(request)

    def stepped(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._rank(request)

    def believe(self, request: Request) -> None:
        self._rank(request)

    def _rank(self, request: Request) -> None:
        emitted = request.output_tokens
        per_step = (self._prior_steps * PRIOR_TOKENS_PER_STEP + emitted) / (self._prior_steps + request.steps)
        length = predicted_tokens(request)
        request.acceptance_estimate = min(1.0, max(0.0, (per_step - 1.0) / self.pool.draft_tokens))
        request.predicted_output_tokens = max(length, emitted + 1.0)
        request.perceptible = request.steps > 0 and emitted < length
        request.perceived_s = max(length - emitted, 1.0) / per_step * self.pool.step_s
        request.rank = request.perceived_s

    def preempts(self, newcomer: Request, victim: Request) -> str:
        least_s = min(running.perceived_s for running in self.pool.running())
        cost_s = 2.0 * self.pool.switch_s * self.pool.live
        if newcomer.perceived_s + cost_s < least_s:
            return (
                f"needs {victim.perceived_s:.3g} s more; {newcomer.request_id} needs "
                f"{newcomer.perceived_s:.3g} s, the next slot would fall free in {least_s:.3g} s, "
                f"and the switch costs all together {cost_s:.3g} s"
            )
        return ""
