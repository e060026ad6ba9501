"""Traces by OpenTelemetry: off unless an endpoint is given; until then its SDK is not even imported.

A request's context travels as a W3C `traceparent` text: from the client's metadata or headers to the
gateway, with the request to the scheduler and into the store, with each lease to a worker. So it outlives
every process on its way, and ties log lines together whether spans are exported or not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

TRACEPARENT = "traceparent"
"""Metadata key and HTTP header, https://www.w3.org/TR/trace-context/."""
TRACESTATE = "tracestate"
ENDPOINT_ENVS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FLUSH_S = 2.0
"""A service that stops has so long to send what it still has."""
_FORM = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Kind = Literal["server", "internal"]


class Tracing:
    """Makes this service's spans and sends them, in a thread of its own. Thread-safe."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("laps")
        self._propagator = TraceContextTextMapPropagator()
        self._kinds = {"server": trace.SpanKind.SERVER, "internal": trace.SpanKind.INTERNAL}
        self._in_span = trace.set_span_in_context
        self._error = trace.StatusCode.ERROR

    def start(
        self,
        name: str,
        parent: str = "",
        *,
        state: str = "",
        at_s: float | None = None,
        kind: Kind = "internal",
        **attributes: Any,
    ) -> Span:
        """A span below `parent` (a traceparent; empty: a new trace). `at_s`: seconds since the Unix epoch."""
        carrier = {TRACEPARENT: parent} | ({TRACESTATE: state} if state else {})
        return self._tracer.start_span(
            name,
            self._propagator.extract(carrier),
            kind=self._kinds[kind],
            attributes={f"laps.{key}": value for key, value in attributes.items()},
            start_time=nanoseconds(at_s),
        )

    def traceparent(self, span: Span) -> str:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._in_span(span))
        return carrier.get(TRACEPARENT, "")

    def failed(self, span: Span, because: str) -> None:
        span.set_status(self._error, because)

    def close(self) -> None:
        """Sends what is left, for at most `FLUSH_S` seconds."""
        self._provider.force_flush(int(FLUSH_S * 1e3))
        self._provider.shutdown()


_tracing: Tracing | None = None


def tracing() -> Tracing | None:
    """This process's traces; None: nobody wants any."""
    return _tracing


def configure_tracing(service: str, instance: str, *, pool: str = "", endpoint: str = "") -> None:
    """Turns traces on where `endpoint` (http://HOST:PORT of an OTLP collector, gRPC) or one of the
    `OTEL_EXPORTER_OTLP_*` variables names one. Everything else is as OpenTelemetry's own variables say:
    `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_RESOURCE_ATTRIBUTES`, ..."""
    global _tracing
    if not endpoint and not any(os.environ.get(name) for name in ENDPOINT_ENVS):
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {"service.name": f"laps-{service}", "service.instance.id": instance, "laps.pool": pool}
    # Resource.create() reads OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME; of two, the merged-in one wins.
    ours, given = Resource(named), OTELResourceDetector().detect()
    provider = TracerProvider(resource=Resource.create().merge(ours).merge(given))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None)))
    _tracing = Tracing(provider)


def close_tracing() -> None:
    global _tracing
    if _tracing is not None:
        _tracing.close()
        _tracing = None


def given_context(pairs: Iterable[tuple[str, Any]]) -> tuple[str, str]:
    """(traceparent, tracestate) of a call's metadata; empty where there is none, or it is none."""
    found = {key: value for key, value in pairs if key in (TRACEPARENT, TRACESTATE)}
    parent = str(found.get(TRACEPARENT, ""))
    return (parent, str(found.get(TRACESTATE, ""))) if _FORM.fullmatch(parent) else ("", "")


def trace_id(traceparent: str) -> str | None:
    """For logs; None where there is no trace."""
    return traceparent[3:35] or None


def trace_field(traceparent: str) -> dict[str, str]:
    """For a line of the log; empty where there is no trace."""
    known = trace_id(traceparent)
    return {} if known is None else {"trace_id": known}


def nanoseconds(at_s: float | None) -> int | None:
    return None if at_s is None else int(at_s * 1e9)
