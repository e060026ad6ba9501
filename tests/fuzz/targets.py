"""What the fuzzer throws bytes at. Each target raises for a defect; refusals of ours are no defects.

`make fuzz SECONDS=60` runs them under atheris, which looks for inputs that reach new code; the tests run them
on hypothesis' inputs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from gateway.admission import deadline, digest, disconnect_rule
from gateway.http import body
from gateway.http.parameters import Endpoint
from gateway.http.requests import read_request
from gateway.validation import Bounds, check_before_tokenizing, check_request_id
from gateway.wire import find_fault
from laps.errors import InvalidArgument, LapsError
from laps.v1 import inference_pb2, scheduler_pb2, worker_pb2
from scheduler_svc import checks, convert
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.records import TOKEN_BYTES, Refused, RequestSpec, StepCosts, StepReport, Worker
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.store import codec
from scheduler_svc.store.errors import RecordDamaged

VOCABULARY = 1000
BOUNDS = Bounds("tiny", VOCABULARY, context_tokens=64, default_max_tokens=16)


def grpc_requests(data: bytes) -> None:
    """The gateway's way from bytes to what would be submitted, up to the tokenizer."""
    try:
        request = inference_pb2.GenerateRequest.FromString(data)
    except DecodeError:
        field, why = find_fault(data, inference_pb2.GenerateRequest.DESCRIPTOR)
        assert why, field
        return
    try:
        check_before_tokenizing(request, BOUNDS)
        deadline(request, None, time.time())
        if request.request_id:
            check_request_id(request.request_id)
    except LapsError as refusal:
        assert refusal.message  # noqa: PT017
        return
    disconnect_rule(request, 30.0)
    assert len(digest(request)) == 32
    assert request.WhichOneof("prompt")
    assert -100 <= request.priority <= 100


def http_bodies(data: bytes) -> None:
    """The same by HTTP."""
    for endpoint in Endpoint:
        try:
            asked = read_request(body.parse(data), endpoint, "")
            for index in range(asked.outputs):
                check_before_tokenizing(asked.output(index), BOUNDS)
        except LapsError as refusal:
            assert refusal.message  # noqa: PT017


def submissions(data: bytes) -> None:
    """What a gateway sends: refused, or accepted by a core that stays whole."""
    try:
        request = scheduler_pb2.SubmitRequest.FromString(data)
        checks.check_spec(request.spec)
    except (DecodeError, InvalidArgument):
        return
    core, _ = pool()
    try:
        core.submit(convert.request_spec(request.spec), 2.0, convert.tenant_quota(request))
    except Refused:
        return
    finally:
        core.tick(2.0)
        core.check_invariants()


def worker_messages(data: bytes) -> None:
    """What a worker says in its session, of its own leases and of others'."""
    try:
        message = worker_pb2.SessionRequest.FromString(data)
        if message.WhichOneof("message") == "hello":
            checks.check_hello(message.hello)
        elif message.WhichOneof("message") == "report":
            checks.check_report(message.report)
    except (DecodeError, InvalidArgument):
        return
    core, neighbour = pool()
    before = bytes(neighbour.output)
    if message.WhichOneof("message") == "hello":
        core.worker_joined(convert.worker(message.hello), convert.residents(message.hello), 2.0)
    else:
        core.report(convert.step_report("liar", message.report), 2.0)
    after_any_report(core)
    assert core.get("honest") is neighbour, "what another worker runs is not this one's"
    assert bytes(neighbour.output) == before


def after_any_report(core: Scheduler) -> None:
    """What must hold whatever was said."""
    core.tick(2.0)
    core.check_invariants()
    for request in core.requests.values():
        assert request.attained_s >= 0
        assert request.rank == request.rank, "a rank that is no number would put the queue out of order"
        assert all(token < VOCABULARY for token in memoryview(bytes(request.output)).cast("I"))
        # What is stored can be read again.
        values = codec.new_request_fields(request)
        codec.request_from_fields(request.request_id, dict(zip(values[::2], values[1::2], strict=True)))


def pool() -> tuple[Scheduler, object]:
    """A pool with a worker that lies and one that does not; each runs a request. Lease ids are 1<<32 | n."""
    core = Scheduler("p", make_policy("laps-sd"), SchedulerSettings())
    for number, name in enumerate(("lied-about", "honest")):
        worker = Worker(("liar", "other")[number], 1, StepCosts(0.001, 0.01), vocabulary_size=VOCABULARY)
        core.worker_joined(worker, [], 1.0)
        core.submit(RequestSpec(name, b"\1\0\0\0", 32, digest=name), 1.0)
        core.tick(1.0)
    neighbour = core.get("honest")
    assert neighbour is not None
    core.report(
        StepReport("other", [neighbour.lease_id], [0], [2], [3], [1], b"\2\0\0\0\3\0\0\0", step_s=0.01), 1.5
    )
    core.tick(1.5)
    return core, neighbour


def stored_records(data: bytes) -> None:
    """A request's hash, prompt and parameters as they may come back from a store that others wrote to."""
    text = data.decode(errors="replace")
    parts = text.split("\n")
    stored = dict(zip(codec.REQUEST_NAMES, (parts + [""] * 99)[: len(codec.REQUEST_NAMES)], strict=True))
    good = codec.new_request_fields(_request())
    mixed = dict(zip(good[::2], good[1::2], strict=True)) | {k: v for k, v in stored.items() if v}
    for fields in (stored, mixed):
        try:
            with codec.damage("r"):
                request = codec.request_from_fields(
                    "r",
                    fields,
                    prompt=codec.tokens_from_text(parts[0]),
                    params_json=codec.params_from_text(parts[-1]),
                )
        except RecordDamaged as damaged:
            assert "\n" not in str(damaged)  # noqa: PT017
            continue
        assert request.rank == request.rank
        assert isinstance(json.loads(request.spec.params_json), dict)
    try:
        late = codec.PromptText(parts[0], len(parts[0].split(" ")))
    except ValueError:
        return
    assert len(late.packed()) == TOKEN_BYTES * late.tokens


def _request() -> object:
    request = pool()[0].get("honest")
    assert request is not None
    return request


TARGETS: dict[str, Callable[[bytes], None]] = {
    "grpc": grpc_requests,
    "http": http_bodies,
    "submissions": submissions,
    "worker": worker_messages,
    "records": stored_records,
}
