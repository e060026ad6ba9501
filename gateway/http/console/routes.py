"""The console's routes, their headers, and the stream that keeps pages current."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable

from aiohttp import web

from gateway.admission import unpack
from gateway.http.answers import ALIVE, STALLED_S, event, json_response
from gateway.http.console.feed import WINDOW_ROWS, Feed, Viewer
from gateway.http.errors import Refusal, invalid
from gateway.scheduler_link import SchedulerLink
from gateway.tokenizer import Tokenizer
from gateway.validation import check_request_id
from laps.client.results import enum_word
from laps.errors import LapsError, PermissionDenied
from laps.logs import get_logger
from laps.security.access import Role
from laps.security.principal import EVERYBODY, caller
from laps.settings import Settings
from laps.v1 import queue_pb2

ALIVE_S = 5.0
"""A stream says so often that it is alive, if it has nothing else to say."""
CONTENT_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = get_logger()


class Console:
    """`add_to` an application; `close` it."""

    def __init__(self, settings: Settings, link: SchedulerLink, tokenizer: Tokenizer) -> None:
        self.feed = Feed(link)
        self._settings = settings
        self._link = link
        self._tokenizer = tokenizer
        self._files = {path.name: path.read_bytes() for path in _static_files()}
        self._tags = {
            name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, data in self._files.items()
        }

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/", _to_console)
        router.add_get("/console", self._page)
        router.add_get("/console/", _to_console)
        router.add_get("/console/static/{file}", self._file)
        router.add_get("/console/api/session", _guarded(self._session))
        router.add_get("/console/api/watch", _guarded(self._watch))
        router.add_get("/console/api/queue", _guarded(self._queue))
        router.add_get("/console/api/requests/{request_id}", _guarded(self._request))
        router.add_get("/console/api/requests/{request_id}/text", _guarded(self._text))
        router.add_post("/console/api/requests/{request_id}/cancel", _guarded(self._cancel))

    async def close(self) -> None:
        await self.feed.close()

    def may_cancel(self) -> bool:
        """An operator who has shown a key may; where nobody is asked for one, if the setting says so."""
        known = caller() is not EVERYBODY and Role.OPERATOR in caller().roles
        return known or self._settings.console_allow_cancel

    async def _page(self, http: web.Request) -> web.StreamResponse:
        return self._static(http, "index.html")

    async def _file(self, http: web.Request) -> web.StreamResponse:
        name = http.match_info["file"]
        if name not in self._files:
            raise web.HTTPNotFound
        return self._static(http, name)

    def _static(self, http: web.Request, name: str) -> web.Response:
        # Asked for again each time, and most often not sent again: a new version is seen at once.
        headers = HEADERS | {"Cache-Control": "no-cache", "ETag": self._tags[name]}
        if http.headers.get("If-None-Match") == self._tags[name]:
            return web.Response(status=304, headers=headers)
        kind = CONTENT_TYPES[name[name.rindex(".") :]]
        return web.Response(body=self._files[name], content_type=kind, charset="utf-8", headers=headers)

    async def _session(self, http: web.Request) -> web.StreamResponse:
        """What this viewer may do."""
        return json_response(
            {
                "may_cancel": self.may_cancel(),
                "shows_text": self._settings.console_show_text,
                "model": self._settings.model_name,
                "window_rows": WINDOW_ROWS,
            },
            headers=_PRIVATE,
        )

    async def _watch(self, http: web.Request) -> web.StreamResponse:
        viewer = self.feed.join()
        try:
            return await self._show(http, viewer)
        finally:
            self.feed.leave(viewer)

    async def _show(self, http: web.Request, viewer: Viewer) -> web.StreamResponse:
        response = web.StreamResponse(headers=_PRIVATE | {"X-Accel-Buffering": "no"})
        response.content_type, response.charset = "text/event-stream", "utf-8"
        try:
            await response.prepare(http)
            while True:
                try:
                    async with asyncio.timeout(ALIVE_S):
                        said = event(await viewer.take())
                except TimeoutError:
                    said = ALIVE
                async with asyncio.timeout(STALLED_S):
                    await response.write(said)
        except (ConnectionError, TimeoutError):
            # Gone, or as good as gone.
            if http.transport is not None:
                http.transport.abort()
        return response

    async def _queue(self, http: web.Request) -> web.StreamResponse:
        level, offset = _number(http, "level"), _number(http, "offset")
        if offset % WINDOW_ROWS:
            raise invalid("offset", f"must be a multiple of {WINDOW_ROWS}")
        body = await self.feed.window(level, offset)
        return web.Response(body=body, content_type="application/json", headers=_PRIVATE)

    async def _request(self, http: web.Request) -> web.StreamResponse:
        body = await self.feed.timeline(_request_id(http))
        return web.Response(body=body, content_type="application/json", headers=_PRIVATE)

    async def _text(self, http: web.Request) -> web.StreamResponse:
        request_id = _request_id(http)
        if not self._settings.console_show_text:
            raise PermissionDenied("texts are not shown here: console_show_text is off")
        stored = await self._link.read(request_id, include_output=True, include_prompt=True)
        prompt, output = unpack(stored.prompt_token_ids), unpack(stored.output_token_ids)
        prompt_text, output_text = await asyncio.to_thread(self._texts, prompt, output)
        return json_response({"prompt": prompt_text, "output": output_text}, headers=_PRIVATE)

    def _texts(self, prompt: Sequence[int], output: Sequence[int]) -> tuple[str, str]:
        # Some tokenizers drop a space at the beginning: what follows the prompt is not one.
        before = prompt[-self._tokenizer.context_tokens :] if self._tokenizer.context_tokens else ()
        known = self._tokenizer.decode(before)
        text = self._tokenizer.decode([*before, *output])
        output_text = text[len(known) :] if text.startswith(known) else self._tokenizer.decode(output)
        return self._tokenizer.decode(prompt), output_text

    async def _cancel(self, http: web.Request) -> web.StreamResponse:
        request_id = _request_id(http)
        if http.content_type != "application/json":
            # Other types a page from elsewhere may send without asking anyone.
            raise Refusal("", "Content-Type must be application/json", "unsupported_media_type", 415)
        if not self.may_cancel():
            raise PermissionDenied("this console may not cancel: see console_allow_cancel")
        answer = await self._link.cancel(request_id)
        self.feed.forget(request_id)
        log.info("cancelled", request_id=request_id, by=caller().name, peer=http.remote)
        state = enum_word(queue_pb2.RequestState.DESCRIPTOR, answer.state)
        return json_response({"request_id": request_id, "state": state}, headers=_PRIVATE)


_PRIVATE = HEADERS | {"Cache-Control": "no-store"}


def _guarded(handler: Handler) -> Handler:
    """Refuses what another site's page has sent."""

    async def guarded(http: web.Request) -> web.StreamResponse:
        if http.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise PermissionDenied("the console answers its own pages only")
        try:
            return await handler(http)
        except LapsError as error:
            log.info("call", method="Console", path=http.path[:160], code=error.status)
            raise

    return guarded


async def _to_console(http: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/console")


def _request_id(http: web.Request) -> str:
    request_id = http.match_info["request_id"]
    # Operators see all tenants' requests, by the names that they have in the pool.
    check_request_id(request_id, in_pool=True)
    return request_id


def _number(http: web.Request, name: str) -> int:
    text = http.query.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 8):
        raise invalid(name, "must be a whole number from 0 on")
    return int(text)


def _static_files() -> list[Traversable]:
    folder = resources.files(__package__).joinpath("static")
    return [path for path in folder.iterdir() if "." + path.name.rpartition(".")[2] in CONTENT_TYPES]
