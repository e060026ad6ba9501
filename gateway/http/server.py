"""The HTTP server: routes, how a body is read, and the bounds of connections."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

from aiohttp import web
from google.protobuf.message import Message

from gateway.calls import Call, accounted, as_laps_error
from gateway.edge import Edge
from gateway.http import body
from gateway.http.answers import (
    REQUEST_ID_HEADER,
    Answer,
    EventAnswer,
    WholeAnswer,
    error_response,
    json_response,
)
from gateway.http.connections import SERVER, Connection, FullConnection, ServerLog
from gateway.http.console.routes import Console
from gateway.http.errors import Refusal
from gateway.http.parameters import Endpoint
from gateway.http.requests import Asked, read_request
from gateway.inference import InferenceService
from gateway.metrics import Metrics
from gateway.tokenizer import Tokenizer
from gateway.validation import check_before_tokenizing, check_model, check_request_id
from laps.errors import (
    InvalidArgument,
    LapsError,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from laps.logs import get_logger
from laps.security.principal import set_caller
from laps.security.tls import http_context
from laps.setting import is_loopback
from laps.settings import Settings
from laps.v1 import generation_pb2, inference_pb2

IDLE_S = 75.0
"""An open connection may be without a whole head of a request for so long; proxies expect about a minute."""
HANDSHAKE_S = 10.0
BODY_S = 30.0
"""A body must have come within this time."""
LINGER_S = 2.0
"""What still comes of a body that was refused is read for so long, or the answer would be lost with it."""
SPARE_CONNECTIONS = 1000
"""Connections beyond the streams: between two calls, or for a question that is not a stream."""
RETRY_AFTER_S = 1.0
CLOSE_S = 0.2
"""When all is stopped, answers that are on their way have so long to arrive."""
_OFF_LOOP_BYTES = 1 << 16
"""Longer bodies are read on a thread: from here on it takes longer than a millisecond."""

log = get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpCall(Call):
    """One output. It becomes part of an answer when the body has been understood."""

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str], index: int = 0) -> None:
        super().__init__(
            f"OpenAI.{endpoint.name.title()}", [(name.lower(), value) for name, value in headers.items()]
        )
        self.index = index
        self.answer: Answer | None = None
        self.complete = generation_pb2.Complete()

    async def accepted(self, request_id: str, before: Sequence[int]) -> None:
        assert self.answer is not None
        await self.answer.begin(self.index, request_id, before)

    async def write(self, message: Message) -> None:
        assert self.answer is not None
        response = cast(inference_pb2.GenerateResponse, message)
        if response.WhichOneof("event") == "complete":
            self.complete = response.complete
        else:
            await self.answer.add(self.index, response.chunk)

    def time_left_s(self) -> float | None:
        # HTTP has no deadline: a client that has one closes its connection, or says so in the body.
        return None


class HttpServer:
    """`start` it, `stop` it. `is_ready` says whether generations have a chance at present."""

    def __init__(
        self,
        settings: Settings,
        inference: InferenceService,
        tokenizer: Tokenizer,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        edge: Edge | None = None,
        console: Console | None = None,
    ) -> None:
        self.port = settings.http_port
        self._settings = settings
        self._inference = inference
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._is_ready = is_ready
        self._edge = edge or Edge()
        self._console = console
        self._created_s = int(time.time())
        self._most_connections = settings.max_streams + SPARE_CONNECTIONS
        self._own_machine_only = (
            self._edge.keys is None and is_loopback(settings.host) and not settings.allow_unauthenticated
        )
        self._runner: web.AppRunner
        self._options: dict[str, Any]
        """Of each connection."""
        self._listening: asyncio.Server

    async def start(self) -> None:
        """Raises OSError with one clear line when the port is taken."""
        app = web.Application(
            middlewares=[_in_openais_shape, self._checked], client_max_size=self._settings.max_message_bytes
        )
        for endpoint in Endpoint:
            app.router.add_post(endpoint.value, self._generation(endpoint))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        if self._console is not None:
            self._console.add_to(app.router)
        app.on_response_prepare.append(_sign)
        self._options = {
            "access_log": None,
            "logger": ServerLog(logging.getLogger("aiohttp.server")),
            "keepalive_timeout": IDLE_S,
            "lingering_time": LINGER_S,
            # A small body could become a large one only after its size has been looked at.
            "auto_decompress": False,
        }
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=CLOSE_S)
        await self._runner.setup()
        host, edge = self._settings.host, self._edge
        tls = http_context(edge.tls, ask_clients=edge.asks_for_certificates) if edge.tls else None
        try:
            self._listening = await asyncio.get_running_loop().create_server(
                self._connection,
                host.strip("[]"),
                self.port,
                reuse_address=True,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_S if tls else None,
                reuse_port=self._settings.share_port or None,
            )
        except OSError:
            await self._runner.cleanup()
            raise OSError(
                f"cannot listen on {host}:{self.port}: the port is in use or not permitted"
            ) from None

    async def stop(self) -> None:
        """Takes no more connections; what is being answered gets a moment to end."""
        self._listening.close()
        if self._console is not None:
            await self._console.close()
        await self._runner.cleanup()

    def _connection(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self._most_connections:
            return FullConnection(self._most_connections)
        return Connection(server, loop=asyncio.get_running_loop(), **self._options)

    @web.middleware
    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets through what the table of access says. What is not there at all is found out later."""
        resource = request.match_info.route.resource
        if resource is not None:
            route = resource.canonical
            try:
                if self._own_machine_only and not is_loopback(_host_name(request)):
                    # A web page whose name has been made to point here would be let in by every browser.
                    raise PermissionDenied(
                        "this gateway serves its own machine, under its own names; see allow_unauthenticated"
                    )
                principal = self._edge.by_header(request.headers.get("Authorization", ""))
                principal.check(route)
            except LapsError as refusal:
                self._metrics.calls.labels(f"OpenAI.{route}", refusal.status).inc()
                log.warning("call refused", method=route, because=refusal.reason.name, peer=request.remote)
                raise
            set_caller(principal)
        return await handler(request)

    def _generation(self, endpoint: Endpoint) -> Handler:
        async def generate(http: web.Request) -> web.StreamResponse:
            call = HttpCall(endpoint, http.headers)
            try:
                return await self._generate(http, endpoint, call)
            finally:
                if call.answer is not None:
                    call.answer.close()

        return generate

    async def _generate(self, http: web.Request, endpoint: Endpoint, call: HttpCall) -> web.StreamResponse:
        problem: LapsError
        with accounted(call, self._metrics) as outcome:
            try:
                asked = await self._read(http, endpoint)
                call.answer = self._answer(http, asked)
                if asked.outputs == 1:
                    await self._output(asked, call, call.answer)
                else:
                    await self._outputs(http, asked, call, call.answer)
                return await call.answer.finish()
            except Exception as error:
                problem = as_laps_error(error, call)
                outcome(problem.status)
        # Outside, because this may wait for a client that reads nothing.
        return error_response(problem) if call.answer is None else await call.answer.fail(problem)

    async def _output(self, asked: Asked, call: HttpCall, answer: Answer) -> None:
        await self._inference.generate(asked.output(call.index), call)
        await answer.end(call.index, call.complete)

    async def _outputs(self, http: web.Request, asked: Asked, call: HttpCall, answer: Answer) -> None:
        """All at once. When one fails, the others are cancelled with it."""
        # None is stored where it can be known that not all will be.
        for request in asked.requests:
            check_before_tokenizing(request, self._inference.bounds)

        async def another(index: int) -> None:
            other = HttpCall(asked.endpoint, http.headers, index)
            other.answer = answer
            with accounted(other, self._metrics) as outcome:
                try:
                    await self._output(asked, other, answer)
                except Exception as error:
                    problem = as_laps_error(error, other)
                    outcome(problem.status)
                    raise problem from None

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._output(asked, call, answer))
                for index in range(1, asked.outputs):
                    group.create_task(another(index))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _answer(self, http: web.Request, asked: Asked) -> Answer:
        model_name = self._settings.model_name
        if asked.stream:
            return EventAnswer(http, asked, model_name, self._tokenizer)
        return WholeAnswer(asked, model_name, self._tokenizer)

    async def _read(self, http: web.Request, endpoint: Endpoint) -> Asked:
        if http.content_type != "application/json":
            # A web page may send other types to a local server without asking anyone.
            raise _wrong_media("Content-Type must be application/json")
        if http.headers.get("Content-Encoding", "identity") != "identity":
            raise _wrong_media("the body must not be compressed")
        if (http.content_length or 0) > self._settings.max_message_bytes:
            raise _too_large(self._settings.max_message_bytes)
        try:
            async with asyncio.timeout(BODY_S):
                data = await http.read()
        except web.HTTPRequestEntityTooLarge:
            raise _too_large(self._settings.max_message_bytes) from None
        except TimeoutError:
            raise Refusal("", f"the body did not come within {BODY_S:g} s", "timeout", 408) from None
        except web.RequestPayloadError:
            raise Refusal("", "the body is not what its headers say", "invalid_body") from None
        request_id = _request_id(http)
        if len(data) > _OFF_LOOP_BYTES:
            return await asyncio.to_thread(lambda: read_request(body.parse(data), endpoint, request_id))
        return read_request(body.parse(data), endpoint, request_id)

    async def _models(self, http: web.Request) -> web.StreamResponse:
        return json_response({"object": "list", "data": [self._describe()]})

    async def _model(self, http: web.Request) -> web.StreamResponse:
        check_model(http.match_info["name"], self._inference.bounds)
        return json_response(self._describe())

    def _describe(self) -> dict[str, object]:
        model = self._inference.describe_model()
        return {
            "id": model.name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "laps",
            # Load generators look for this one.
            "max_model_len": model.context_tokens,
            "laps": {
                "pool": model.pool,
                "target": model.target,
                "draft": model.draft or None,
                "vocabulary_size": model.vocabulary_size,
                "context_tokens": model.context_tokens,
                "workers": model.workers,
                "slots": model.slots,
            },
        }

    async def _health(self, http: web.Request) -> web.StreamResponse:
        return json_response({"status": "ok"})

    async def _ready(self, http: web.Request) -> web.StreamResponse:
        if not self._is_ready():
            problem = "the gateway is being stopped, or has no connection to the pool's scheduler"
            raise Unavailable(problem, reason=Reason.NOT_READY, retry_after_s=RETRY_AFTER_S)
        return json_response({"status": "ready"})


