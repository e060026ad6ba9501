"""Connections: one too many, and what comes over one that is no request, get errors of the usual form too."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from gateway.http.answers import error_response
from gateway.http.errors import Refusal
from laps.errors import DeadlineExceeded, Internal, LapsError, Reason, ResourceExhausted
from laps.logs import get_logger

SERVER = "laps"
"""What answers say they come from: the library would tell everyone its version and Python's."""
RETRY_AFTER_S = 1.0

log = get_logger()


class ServerLog(logging.LoggerAdapter[logging.Logger]):
    """The library's log, without what it would write for bytes that are no request: a traceback for each, and
    the bytes themselves, in which there may be keys."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **kwargs: Any) -> None:
        if isinstance(exc_info, HttpProcessingError):
            log.warning("call refused", because="it is no HTTP request", peer=next(iter(args), None))
        else:
            super().exception(msg, *args, exc_info=exc_info, **kwargs)


class Connection(web.RequestHandler):
    """One whose errors have the form of all others, also where no route was found yet."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # It logs, and raises where an answer has begun. Its own answer tells what was sent, and by what.
        super().handle_error(request, status, exc, message)
        response = error_response(_judged(status, exc))
        response.headers["Server"] = SERVER
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        # It is looked at before anything of ours is asked.
        if isinstance(resp, web.HTTPExpectationFailed):
            problem = "Expect may only be 100-continue"
            resp = error_response(Refusal("", problem, "expectation_failed", resp.status))
        return await super().finish_response(request, resp, start_time)


class FullConnection(asyncio.Protocol):
    """A connection too many: it is told so, and closed."""

    def __init__(self, most: int) -> None:
        self._most = most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        error = ResourceExhausted(
            f"the gateway has {self._most} connections, as many as it may; come back later",
            reason=Reason.STREAMS_FULL,
            retry_after_s=RETRY_AFTER_S,
            quota_subject="connections",
        )
        response = error_response(error)
        data = cast(bytes, response.body)
        lines = [f"HTTP/1.1 {response.status} {response.reason}", f"Server: {SERVER}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        lines += [f"Content-Length: {len(data)}", "", ""]
        sink = cast(asyncio.Transport, transport)
        sink.write("\r\n".join(lines).encode() + data)
        sink.close()


def _judged(status: int, error: BaseException | None) -> LapsError:
    """What the client is told. Nothing of what it sent: there may be keys in it."""
    if isinstance(error, LineTooLong):
        return Refusal("", "a line of the request's head is too long", "invalid_request")
    if isinstance(error, HttpProcessingError):
        return Refusal("", "what came is no valid HTTP request", "invalid_request")
    if status == 504:
        return DeadlineExceeded("the gateway took too long")
    return Internal("the gateway has a defect; its log has the details")
