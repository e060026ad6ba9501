"""What a policy may know about the pool that it serves."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler_svc.core.records import Worker

UNMEASURED_STEP_S = 0.032
"""Taken for a step's duration until a worker has told its own; only the scale of estimates depends on it."""


@dataclass(slots=True)
class PoolView:
    """Kept current by the scheduler, read by the policy."""

    draft_tokens: int = 4
    now_s: float = 0.0
    """Of the event that is being handled."""
    workers: dict[str, Worker] = field(default_factory=dict)
    live: int = 0
    """Requests that are not finished."""
    slots: int = 0
    step_s: float = UNMEASURED_STEP_S
    """Seconds of one step, n * T_ssm + T_llm, mean over the workers."""
    measured: bool = False
    """Whether a worker has told `step_s`."""
    switch_s: float = 0.0
    """Seconds that a request's return to a slot costs every request of that worker."""

    def measure(self) -> None:
        """Takes the means of slots and costs over the workers anew."""
        self.slots = sum(worker.slots for worker in self.workers.values())
        measured = [worker.costs for worker in self.workers.values() if worker.costs.verify_s > 0.0]
        if measured:
            self.measured = True
            self.step_s = sum(costs.step_s(self.draft_tokens) for costs in measured) / len(measured)
            self.switch_s = sum(costs.switch_s for costs in measured) / len(measured)
