"""Shortest remaining processing time, counted in predicted tokens.

Rule: rank `max(predicted - emitted, 1)` tokens, lower first; a waiting request preempts a running
one that ranks strictly after it. Source: Schrage (1968), with a prediction in the place of the truth.
Parameters: none; needs `predicted_output_tokens` from the client to be of use.
Choose it when switching is nearly free: it is hard to beat when nothing but a length is known, and
it thrashes when a switch costs many milliseconds and there are many slots.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_svc.core.policies.base import Policy, predicted_tokens
from scheduler_svc.core.records import Request


class Srpt(Policy):
    name = "srpt"
    summary = "shortest predicted remaining output first, preemptive"
    settled = True
    preemptive = True

    def admit(self, request: Request) -> None:
        request.level = 0
        request.policy_data = predicted_tokens(request)
        self.stepped((request,))

    def stepped(self, requests: Sequence[Request]) -> None:
        for request in requests:
            remaining = request.policy_data - len(request.output) // 4
            request.rank = remaining if remaining > 1.0 else 1.0
