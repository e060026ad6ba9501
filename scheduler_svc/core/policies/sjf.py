"""Shortest job first.

Rule: the smallest predicted output length first, never preempts. Source: folklore.
Parameters: none; needs `predicted_output_tokens` from the client to be of use.
Choose it when switching between requests is expensive and predictions are good.
"""

from __future__ import annotations

from scheduler_svc.core.policies.base import Policy, predicted_tokens
from scheduler_svc.core.records import Request


class Sjf(Policy):
    name = "sjf"
    summary = "shortest predicted output first, never preempts"
    settled = True

    def admit(self, request: Request) -> None:
        request.level = 0
        request.rank = predicted_tokens(request)
