"""The bound: shortest remaining processing time, knowing the future.

Rule: rank is the true number of steps that a request still needs; a waiting request preempts a running one
that ranks strictly after it. Source: Schrage (1968). Parameters: `true_steps`, steps by request id.
Choose it to see, in a replay, how much there is to gain. It cannot serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler_svc.core.policies.base import Policy
from scheduler_svc.core.records import Request


class Oracle(Policy):
    name = "oracle"
    summary = "true remaining steps first: the bound, for replays only"
    settled = True
    preemptive = True
    servable = False

    def __init__(self, true_steps: Mapping[str, int]) -> None:
        super().__init__()
        self._true_steps = true_steps

    def admit(self, request: Request) -> None:
        request.level = 0
        request.policy_data = float(self._true_steps[request.request_id])
        self.stepped((request,))

    def stepped(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.rank = request.policy_data - request.steps
