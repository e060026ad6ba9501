"""How the simulated wire calls the services' handlers: the three shapes that they have."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from simulator.faults.wire import Exchange, ServerContext

Serve = Callable[[Exchange, ServerContext], Awaitable[None]]


def unary(method: Callable[[Any, Any], Any]) -> Serve:
    async def serve(exchange: Exchange, context: ServerContext) -> None:
        exchange.down.send("item", await method(await exchange.up.read(), context))

    return serve


def streaming(method: Callable[[Any, Any], Any]) -> Serve:
    """A handler that reads from its context and writes to it."""

    async def serve(exchange: Exchange, context: ServerContext) -> None:
        await method(None, context)

    return serve


def writing(method: Callable[[Any, Any], Any]) -> Serve:
    """A handler that takes one request and writes to its context."""

    async def serve(exchange: Exchange, context: ServerContext) -> None:
        await method(await exchange.up.read(), context)

    return serve
