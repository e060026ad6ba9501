"""How the simulated wire calls the services' handlers: the three shapes that they have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from simulator.faults.wire import EOF, Exchange, ServerContext

Serve = Callable[[Exchange, ServerContext], Awaitable[None]]


async def _incoming(exchange: Exchange) -> AsyncIterator[Any]:
    while (message := await exchange.up.read()) is not EOF:
        yield message


def unary(method: Callable[[Any, Any], Any]) -> Serve:
    async def serve(exchange: Exchange, context: ServerContext) -> None:
        exchange.down.send("item", await method(await exchange.up.read(), context))

    return serve


def streaming(method: Callable[[Any, Any], Any]) -> Serve:
    """A handler that is an asynchronous generator over the client's messages."""

    async def serve(exchange: Exchange, context: ServerContext) -> None:
        answers = method(_incoming(exchange), context)
        try:
            async for message in answers:
                await exchange.down.send_in_window(message)
        finally:
            await answers.aclose()

    return serve


def writing(method: Callable[[Any, Any], Any]) -> Serve:
    """A handler that takes one request and writes to its context."""

    async def serve(exchange: Exchange, context: ServerContext) -> None:
        await method(await exchange.up.read(), context)

    return serve
