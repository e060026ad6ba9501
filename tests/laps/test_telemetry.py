"""Trace contexts, and that traces which nobody wants cost nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laps import telemetry

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_clients_context_is_taken_over() -> None:
    pairs = [("user-agent", "x"), ("traceparent", TRACEPARENT), ("tracestate", "a=1")]
    assert telemetry.given_context(pairs) == (TRACEPARENT, "a=1")
    assert telemetry.trace_id(TRACEPARENT) == "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    "wrong",
    ["", "00-0-0-00", TRACEPARENT.upper(), f"00-{'0' * 32}-00f067aa0ba902b7-01", TRACEPARENT + "-more"],
)
def test_what_is_no_context_is_none(wrong: str) -> None:
    assert telemetry.given_context([("traceparent", wrong), ("tracestate", "a=1")]) == ("", "")
    assert telemetry.trace_id("") is None


@given(st.text(max_size=80) | st.binary(max_size=80))
def test_whatever_a_client_sends(value: str | bytes) -> None:
    parent, _ = telemetry.given_context([("traceparent", value)])
    assert parent == "" or len(parent) == 55


def test_without_an_endpoint_no_exporter_is_imported() -> None:
    script = (
        "import sys; import laps.telemetry as t, gateway.main, scheduler_svc.main\n"
        "t.configure_tracing('gateway', 'g')\n"
        "assert t.tracing() is None\n"
        "sys.exit(bool({'opentelemetry.sdk.trace', 'opentelemetry.exporter'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=_environment(), check=False)
    assert done.returncode == 0


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
