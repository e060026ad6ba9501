"""A server of the benchmarks that does what its parent tells it, a line of JSON at a time."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from grpc import aio

from laps import channels


async def obey(server: aio.Server, port: int, run: Callable[..., Awaitable[Any]]) -> None:
    """Serves on `port` until standard input ends; every line of it is a call of `run`, its answer one of
    standard output.
    """
    channels.bind(server, "127.0.0.1", port)
    await server.start()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        command.pop("do")
        print(json.dumps(await run(**command)), flush=True)
