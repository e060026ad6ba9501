"""Servers that tests start for themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from laps import channels
from laps.security.tls import TlsFiles


@asynccontextmanager
async def listening(
    server: grpc.aio.Server, *, port: int = 0, tls: TlsFiles | None = None, ask_clients: bool = True
) -> AsyncIterator[int]:
    """The port of a running server. It is stopped however the test ends: one that were left would fail
    the next test, which has no part in it, when it is collected."""
    bound = channels.bind(server, "127.0.0.1", port, tls, ask_clients=ask_clients)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)
