"""Traces of a whole stack, received by a collector as operators run one: OTLP over gRPC."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from laps import channels
from laps.client import AsyncClient
from laps.stack import Stack
from laps.v1 import inference_pb2, inference_pb2_grpc
from tests.stack.conftest import until_held

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
LOW_TOKENS = 1500
TRACEPARENT = f"00-{TRACE}-{CLIENT_SPAN}-01"


@dataclass
class Span:
    service: str
    name: str
    trace: str
    id: str
    parent: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    address: str = ""
    _spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                with self._lock:
                    self._spans += [_span(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace: str) -> list[Span]:
        with self._lock:
            return sorted((s for s in self._spans if s.trace == trace), key=lambda span: span.start_ns)


def _span(service: str, span: Any) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        [(event.name, _values(event.attributes)) for event in span.events],
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    made = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    made.address = f"http://127.0.0.1:{port}"
    server.start()
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    # Every commit of a long request, not the last 128.
    monkeypatch.setenv("OTEL_SPAN_EVENT_COUNT_LIMIT", str(LOW_TOKENS))
    yield made
    server.stop(None)


async def eventually(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_preempted_request_as_a_tree_of_spans(start_stack: Any, collector: Collector) -> None:
    settings = {"otlp_endpoint": collector.address, "workers": 1, "slots": 1, "drain_s": 90.0}
    async with (
        start_stack(**settings, patient=True) as (stack, client),
        channels.open_channel(stack.gateway_address) as channel,
    ):
        await preempted_request(stack, client, inference_pb2_grpc.InferenceServiceStub(channel))
        http_trace = "0af7651916cd43dd8448eb211c80319c"
        await over_http(stack, f"00-{http_trace}-b7ad6b7169203331-01")
        by_http = {"queue", "lease", "OpenAI.Completions"}
        await eventually(lambda: by_http <= {s.name for s in collector.of_trace(http_trace)})
        logs = stack.log_dir
    # A process sends what it still has when it ends; nothing runs then, so that none takes its time to drain.
    check_tree(collector.of_trace(TRACE))
    check_logs(logs)


async def preempted_request(stack: Stack, client: AsyncClient, stub: Any) -> None:
    """A long request, which one of a higher priority takes the only slot from. The worker stands still from
    its first tokens until the other one is there."""
    request = inference_pb2.GenerateRequest(request_id="low", text="def main():")
    request.stopping.max_tokens, request.stopping.ignore_eos = LOW_TOKENS, True
    call = stub.Generate(request, metadata=(("traceparent", TRACEPARENT),))
    answers = aiter(call)
    assert (await anext(answers)).WhichOneof("event") == "chunk"
    stack.children["worker-0"].signal(signal.SIGSTOP)
    high = asyncio.create_task(client.generate("Hello", max_tokens=4, priority=5))
    await until_held(client, 2)
    stack.children["worker-0"].signal(signal.SIGCONT)
    await high
    async for response in answers:
        if response.WhichOneof("event") == "complete":
            assert response.complete.timing.preemptions == 1


async def over_http(stack: Stack, traceparent: str) -> None:
    import aiohttp

    body = {"prompt": "import os", "max_tokens": 4}
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{stack.http_url}/completions", json=body, headers={"Traceparent": traceparent}
        ) as answer,
    ):
        assert answer.status == 200


def check_tree(spans: list[Span]) -> None:
    (root,) = [s for s in spans if s.service == "laps-gateway"]
    assert (root.name, root.parent) == ("InferenceService.Generate", CLIENT_SPAN)
    assert root.attributes["laps.request_id"] == "low"
    assert root.attributes["laps.output_tokens"] == LOW_TOKENS

    scheduler = [s for s in spans if s.service == "laps-scheduler"]
    assert all(s.parent == root.id and s.attributes["laps.request_id"] == "low" for s in scheduler)
    life = [s for s in scheduler if s.name != "commit"]
    assert [s.name for s in life] == ["queue", "lease", "queue", "lease"]
    for one, next_one in itertools.pairwise(life):
        assert one.end_ns == next_one.start_ns, "no gap in a request's life"
    first, second = life[1], life[3]
    because = [values["because"] for name, values in first.events if name == "preempted"]
    assert because == ["priority 5 goes before 0"]
    assert second.attributes["laps.output_tokens"] == LOW_TOKENS
    stored = [values for s in life for name, values in s.events if name == "commit"]
    assert sum(values["tokens"] for values in stored) == LOW_TOKENS
    commits = [s for s in scheduler if s.name == "commit"]
    assert [s.attributes["laps.stores"] for s in commits] == ["acknowledged", "finished"]
    assert all(s.end_ns > s.start_ns for s in commits)

    decodes = [s for s in spans if s.service == "laps-worker"]
    assert [(s.name, s.parent) for s in decodes] == [("decode", first.id), ("decode", second.id)]
    assert [s.attributes["laps.ended_by"] for s in decodes] == ["taken back", "length"]
    assert sum(s.attributes["laps.output_tokens"] for s in decodes) >= LOW_TOKENS
    assert all(s.attributes["laps.steps"] > 0 for s in decodes)


def check_logs(folder: Path) -> None:
    """Every line about the request names its trace, and the access line says how it went."""
    seen = set()
    for role in ("gateway", "scheduler", "worker-0"):
        for text in (folder / f"{role}.log").read_text().splitlines():
            line = json.loads(text) if text.startswith("{") else {}
            if line.get("request_id") == "low":
                assert line["trace_id"] == TRACE, line
                seen.add((role, line["event"]))
            if line.get("event") == "call" and line.get("request_id") == "low":
                assert line["code"] == "OK"
                assert line["output_tokens"] == LOW_TOKENS
                assert line["preemptions"] == 1
                assert line["queue_ms"] >= 0
                assert "text" not in line
    assert seen >= {
        ("gateway", "call"),
        ("scheduler", "accepted"),
        ("scheduler", "finished"),
        ("worker-0", "lease begins"),
        ("worker-0", "lease ends"),
    }
