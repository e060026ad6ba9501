"""FastServe: a multi-level feedback queue that skips levels by the cost of the prompt.

Rule: level i has a quantum of `first_quantum_s * quantum_growth ** i` seconds. A request enters the
highest level whose quantum covers its first step (prefill and one decoding step), and moves down one
level whenever it has used up its level's quantum. The highest non-empty level runs, in order of entry to
the level, and preempts lower ones. A request that has waited longer than `starvation_limit_s` is promoted
to level 0 with a new quantum.
Source: "Fast Distributed Inference Serving for Large Language Models", arXiv 2305.05920.
Parameters: `levels` (count), `first_quantum_s` (seconds), `quantum_growth` (factor),
`starvation_limit_s` (seconds).
Choose it when nothing can be predicted, prompts differ much in length, and long waits must be broken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from scheduler_svc.core.policies.base import Policy
from scheduler_svc.core.records import Request, RequestState


class FastServe(Policy):
    name = "fastserve"
    summary = "skip-join multi-level feedback queue, preemptive (arXiv 2305.05920)"
    preemptive = True

    def __init__(
        self,
        levels: int = 6,
        first_quantum_s: float = 0.5,
        quantum_growth: float = 2.0,
        starvation_limit_s: float = 60.0,
    ) -> None:
        super().__init__()
        if levels < 1 or first_quantum_s <= 0.0 or quantum_growth <= 1.0 or starvation_limit_s <= 0.0:
            raise ValueError(
                "levels must be at least 1, first_quantum_s and starvation_limit_s above 0, "
                "quantum_growth above 1"
            )
        self._quanta_s = tuple(first_quantum_s * quantum_growth**i for i in range(levels))
        totals = [sum(self._quanta_s[: i + 1]) for i in range(levels - 1)]
        self.level_thresholds_s = tuple(totals)
        self._starvation_limit_s = starvation_limit_s
        self._entries = 0
        self._waiting_since: deque[tuple[float, int, Request]] = deque()
        """(instant, entry number then, request); outdated where the request ran in between."""

    def admit(self, request: Request) -> None:
        costs = [worker.costs.prefill_token_s for worker in self.pool.workers.values()]
        prefill_s = request.spec.prompt_tokens * (sum(costs) / len(costs) if costs else 0.0)
        level = 0
        while level < len(self._quanta_s) - 1 and self._quanta_s[level] < prefill_s + self.pool.step_s:
            level += 1
        self._enter(request, level)
        self.requeued(request)

    def _enter(self, request: Request, level: int) -> None:
        self._entries += 1
        request.level = level
        request.rank = float(self._entries)
        request.policy_data = request.attained_s + self._quanta_s[level]

    def stepped(self, requests: Sequence[Request]) -> None:
        lowest = len(self._quanta_s) - 1
        for request in requests:
            if request.attained_s >= request.policy_data and request.level < lowest:
                self._enter(request, request.level + 1)

    def requeued(self, request: Request) -> None:
        self._waiting_since.append((self.pool.now_s, request.steps, request))

    def due(self, now_s: float) -> Iterable[Request]:
        since = self._waiting_since
        promoted = []
        while since and since[0][0] + self._starvation_limit_s <= now_s:
            _, steps, request = since.popleft()
            if request.state in (RequestState.QUEUED, RequestState.PREEMPTED) and request.steps == steps:
                if request.level > 0:
                    self._enter(request, 0)
                    promoted.append(request)
                since.append((now_s, steps, request))
        return promoted

    def next_due_s(self) -> float | None:
        return self._waiting_since[0][0] + self._starvation_limit_s if self._waiting_since else None

    def preempts(self, newcomer: Request, victim: Request) -> str:
        if newcomer.level < victim.level:
            return f"level {newcomer.level} goes before level {victim.level}"
        return ""
