"""First come, first served.

Rule: in order of arrival, never preempts. Source: folklore; what most servers do.
Parameters: none. Choose it when fairness by arrival matters more than mean latency, or when
nothing about the requests can be guessed: it has the least 99th percentile of all policies here
under overload, and the worst mean.
"""

from __future__ import annotations

from scheduler_svc.core.policies.base import Policy
from scheduler_svc.core.records import Request


class Fcfs(Policy):
    name = "fcfs"
    summary = "first come, first served"
    settled = True

    def admit(self, request: Request) -> None:
        request.level = 0
        request.rank = float(request.arrival_seq)
