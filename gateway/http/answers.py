"""What goes back for one call: a whole answer, or events while it lasts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gateway.http.errors import error_body, error_headers, http_status, to_json
from gateway.http.logprobs import Entries, Entry
from gateway.http.requests import Asked
from gateway.http.shapes import SHAPES, Ended, Shape, check_finished
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


@dataclass(slots=True)
class _Output:
    """One of an answer's outputs, as far as it has come."""

    request_id: str = ""
    entries: Entries | None = None
    complete: generation_pb2.Complete | None = None


class Answer(ABC):
    """Of each output `begin`, any number of `add`, then `end`; `finish` when all have ended, or `fail` at any
    time. `close` it in any case. Outputs go by their index, and each may have a task of its own."""

    def __init__(self, asked: Asked, model_name: str, tokenizer: Tokenizer) -> None:
        self._asked = asked
        self._model_name = model_name
        self._tokenizer = tokenizer
        self._outputs = [_Output() for _ in range(asked.outputs)]
        self._to_begin = len(self._outputs)
        self._open = asyncio.Event()
        self._headers: dict[str, str] = {}
        self._shape: Shape

    async def begin(self, index: int, request_id: str, before: Sequence[int]) -> None:
        """The output's request is stored. `before`: its prompt's last tokens. Returns when those of all
        outputs are: until then an error has a status."""
        output = self._outputs[index]
        output.request_id = request_id
        if self._asked.logprobs:
            output.entries = Entries(self._tokenizer, before)
        self._to_begin -= 1
        if self._to_begin:
            await self._open.wait()
            return
        name = self._asked.request_id or self._outputs[0].request_id
        self._headers[REQUEST_ID_HEADER] = name
        self._shape = SHAPES[self._asked.endpoint](
            self._model_name, name, len(self._outputs), self._asked.outputs_per_prompt
        )
        await self._begin()
        self._open.set()

    async def add(self, index: int, chunk: generation_pb2.Chunk) -> None:
        entries = self._outputs[index].entries
        await self._add(index, chunk.text, None if entries is None else entries.read(chunk))

    async def end(self, index: int, complete: generation_pb2.Complete) -> None:
        """Raises a LapsError where OpenAI has no word for how it ended."""
        check_finished(complete)
        self._outputs[index].complete = complete
        await self._end(index, complete)

    @abstractmethod
    async def finish(self) -> web.StreamResponse:
        """The rest."""

    async def fail(self, error: LapsError) -> web.StreamResponse:
        return error_response(error, self._asked, self._headers)

    def close(self) -> None:
        """Nothing more will be said."""
        return

    def _completes(self) -> list[generation_pb2.Complete]:
        return [each.complete for each in self._outputs if each.complete is not None]

    async def _begin(self) -> None:
        """All are stored."""
        return

    @abstractmethod
    async def _add(self, index: int, text: str, entries: list[Entry] | None) -> None: ...

    async def _end(self, index: int, complete: generation_pb2.Complete) -> None:
        """One has ended."""
        return


class WholeAnswer(Answer):
    """Gathers all. The model's context bounds how much that can be."""

    def __init__(self, asked: Asked, model_name: str, tokenizer: Tokenizer) -> None:
        super().__init__(asked, model_name, tokenizer)
        self._texts: list[list[str]] = [[] for _ in self._outputs]
        self._entries: list[list[Entry]] = [[] for _ in self._outputs]

    async def finish(self) -> web.StreamResponse:
        wanted = self._asked.logprobs
        ended = [
            Ended(output.request_id, "".join(texts), entries if wanted else None, complete)
            for output, texts, entries, complete in zip(
                self._outputs, self._texts, self._entries, self._completes(), strict=True
            )
        ]
        return json_response(self._shape.whole(ended), headers=self._headers)

    async def _add(self, index: int, text: str, entries: list[Entry] | None) -> None:
        self._texts[index].append(text)
        self._entries[index] += entries or ()


class EventAnswer(Answer):
    """Sends server-sent events, from when all requests are stored on. Errors before that have a status."""

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

    async def _begin(self) -> None:
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
        name = self._headers[REQUEST_ID_HEADER]
        self._saying = asyncio.create_task(self._stay_alive(), name=f"alive {name}")

    async def _end(self, index: int, complete: generation_pb2.Complete) -> None:
        await self._send(self._shape.last_piece(index, self._outputs[index].request_id, complete))

    async def finish(self) -> web.StreamResponse:
        self.close()
        if self._asked.include_usage:
            await self._send_event(to_json(self._shape.usage_piece(self._completes())))
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

    async def _add(self, index: int, text: str, entries: list[Entry] | None) -> None:
        # Tokens without text yet are told by the usage alone.
        if text or entries:
            await self._send(self._shape.piece(index, text, entries))

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
