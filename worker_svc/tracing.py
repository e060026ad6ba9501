"""A lease on this worker as a span: `decode`, below the scheduler's `lease`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laps import telemetry
from laps.v1 import worker_pb2

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class LeaseTrace:
    """From the grant on. Without traces it only remembers the trace's id, for the log."""

    __slots__ = ("_accepted", "_drafted", "_emitted", "_span", "_steps", "field")

    def __init__(self, grant: worker_pb2.LeaseGrant) -> None:
        self.field = telemetry.trace_field(grant.traceparent)
        self._span: Span | None = None
        self._steps = self._emitted = self._drafted = self._accepted = 0
        tracing = telemetry.tracing()
        if tracing is not None and grant.traceparent:
            self._span = tracing.start(
                "decode",
                grant.traceparent,
                request_id=grant.request_id,
                slot=grant.slot,
                offset=grant.output_tokens,
                has_context=grant.has_context,
            )

    def step(self, emitted: int, drafted: int, accepted: int) -> None:
        """One step of the request."""
        if self._span is not None:
            if self._steps == 0:
                self._span.add_event("first step")
            self._steps += 1
            self._emitted += emitted
            self._drafted += drafted
            self._accepted += accepted

    def end(self, because: str) -> None:
        if self._span is not None:
            self._span.set_attributes(
                {
                    "laps.ended_by": because,
                    "laps.steps": self._steps,
                    "laps.output_tokens": self._emitted,
                    "laps.draft_tokens": self._drafted,
                    "laps.accepted_tokens": self._accepted,
                }
            )
            self._span.end()
