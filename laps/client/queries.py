"""The calls that ask and do not stream: what to send and how to read the answer, for both clients."""

from __future__ import annotations

from laps.client.results import (
    Completion,
    Model,
    PoolQueues,
    Request,
    RequestDetail,
    Snapshot,
    Speculation,
    Timing,
    Usage,
    Worker,
    enum_word,
    from_proto,
)
from laps.errors import InvalidArgument, LapsError, Reason, Unavailable
from laps.v1 import inference_pb2, queue_pb2

UNARY_TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 2.0
"""For the cancellation of a request whose caller is about to leave."""
PAGE_SIZE = 1000


def authorization(api_key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a key."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def request_detail(answer: inference_pb2.GetRequestResponse) -> RequestDetail:
    request = from_proto(Request, answer.request)
    completion = None
    if answer.HasField("complete"):
        complete = answer.complete
        completion = from_proto(
            Completion,
            complete,
            request_id=request.request_id,
            text=answer.text,
            token_ids=tuple(answer.output.ids),
            usage=from_proto(Usage, complete.usage),
            timing=from_proto(Timing, complete.timing),
            speculation=from_proto(Speculation, complete.speculation),
        )
    return RequestDetail(request, tuple(answer.output.ids), answer.text, completion)


def models(answer: inference_pb2.ListModelsResponse) -> list[Model]:
    return [from_proto(Model, model) for model in answer.models]


def queues(answer: queue_pb2.ListQueuesResponse) -> list[PoolQueues]:
    return [from_proto(PoolQueues, pool) for pool in answer.pools]


def workers(answer: queue_pb2.ListWorkersResponse) -> list[Worker]:
    return [from_proto(Worker, worker) for worker in answer.workers]


def snapshot(answer: queue_pb2.WatchResponse) -> Snapshot:
    return from_proto(Snapshot, answer)


def state_word(state: int) -> str:
    return enum_word(queue_pb2.RequestState.DESCRIPTOR, state)


def list_request(
    states: tuple[str, ...], pool: str, page_token: str, missing: int
) -> queue_pb2.ListRequestsRequest:
    """The next page's request while `missing` requests are still wanted."""
    numbers = []
    for state in states:
        name = f"REQUEST_STATE_{state.upper()}"
        if name not in queue_pb2.RequestState.keys():  # noqa: SIM118 (not a dict)
            raise InvalidArgument("states", f"{state!r} is none of queued, running, preempted, finished")
        numbers.append(queue_pb2.RequestState.Value(name))
    return queue_pb2.ListRequestsRequest(
        pool=pool, states=numbers, page_size=min(missing, PAGE_SIZE), page_token=page_token
    )


def watch_request(pool: str, interval_s: float, head_limit: int) -> queue_pb2.WatchRequest:
    request = queue_pb2.WatchRequest(pool=pool, head_limit=head_limit)
    request.interval.FromNanoseconds(int(interval_s * 1e9))
    return request


_HINTS = {
    "Connection refused": "is a gateway running there?",
    "Socket closed": "does it expect TLS (tls_ca)?",
    "http1.x": "this is an HTTP port, gRPC has another one",
}
"""What most often is behind a part of gRPC's words."""


def name_server(error: LapsError, server: str) -> LapsError:
    """A missing connection said in a person's words; other errors as they are."""
    if not (isinstance(error, Unavailable) and error.from_transport):
        return error
    # gRPC lists what it tried on the way; the last part is why.
    why = error.message.rsplit(": ", 1)[-1].rstrip("]. ")
    hint = next((f"; {hint}" for words, hint in _HINTS.items() if words in why), "")
    named = Unavailable(f"there is no connection to {server} ({why}){hint}", reason=Reason.UNREACHABLE)
    named.from_transport = True
    return named
