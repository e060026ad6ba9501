"""Who may call what: the one table. A method or route that does not stand here is refused."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    """What a caller is. Clients and operators have API keys, services have certificates."""

    ANYONE = "anyone"
    """Every caller, also one without credentials."""
    CLIENT = "client"
    """Generates; sees its own tenant's requests and no others."""
    OPERATOR = "operator"
    """Sees the whole pool, and may cancel any request."""
    GATEWAY = "gateway"
    WORKER = "worker"


_ANYONE = frozenset({Role.ANYONE})
_CLIENT = frozenset({Role.CLIENT, Role.OPERATOR})
_OPERATOR = frozenset({Role.OPERATOR})
_GATEWAY = frozenset({Role.GATEWAY})
_WORKER = frozenset({Role.WORKER})

METHODS: dict[str, frozenset[Role]] = {
    # On the gateway.
    "/laps.v1.InferenceService/Generate": _CLIENT,
    "/laps.v1.InferenceService/Resume": _CLIENT,
    "/laps.v1.InferenceService/Cancel": _CLIENT,
    "/laps.v1.InferenceService/GetRequest": _CLIENT,
    "/laps.v1.InferenceService/ListModels": _CLIENT,
    # On the gateway, and on the scheduler, which answers the gateway.
    "/laps.v1.QueueService/ListQueues": _OPERATOR | _GATEWAY,
    "/laps.v1.QueueService/ListRequests": _OPERATOR | _GATEWAY,
    "/laps.v1.QueueService/ListWorkers": _OPERATOR | _GATEWAY,
    "/laps.v1.QueueService/GetTimeline": _OPERATOR | _GATEWAY,
    "/laps.v1.QueueService/Watch": _OPERATOR | _GATEWAY,
    # On the scheduler.
    "/laps.v1.SchedulerService/Submit": _GATEWAY,
    "/laps.v1.SchedulerService/SubmitMany": _GATEWAY,
    "/laps.v1.SchedulerService/Deliver": _GATEWAY,
    "/laps.v1.SchedulerService/CancelRequest": _GATEWAY,
    "/laps.v1.SchedulerService/ReadRequest": _GATEWAY,
    "/laps.v1.SchedulerService/DescribePool": _GATEWAY,
    "/laps.v1.WorkerService/Session": _WORKER,
    # On all of them. Probes have no credentials; the contract is no secret.
    "/grpc.health.v1.Health/Check": _ANYONE,
    "/grpc.health.v1.Health/List": _ANYONE,
    "/grpc.health.v1.Health/Watch": _ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _CLIENT,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _CLIENT,
}

ROUTES: dict[str, frozenset[Role]] = {
    # The gateway's HTTP port, by route.
    "/v1/completions": _CLIENT,
    "/v1/chat/completions": _CLIENT,
    "/v1/models": _CLIENT,
    "/v1/models/{name}": _CLIENT,
    "/health": _ANYONE,
    "/ready": _ANYONE,
    # The console's pages hold nothing; what they show comes from the questions.
    "/": _ANYONE,
    "/console": _ANYONE,
    "/console/": _ANYONE,
    "/console/static/{file}": _ANYONE,
    "/console/api/session": _OPERATOR,
    "/console/api/watch": _OPERATOR,
    "/console/api/queue": _OPERATOR,
    "/console/api/requests/{request_id}": _OPERATOR,
    "/console/api/requests/{request_id}/text": _OPERATOR,
    "/console/api/requests/{request_id}/cancel": _OPERATOR,
}


def roles_of(method: str) -> frozenset[Role]:
    """Who may call a gRPC method or an HTTP route; empty: nobody."""
    return METHODS.get(method) or ROUTES.get(method) or frozenset()
