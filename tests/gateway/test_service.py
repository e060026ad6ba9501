"""The gateway as a service: health, reflection, queue, metrics, logs, being stopped."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from gateway_calls import (
    Result,
    collect,
    eventually,
    failure,
    generate_request,
    read_tokens,
    read_until_error,
)
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from laps import logs
from laps.errors import Reason
from laps.ports import free_ports
from laps.v1 import inference_pb2, inference_pb2_grpc, queue_pb2

GRPCURL = Path(sys.executable).with_name("grpcurl")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "laps.v1.InferenceService", "laps.v1.QueueService")


async def health(harness: Any) -> set[int]:
    stub: Any = health_pb2_grpc.HealthStub(harness.channel)
    answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in SERVICES]
    return {answer.status for answer in answers}


async def until_health(harness: Any, wanted: int) -> None:
    async with asyncio.timeout(60):
        while await health(harness) != {wanted}:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_gateway_that_cannot_say_whether_it_is_ready_ends(harness: Any) -> None:
    async def broken(serving: bool) -> None:
        raise ValueError("no health")

    harness.gateway._readiness.set, whole = broken, harness.gateway._readiness.set
    harness.gateway.scheduler_changed()
    async with asyncio.timeout(60):
        await harness.lifetime.wait()
    assert (harness.lifetime.exit_code, harness.lifetime.because) == (1, "task readiness failed")
    harness.gateway._readiness.set = whole


async def test_health_follows_the_scheduler(start_gateway: Any, scheduler: Any) -> None:
    await scheduler.kill()
    harness = await start_gateway(wait=False)
    assert await health(harness) == {NOT_SERVING}
    await scheduler.start()
    await until_health(harness, SERVING)
    await scheduler.kill()
    await until_health(harness, NOT_SERVING)


async def grpcurl(harness: Any, *arguments: str, request: str = "") -> str:
    data = ("-d", request) if request else ()
    process = await asyncio.create_subprocess_exec(
        GRPCURL, "-plaintext", *data, harness.address, *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_an_independent_client(harness: Any) -> None:
    """grpcurl knows nothing of ours but what reflection tells it."""
    listed = await grpcurl(harness, "list")
    assert listed.split() == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "laps.v1.InferenceService",
        "laps.v1.QueueService",
    ]
    described = await grpcurl(harness, "describe", "laps.v1.GenerateRequest")
    assert "oneof prompt" in described
    harness.scheduler.auto_tokens = 4
    request = json.dumps({"text": "the end", "request_id": "curl", "stopping": {"max_tokens": 12}})
    answered = await grpcurl(harness, "laps.v1.InferenceService/Generate", request=request)
    texts = (f"{{{text}}}" for text in answered.strip()[1:-1].split("\n}\n{"))
    result = Result()
    for text in texts:
        result.add(json_format.Parse(text, inference_pb2.GenerateResponse()))
    stored = harness.scheduler.requests["curl"]
    assert result.tokens == stored.planned
    assert result.complete == stored.complete
    assert "SERVING" in await grpcurl(harness, "grpc.health.v1.Health/Check")


async def test_models(harness: Any) -> None:
    (model,) = (await harness.inference.ListModels(inference_pb2.ListModelsRequest())).models
    assert (model.name, model.pool, model.target, model.draft) == (
        "tiny",
        "default",
        "tiny-target",
        "tiny-draft",
    )
    assert (model.workers, model.slots, model.context_tokens) == (2, 8, 200_000)
    assert model.vocabulary_size > 256


async def test_queue_calls_pass_through(harness: Any) -> None:
    queues = await harness.queue.ListQueues(queue_pb2.ListQueuesRequest())
    assert queues.pools[0].commit_seq == 7
    workers = await harness.queue.ListWorkers(queue_pb2.ListWorkersRequest())
    assert workers.workers[0].worker_id == "w1"
    error = await failure(harness.queue.ListWorkers(queue_pb2.ListWorkersRequest(pool="other")))
    assert error.reason is Reason.POOL_UNKNOWN
    harness.scheduler.auto_tokens = 50
    await collect(harness.inference.Generate(generate_request(request_id="seen")))
    requests = await harness.queue.ListRequests(queue_pb2.ListRequestsRequest())
    assert requests.requests[0].request_id == "seen"


async def test_watch_passes_through(harness: Any) -> None:
    call = harness.queue.Watch(queue_pb2.WatchRequest())
    moments = [(await call.read()).time_s for _ in range(3)]
    assert moments == [1, 2, 3]
    await harness.scheduler.kill()
    _, error = await read_until_error(call)
    assert error.status == "UNAVAILABLE"
    call = harness.queue.Watch(queue_pb2.WatchRequest())
    assert (await failure(call)).status == "UNAVAILABLE"


async def test_drain(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not serving at once; what runs may end; what does not, is told to go on elsewhere."""
    scheduler = harness.scheduler
    ending = harness.inference.Generate(generate_request(request_id="ending"))
    lasting = harness.inference.Generate(generate_request(request_id="lasting"))
    watching = harness.queue.Watch(queue_pb2.WatchRequest())
    await watching.read()
    await scheduler.until(lambda: len(scheduler.follows) == 2)
    scheduler.emit("lasting", 5)
    begun = await read_tokens(lasting, 4)
    streams, time_is_up = harness.gateway.inference.streams, asyncio.Event()
    until_idle = streams.wait_idle

    async def wait_idle() -> None:
        ended = asyncio.create_task(until_idle())
        up = asyncio.create_task(time_is_up.wait())
        await asyncio.wait((ended, up), return_when=asyncio.FIRST_COMPLETED)
        if up.done():
            raise TimeoutError

    # The time to drain is up when this test says so, however long the calls before take.
    monkeypatch.setattr(streams, "wait_idle", wait_idle)
    stopping = asyncio.create_task(harness.gateway.stop(600.0))
    await until_health(harness, NOT_SERVING)
    error = await failure(harness.inference.Generate(generate_request()))
    assert (error.status, error.reason) == ("UNAVAILABLE", Reason.SHUTTING_DOWN)
    assert error.retry_after_s
    error = await failure(harness.queue.Watch(queue_pb2.WatchRequest()))
    assert error.reason is Reason.SHUTTING_DOWN, "a watch that comes back would be waited for"
    scheduler.emit("ending", 1000)
    assert (await collect(ending)).tokens == scheduler.requests["ending"].planned
    time_is_up.set()
    _, error = await read_until_error(lasting)
    assert (error.status, error.reason) == ("UNAVAILABLE", Reason.SHUTTING_DOWN)
    assert (await read_until_error(watching))[1].status == "UNAVAILABLE"
    await stopping
    assert begun.tokens == scheduler.requests["lasting"].planned[: len(begun.tokens)]
    assert not scheduler.requests["lasting"].finished


