"""Reports of steps on their way to the scheduler: short steps go together.

A message costs the scheduler, the store, the gateway and the client about the same whether it tells of one
step or of several, and a reader does not see tokens come more often than the eye can follow. So a
step is told by itself where steps are long, and together with the next ones where they are short.

The engine's thread only notes what there is to tell: between two steps the device waits for it. The messages
are made by the thread of the event loop, while the engine computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from laps.v1 import worker_pb2
from worker_svc import convert
from worker_svc.engine import StepResult


@dataclass(slots=True)
class Report:
    """What one step has to tell, or what is told without one (`result` has no rows then). lease_ids: of its
    rows. errors: lease and what went wrong. costs and kv_capacity_tokens: of a step.
    """

    epoch: int
    step: int
    result: StepResult = field(default_factory=StepResult)
    lease_ids: Sequence[int] = ()
    costs: convert.Costs | None = None
    kv_capacity_tokens: int = 0
    released_lease_ids: Sequence[int] = ()
    missing_lease_ids: Sequence[int] = ()
    errors: Sequence[tuple[int, str]] = ()
    evicted_request_ids: Sequence[str] = ()

    @property
    def step_s(self) -> float:
        return self.result.step_s

    @property
    def can_wait(self) -> bool:
        """Whether it tells of nothing but further tokens: a request's first ones and its end are waited for,
        the scheduler goes by the rest, and a step with prefill in it may be followed by another, which is
        long."""
        return not (
            self.released_lease_ids
            or self.missing_lease_ids
            or self.errors
            or self.evicted_request_ids
            or self.result.prefill_s > 0.0
            or 0 in self.result.offsets
            or any(self.result.finish)
        )

    def to_proto(self) -> worker_pb2.StepReport:
        report = convert.step_report(self.result, self.lease_ids)
        report.epoch = self.epoch
        report.step = self.step
        if self.costs is not None:
            report.timings.costs.CopyFrom(self.costs.to_proto())
        report.kv_capacity_tokens = self.kv_capacity_tokens
        report.released_lease_ids.extend(self.released_lease_ids)
        report.missing_lease_ids.extend(self.missing_lease_ids)
        for lease_id, message in self.errors:
            report.errors.add(lease_id=lease_id, message=message)
        report.evicted_request_ids.extend(self.evicted_request_ids)
        return report


Send = Callable[[Sequence[Report]], None]


class Reports:
    """Of one session, in their order. Not thread-safe."""

    def __init__(self, send: Send, interval_s: float) -> None:
        """`interval_s` is about how far apart messages are that only tell of tokens; 0: each report goes
        at once."""
        self._send = send
        self._interval_s = interval_s
        self._held: list[Report] = []
        self._due = False
        self._sent_s = float("-inf")

    def __len__(self) -> int:
        """Those that are not sent yet."""
        return len(self._held)

    def add(self, report: Report) -> None:
        """Sends what is waited for. What only tells of tokens goes with `send_due`, or with the next one."""
        self._held.append(report)
        if self._interval_s <= 0.0 or not report.can_wait:
            self.flush()
            return
        # At the end of the step that is nearest to the interval's.
        now_s = time.monotonic()
        if now_s - self._sent_s + report.step_s / 2.0 >= self._interval_s:
            self._due, self._sent_s = True, now_s

    def send_due(self) -> None:
        """For the moment in which the engine's thread leaves the interpreter to the others for longest: one
        that is woken sooner holds up the next step's begin."""
        if self._due:
            self._send_held()

    def flush(self) -> None:
        if self._held:
            self._sent_s = time.monotonic()
            self._send_held()

    def _send_held(self) -> None:
        held, self._held, self._due = self._held, [], False
        self._send(held)
