"""What goes back for one generation: a whole answer, or events while it lasts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from gateway.http.errors import error_body, error_headers, http_status, to_json
from gateway.http.logprobs import Entries, Entry
from gateway.http.requests import Asked
from gateway.http.shapes import SHAPES, Shape, check_finished
from gateway.tokenizer import Tokenizer
from laps.errors import Cancelled, LapsError, Reason, ResourceExhausted
from laps.v1 import generation_pb2

REQUEST_ID_HEADER = "X-Request-Id"
STALLED_S = 60.0
"""A client that takes nothing for so long is gone: TCP alone would wait for a quarter of an hour."""
ALIVE_S = 15.0
"""A stream whose request waits has nothing to say, and says so often that it is alive: proxies cut what has
been silent for about a minute."""
ALIVE = b": alive\n\n"
"""A comment, as server-sent events have them: clients skip it."""
LAST_WORDS_S = 5.0
"""For telling a client that reads slowly why its stream ends."""


class Answer(ABC):
    """`begin`, any number of `add`, then `finish`; or `fail` at any time. `close` it in any case."""

    def __init__(self, asked: Asked, model_name: str, tokenizer: Tokenizer) -> None:
        self._asked = asked
        self._model_name = model_name
        self._tokenizer = tokenizer
        self._entries: Entries | None = None
        self._headers: dict[str, str] = {}
        self._shape: Shape

    async def begin(self, request_id: str, before: Sequence[int]) -> None:
        """The request is stored. `before`: the prompt's last tokens."""
        if self._asked.logprobs:
            self._entries = Entries(self._tokenizer, before)
        self._headers[REQUEST_ID_HEADER] = request_id
        self._shape = SHAPES[self._asked.endpoint](self._model_name, request_id)

    async def add(self, chunk: generation_pb2.Chunk) -> None:
        await self._add(chunk.text, None if self._entries is None else self._entries.read(chunk))

    @abstractmethod
    async def finish(self, complete: generation_pb2.Complete) -> web.StreamResponse:
        """The rest. Raises a LapsError where OpenAI has no word for how it ended."""

    async def fail(self, error: LapsError) -> web.StreamResponse:
        return error_response(error, self._asked, self._headers)

    def close(self) -> None:
        """Nothing more will be said."""
        return

    @abstractmethod
    async def _add(self, text: str, entries: list[Entry] | None) -> None: ...


class WholeAnswer(Answer):
    """Gathers all. The model's context bounds how much that can be."""

    def __init__(self, asked: Asked, model_name: str, tokenizer: Tokenizer) -> None:
        super().__init__(asked, model_name, tokenizer)
        self._texts: list[str] = []
        self._gathered: list[Entry] = []

    async def finish(self, complete: generation_pb2.Complete) -> web.StreamResponse:
        check_finished(complete)
        entries = None if self._entries is None else self._gathered
        body = self._shape.whole("".join(self._texts), entries, complete)
        return json_response(body, headers=self._headers)

    async def _add(self, text: str, entries: list[Entry] | None) -> None:
        self._texts.append(text)
        self._gathered += entries or ()


class EventAnswer(Answer):
    """Sends server-sent events, from when the request is stored on. Errors before that have a status."""

    def __init__(self, http: web.Request, asked: Asked, model_name: str, tokenizer: Tokenizer) -> None:
        super().__init__(asked, model_name, tokenizer)
        self._http = http
        self._response = web.StreamResponse()
        self._said_s = 0.0
        """When the last event or comment was sent."""
        self._saying: asyncio.Task[None] | None = None

    def close(self) -> None:
        if self._saying is not None:
            self._saying.cancel()

    async def begin(self, request_id: str, before: Sequence[int]) -> None:
        await super().begin(request_id, before)
        self._response.headers.update(self._headers)
        self._response.headers["Content-Type"] = "text/event-stream; charset=utf-8"
        self._response.headers["Cache-Control"] = "no-cache"
        # Or nginx would gather events until its buffer is full.
        self._response.headers["X-Accel-Buffering"] = "no"
        try:
            await self._response.prepare(self._http)
        except ConnectionError:
            raise _left() from None
        for piece in self._shape.opening():
            await self._send(piece)
        self._said_s = time.monotonic()
        self._saying = asyncio.create_task(self._stay_alive(), name=f"alive {request_id}")

    async def finish(self, complete: generation_pb2.Complete) -> web.StreamResponse:
        check_finished(complete)
        self.close()
        await self._send(self._shape.last_piece(complete))
        if self._asked.include_usage:
            await self._send_event(to_json(self._shape.usage_piece(complete)))
        await self._send_event(b"[DONE]")
        return self._response

    async def fail(self, error: LapsError) -> web.StreamResponse:
        self.close()
        if not self._response.prepared:
            return await super().fail(error)
        self._response.force_close()
        if (transport := self._http.transport) is not None:
            # Closing it would wait until everything that it holds has been read, and that may be never.
            asyncio.get_running_loop().call_later(LAST_WORDS_S, transport.abort)
        with contextlib.suppress(ConnectionError):
            await self._response.write(event(to_json(error_body(error, self._asked.param_of))))
            await self._response.write_eof()
        return self._response

    async def _add(self, text: str, entries: list[Entry] | None) -> None:
        # Tokens without text yet are told by the usage alone.
        if text or entries:
            await self._send(self._shape.piece(text, entries))

    async def _send(self, piece: dict[str, Any]) -> None:
        if self._asked.include_usage:
            piece = piece | {"usage": None}
        await self._send_event(to_json(piece))

    async def _stay_alive(self) -> None:
        # Who has left, or takes nothing, is found out by others.
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.sleep(self._said_s + ALIVE_S - time.monotonic())
                if time.monotonic() >= self._said_s + ALIVE_S:
                    self._said_s = time.monotonic()
                    await self._response.write(ALIVE)

    async def _send_event(self, data: bytes) -> None:
        """Waits while the client does not read."""
        self._said_s = time.monotonic()
        try:
            async with asyncio.timeout(STALLED_S):
                await self._response.write(event(data))
        except TimeoutError:
            raise ResourceExhausted(
                f"the client took nothing for {STALLED_S:g} s and lost its stream",
                reason=Reason.CLIENT_TOO_SLOW,
                quota_subject="stream_buffer_tokens",
            ) from None
        except ConnectionError:
            raise _left() from None


def event(data: bytes) -> bytes:
    """A server-sent event. The data are of one line, as JSON is."""
    return b"data: " + data + b"\n\n"


def _left() -> Cancelled:
    return Cancelled("the client has closed its connection")


def json_response(
    body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(body=to_json(body), status=status, headers=headers, content_type="application/json")


def error_response(
    error: LapsError, asked: Asked | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    body = error_body(error, asked.param_of) if asked is not None else error_body(error)
    return json_response(body, http_status(error), (headers or {}) | error_headers(error))