async def test_a_request_id_that_was_forgotten_and_used_anew_elsewhere(start_gateway: Any) -> None:
    first, second = await start_gateway(), await start_gateway()
    scheduler = first.scheduler
    scheduler.auto_tokens = 1000
    await collect(first.inference.Generate(generate_request(request_id="id", stop=["never there"])))
    del scheduler.requests["id"]
    told = await collect(second.inference.Generate(generate_request(request_id="id", stop=["e"])))
    assert told.complete is not None
    assert told.complete.matched_stop == "e"
    resumed = await collect(first.inference.Resume(inference_pb2.ResumeRequest(request_id="id")))
    assert resumed.text == told.text


async def test_metrics(start_gateway: Any) -> None:
    (port,) = free_ports(1)
    harness = await start_gateway(metrics_port=port)
    harness.scheduler.auto_tokens = 5
    await collect(harness.inference.Generate(generate_request()))
    await failure(harness.inference.Generate(generate_request("")))

    def read() -> str:
        return str(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())

    text = await asyncio.to_thread(read)
    generate = 'method="InferenceService.Generate",pool="default"'
    for line in (
        f'laps_gateway_calls_total{{code="OK",{generate}}} 1.0',
        f'laps_gateway_calls_total{{code="INVALID_ARGUMENT",{generate}}} 1.0',
        'laps_gateway_requests_total{finish_reason="LENGTH",pool="default"} 1.0',
        'laps_gateway_tokens_total{pool="default"} 40.0',
        'laps_gateway_time_to_first_token_seconds_count{pool="default"} 1.0',
        'laps_gateway_streams{pool="default"} 0.0',
        'laps_gateway_scheduler_connected{pool="default"} 1.0',
    ):
        assert line in text


async def test_one_access_line_and_no_prompt(harness: Any) -> None:
    out = io.StringIO()
    logs.configure_logging("gateway", stream=out)
    harness.scheduler.auto_tokens = 5
    secret = "the-secret-prompt"
    await collect(harness.inference.Generate(generate_request(secret, request_id="r1")))
    turns = [{"role": "bad", "content": secret}]
    bad = inference_pb2.GenerateRequest(messages={"messages": turns})  # type: ignore[arg-type]
    await failure(harness.inference.Generate(bad))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    calls = [line for line in lines if line["event"] == "call"]
    assert [line["code"] for line in calls] == ["OK", "INVALID_ARGUMENT"]
    assert calls[0]["request_id"] == "r1"
    assert calls[0]["output_tokens"] == 40
    assert calls[0]["finish_reason"] == "LENGTH"
    assert secret not in out.getvalue()


