"""Keys, roles, tenants and quotas at the gateway, by gRPC and by HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gateway_calls import collect, failure, generate_request

from gateway.edge import TenantLimits
from laps.errors import InvalidArgument, Reason, ResourceExhausted
from laps.ports import free_ports
from laps.security.access import Role
from laps.security.keys import new_key
from laps.security.principal import Principal, Quota
from laps.setting import SettingsError
from laps.v1 import inference_pb2, queue_pb2, scheduler_pb2

ACME, OTHER, OPERATOR = new_key("acme"), new_key("other"), new_key(role="operator")


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.toml"
    path.write_text("\n".join([ACME.line, OTHER.line, OPERATOR.line, "tenants.acme = { max_priority = 5 }"]))
    return str(path)


def shows(key: Any) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {key.key}"),)}


async def test_without_a_key_nothing_is_done(start_gateway: Callable[..., Any], keys_file: str) -> None:
    harness = await start_gateway(api_keys_file=keys_file)
    for call in (
        harness.inference.Generate(generate_request()),
        harness.inference.GetRequest(inference_pb2.GetRequestRequest(request_id="x")),
        harness.inference.ListModels(inference_pb2.ListModelsRequest()),
        harness.queue.ListQueues(queue_pb2.ListQueuesRequest()),
        harness.inference.Generate(generate_request(), metadata=(("authorization", "Bearer laps_no_key"),)),
    ):
        assert (await failure(call)).reason is Reason.UNAUTHENTICATED
    assert not harness.scheduler.requests
    answer = await harness.inference.ListModels(inference_pb2.ListModelsRequest(), **shows(ACME))
    assert answer.models


async def test_a_tenant_has_its_own_requests_and_no_others(
    start_gateway: Callable[..., Any], keys_file: str
) -> None:
    harness = await start_gateway(api_keys_file=keys_file)
    harness.scheduler.auto_tokens = 4
    request = generate_request(max_tokens=4, request_id="mine")
    result = await collect(harness.inference.Generate(request, **shows(ACME)))
    assert result.request_id == "mine"
    assert list(harness.scheduler.requests) == ["acme:mine"]
    read = inference_pb2.GetRequestRequest(request_id="mine")
    assert (await harness.inference.GetRequest(read, **shows(ACME))).request.request_id == "mine"
    resume = inference_pb2.ResumeRequest(request_id="mine", offset=2)
    resumed = await collect(harness.inference.Resume(resume, **shows(ACME)), 2)
    assert (resumed.request_id, len(resumed.tokens)) == ("mine", 2)
    # To the other tenant it is not there, whatever it tries, and the answer is that of an id that never was.
    for method, asked in (
        ("GetRequest", read),
        ("Resume", resume),
        ("Cancel", inference_pb2.CancelRequest(request_id="mine")),
    ):
        error = await failure(getattr(harness.inference, method)(asked, **shows(OTHER)))
        assert error.reason is Reason.REQUEST_UNKNOWN
        assert error.message == "there is no request 'mine'"
        assert "other" not in str(vars(error))
        named = type(asked)(request_id="acme:mine")
        error = await failure(getattr(harness.inference, method)(named, **shows(OTHER)))
        assert error.reason is Reason.FIELD_INVALID
    # It may use the same id for a request of its own.
    result = await collect(harness.inference.Generate(request, **shows(OTHER)))
    assert result.request_id == "mine"
    assert set(harness.scheduler.requests) == {"acme:mine", "other:mine"}
    named = inference_pb2.GetRequestRequest(request_id="acme:mine")
    assert (await harness.inference.GetRequest(named, **shows(OPERATOR))).request.request_id == "acme:mine"


async def test_the_queue_is_the_operators(start_gateway: Callable[..., Any], keys_file: str) -> None:
    harness = await start_gateway(api_keys_file=keys_file)
    ask = queue_pb2.ListRequestsRequest()
    assert (await failure(harness.queue.ListRequests(ask, **shows(ACME)))).reason is Reason.PERMISSION_DENIED
    await harness.queue.ListRequests(ask, **shows(OPERATOR))
    watch = harness.queue.Watch(queue_pb2.WatchRequest(), **shows(ACME))
    assert (await failure(watch)).reason is Reason.PERMISSION_DENIED


async def test_a_priority_above_the_tenants_ceiling_is_refused(
    start_gateway: Callable[..., Any], keys_file: str
) -> None:
    harness = await start_gateway(api_keys_file=keys_file)
    harness.scheduler.auto_tokens = 1000
    error = await failure(harness.inference.Generate(generate_request(priority=6), **shows(ACME)))
    assert isinstance(error, InvalidArgument)
    assert error.field == "priority"
    assert not harness.scheduler.requests
    for priority, key in ((5, ACME), (6, OTHER)):
        request = generate_request(priority=priority)
        assert (await collect(harness.inference.Generate(request, **shows(key)))).complete


async def test_a_tenants_quota_travels_to_the_scheduler(
    start_gateway: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    quota = "tenants.acme = { max_queued_requests = 3, max_queued_tokens = 700 }"
    path.write_text("\n".join([ACME.line, OTHER.line, OPERATOR.line, quota]))
    harness = await start_gateway(api_keys_file=str(path))
    harness.scheduler.auto_tokens = 1000
    for key in (ACME, OTHER, OPERATOR):
        await collect(harness.inference.Generate(generate_request(request_id="r"), **shows(key)))
    assert harness.scheduler.quotas == {
        "acme:r": scheduler_pb2.TenantQuota(max_queued_requests=3, max_queued_tokens=700),
        "other:r": scheduler_pb2.TenantQuota(),
        "r": None,
    }


async def test_a_tenant_cannot_take_all_streams_of_a_gateway(
    start_gateway: Callable[..., Any], tmp_path: Path
) -> None:
    """One request is enough to hold any number of them: each Resume waits for its end."""
    path = tmp_path / "keys.toml"
    path.write_text("\n".join([ACME.line, OTHER.line, "tenants.acme = { max_streams = 2 }"]))
    harness = await start_gateway(api_keys_file=str(path), max_streams=3)
    resume = inference_pb2.ResumeRequest(request_id="a")
    first = harness.inference.Generate(generate_request(request_id="a"), **shows(ACME))
    await first.initial_metadata()
    held = [first, harness.inference.Resume(resume, **shows(ACME))]
    await held[1].initial_metadata()
    refused = await failure(harness.inference.Resume(resume, **shows(ACME)))
    assert (refused.reason, refused.quota_subject) == (Reason.STREAMS_FULL, "max_streams")
    harness.scheduler.auto_tokens = 1000
    assert (await collect(harness.inference.Generate(generate_request(), **shows(OTHER)))).complete
    harness.scheduler.emit("acme:a", 1000)
    for call in held:
        assert (await collect(call)).complete
    assert (await collect(harness.inference.Resume(resume, **shows(ACME)))).complete, "it has ended"


async def test_refused_calls_are_counted(start_gateway: Callable[..., Any], keys_file: str) -> None:
    harness = await start_gateway(api_keys_file=keys_file, metrics_port=free_ports(1)[0])
    await failure(harness.inference.ListModels(inference_pb2.ListModelsRequest()))
    registry = harness.gateway.inference._metrics.registry
    labels = {"pool": "default", "method": "InferenceService.ListModels", "code": "UNAUTHENTICATED"}
    assert registry.get_sample_value("laps_gateway_calls_total", labels) == 1


async def test_a_port_that_others_reach_is_not_opened_without_keys(
    settings: Callable[..., Any], keys_file: str
) -> None:
    from gateway.edge import Edge

    with pytest.raises(SettingsError, match=r"host: 0\.0\.0\.0 .* api_keys_file"):
        Edge.open(settings(host="0.0.0.0"))
    Edge.open(settings(host="0.0.0.0", api_keys_file=keys_file))
    Edge.open(settings(host="0.0.0.0", allow_unauthenticated=True))
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.5.5.5"):
        assert Edge.open(settings(host=host)).keys is None


@pytest.mark.parametrize("rate", [0.5, 2.0, 10.0])
def test_requests_per_second(rate: float) -> None:
    now_s = 100.0
    limits = TenantLimits(lambda: now_s)
    caller = Principal("k", frozenset({Role.CLIENT}), "acme", Quota(requests_per_s=rate))

    def passes() -> bool:
        nonlocal asked_s
        try:
            limits.check(caller, 0)
        except ResourceExhausted as error:
            asked_s = error.retry_after_s or 0.0
            return False
        return True

    asked_s = 0.0
    burst = max(1, int(rate))
    assert [passes() for _ in range(burst + 1)] == [True] * burst + [False]
    with pytest.raises(ResourceExhausted) as caught:
        limits.check(caller, 0)
    assert caught.value.reason is Reason.RATE_EXCEEDED
    now_s += asked_s
    assert passes(), "who waits as long as it was told gets through"
    assert not passes()
    now_s += 1000.0
    assert [passes() for _ in range(burst + 1)] == [True] * burst + [False], "idle time is not saved up"
    other = Principal("k2", frozenset({Role.CLIENT}), "other", Quota(requests_per_s=rate))
    limits.check(other, 0)
    unlimited = Principal("k3", frozenset({Role.CLIENT}), "free")
    for _ in range(100):
        limits.check(unlimited, 0)


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("other:secret-deal needs 0.05 s less; all who", "another request needs 0.05 s less; all who"),
        ("unowned needs 0.05 s less; all who", "another request needs 0.05 s less; all who"),
        ("other:x-1 is past the starvation bound", "another request is past the starvation bound"),
        ("acme:mine.2 is past the starvation bound", "mine.2 is past the starvation bound"),
        ("acme-2:x is past the starvation bound", "another request is past the starvation bound"),
        ("level 1 goes before level 2", "level 1 goes before level 2"),
        ("its worker gave it back", "its worker gave it back"),
    ],
)
async def test_who_took_a_slot_is_not_told_to_others(
    start_gateway: Callable[..., Any], keys_file: str, stored: str, shown: str
) -> None:
    harness = await start_gateway(api_keys_file=keys_file)
    harness.scheduler.auto_tokens = 4
    await collect(harness.inference.Generate(generate_request(max_tokens=4, request_id="r"), **shows(ACME)))
    harness.scheduler.preempted_because = stored
    for key, request_id, expected in ((ACME, "r", shown), (OPERATOR, "acme:r", stored)):
        read = inference_pb2.GetRequestRequest(request_id=request_id)
        answer = await harness.inference.GetRequest(read, **shows(key))
        assert answer.request.preempted_because == expected
