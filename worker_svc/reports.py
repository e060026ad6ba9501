"""Reports of steps on their way to the scheduler: short steps go together.

A message costs the scheduler, the store, the gateway and the client about the same whether it tells of one
step or of several, and a reader does not see tokens come more often than the eye can follow. So a
step is told by itself where steps are long, and together with the next ones where they are short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from laps.v1 import worker_pb2

Send = Callable[[Sequence[worker_pb2.StepReport]], None]


class Reports:
    """Of one session, in their order. Not thread-safe."""

    def __init__(self, send: Send, interval_s: float) -> None:
        """`interval_s` is about how far apart messages are that only tell of tokens; 0: each report goes
        at once."""
        self._send = send
        self._interval_s = interval_s
        self._held: list[worker_pb2.StepReport] = []
        self._sent_s = float("-inf")

    def __len__(self) -> int:
        """Those that wait for the next one."""
        return len(self._held)

    def add(self, report: worker_pb2.StepReport) -> None:
        self._held.append(report)
        if self._interval_s <= 0.0 or not _can_wait(report):
            self.flush()
            return
        # At the end of the step that is nearest to the interval's.
        step_s = report.timings.step_s
        if time.monotonic() - self._sent_s + step_s / 2.0 >= self._interval_s:
            self.flush()

    def flush(self) -> None:
        if self._held:
            held, self._held = self._held, []
            self._sent_s = time.monotonic()
            self._send(held)


def _can_wait(report: worker_pb2.StepReport) -> bool:
    """Whether it tells of nothing but further tokens: a request's first ones and its end are waited for, the
    scheduler goes by the rest, and a step with prefill in it may be followed by another, which is long."""
    return not (
        report.finishes
        or report.released_lease_ids
        or report.missing_lease_ids
        or report.errors
        or report.evicted_request_ids
        or report.timings.prefill_s > 0.0
        or 0 in report.offsets
    )