async def test_a_defect_is_internal_and_logged(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("private")

    monkeypatch.setattr(harness.gateway.inference, "_detokenizer", broken)
    error = await failure(harness.inference.Generate(generate_request()))
    assert (error.status, error.reason) == ("INTERNAL", Reason.INTERNAL)
    assert "private" not in error.message


async def start_process(**settings: Any) -> asyncio.subprocess.Process:
    """Runs a gateway as `laps gateway` does."""
    code = (
        "import sys, gateway.main, laps.settings;"
        f"sys.exit(gateway.main.run(laps.settings.Settings(**{settings!r})))"
    )
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=subprocess.PIPE)


async def events_until_end(process: asyncio.subprocess.Process) -> list[dict[str, Any]]:
    _, err = await asyncio.wait_for(process.communicate(), 120)
    return [json.loads(line) for line in err.decode().splitlines() if line.startswith("{")]


@pytest.mark.stack
async def test_the_process(scheduler: Any, model_folder: Path) -> None:
    """It serves, and a signal ends it."""
    (port,) = free_ports(1)
    process = await start_process(
        target=str(model_folder), port=port, scheduler_address=f"127.0.0.1:{scheduler.port}"
    )
    try:
        await scheduler.until(lambda: scheduler.streams)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            assert (await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)).status == SERVING
        process.send_signal(signal.SIGTERM)
        events = await events_until_end(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    assert [line["event"] for line in events] == ["listening", "scheduler connected", "stopping"]


CONNECTIONS = 24
"""The kernel spreads them by a hash: that all come to one of two has a chance of 2 ** -23."""


async def generate_on_new_connections(port: int, prefix: str) -> dict[str, list[int]]:
    """The tokens of one request per connection, by request."""

    async def one(request_id: str) -> list[int]:
        own = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=own) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            return (await collect(stub.Generate(generate_request(request_id=request_id)))).tokens

    names = [f"{prefix}-{number}" for number in range(CONNECTIONS)]
    return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))


@pytest.mark.stack
async def test_several_processes_on_one_port(scheduler: Any, model_folder: Path) -> None:
    """Connections are spread over them; when one ends, the others have all new ones."""
    (port,) = free_ports(1)
    where = {"target": str(model_folder), "port": port, "scheduler_address": f"127.0.0.1:{scheduler.port}"}
    starting = [start_process(gateway_id=name, share_port=True, **where) for name in ("one", "two")]
    processes = await asyncio.gather(*starting)
    scheduler.auto_tokens = 5
    try:
        await scheduler.until(lambda: len(scheduler.streams) == 2)
        for prefix, gateways in (("both", {"one", "two"}), ("left", {"two"})):
            scheduler.gateways.clear()
            made = await generate_on_new_connections(port, prefix)
            assert made == {name: scheduler.requests[name].planned for name in made}
            assert scheduler.gateways == gateways
            if processes[0].returncode is None:
                processes[0].send_signal(signal.SIGTERM)
                await events_until_end(processes[0])
        # Who was not told to share finds the port taken.
        alone = await start_process(**where)
        (refused,) = await events_until_end(alone)
        assert (alone.returncode, "cannot listen" in refused["error"]) == (1, True)
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.mark.stack
async def test_a_start_that_fails_is_one_line(model_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        processes = [
            await start_process(target="/nowhere/at/all"),
            await start_process(target=str(model_folder), port=port),
        ]
        events = await asyncio.gather(*map(events_until_end, processes))
    assert [process.returncode for process in processes] == [1, 1]
    (missing,), (refused,) = events
    assert "no model folder" in missing["error"]
    assert "cannot listen" in refused["error"]


async def test_nothing_is_left_behind(start_gateway: Any) -> None:
    """After many calls of every kind the gateway holds no feed, stream or task."""
    harness = await start_gateway()
    scheduler = harness.scheduler
    scheduler.auto_tokens = 10
    # The first request opens the stream over which all are submitted.
    await collect(harness.inference.Generate(generate_request(request_id="first")))
    tasks = len(asyncio.all_tasks())
    descriptors = open_descriptors()
    for index in range(20):
        call = harness.inference.Generate(generate_request(request_id=f"r{index}"))
        if index % 2:
            await call.read()
            call.cancel()
        else:
            await collect(call)
    gateway = harness.gateway
    await eventually(lambda: gateway.link.live_requests == 0 and gateway.inference.streams.count == 0)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
    assert not gateway.inference._readers
    submissions = gateway.link._stubs.submissions
    assert not any((submissions._answers, submissions._unsent, submissions._left))
    assert open_descriptors() <= descriptors + 1


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