@web.middleware
async def _in_openais_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except LapsError as error:
        return error_response(error)
    except web.HTTPMethodNotAllowed as error:
        allowed = {"Allow": error.headers["Allow"]}
        problem = f"{request.path[:128]} does not take {request.method[:16]}"
        return error_response(Refusal("", problem, "method_not_allowed", 405, allowed))
    except web.HTTPNotFound:
        return error_response(Refusal("", f"there is nothing at {request.path[:128]}", "not_found", 404))


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER


def _host_name(http: web.Request) -> str:
    """What the client takes us for, without the port."""
    try:
        return urlsplit(f"//{http.host}").hostname or ""
    except ValueError:
        return ""


def _request_id(http: web.Request) -> str:
    """The client's own id where it can be ours: the request can then be sent again, and is the same one."""
    given = http.headers.get(REQUEST_ID_HEADER, "")
    try:
        check_request_id(given)
    except InvalidArgument:
        return ""
    return given


def _too_large(max_bytes: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"the body has more than {max_bytes} bytes, as many as it may",
        reason=Reason.MESSAGE_TOO_LARGE,
        metadata={"limit_bytes": max_bytes},
    )


def _wrong_media(problem: str) -> Refusal:
    return Refusal("", problem, "unsupported_media_type", 415)
