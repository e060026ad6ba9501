"""Least attained service, in discrete steps.

Rule: a request starts in level 0 and leaves level i downwards when the seconds of decoding that it
has had pass `first_threshold_s * threshold_growth ** i`. The highest non-empty level runs, in order of
arrival, and preempts lower ones. Source: Nuyens and Wierman, "The foreground-background queue: a survey"
(2008); the discrete form is that of Tiresias (NSDI 2019).
Parameters: `levels` (count), `first_threshold_s` (seconds), `threshold_growth` (factor).
Choose it when nothing can be predicted and a few very long requests hold up many short ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_svc.core.policies.base import Policy
from scheduler_svc.core.records import Request


class Las(Policy):
    name = "las"
    summary = "least attained service in discrete levels, preemptive"
    preemptive = True

    def __init__(
        self, levels: int = 6, first_threshold_s: float = 0.5, threshold_growth: float = 2.0
    ) -> None:
        super().__init__()
        if levels < 1 or first_threshold_s <= 0.0 or threshold_growth <= 1.0:
            raise ValueError("levels must be at least 1, first_threshold_s above 0, threshold_growth above 1")
        self.level_thresholds_s = tuple(first_threshold_s * threshold_growth**i for i in range(levels - 1))

    def admit(self, request: Request) -> None:
        request.level = 0
        request.rank = float(request.arrival_seq)
        self.stepped((request,))

    def stepped(self, requests: Sequence[Request]) -> None:
        thresholds_s = self.level_thresholds_s
        lowest = len(thresholds_s)
        for request in requests:
            while request.level < lowest and request.attained_s >= thresholds_s[request.level]:
                request.level += 1

    def preempts(self, newcomer: Request, victim: Request) -> str:
        if newcomer.level < victim.level:
            return f"level {newcomer.level} goes before level {victim.level}"
        return ""
