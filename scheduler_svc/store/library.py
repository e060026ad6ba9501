"""The server-side functions: their text, and bringing it into a server."""

from __future__ import annotations

from importlib import resources
from typing import Any

from redis.asyncio import Redis

LIBRARIES = ("functions.lua", "inspection.lua", "recovery.lua")


def source(name: str) -> str:
    return resources.files("scheduler_svc.store").joinpath(name).read_text(encoding="utf-8")


async def load(redis: Redis) -> None:
    """Loads each library unless the server holds it in this very version. Functions survive restarts."""
    for name in LIBRARIES:
        code = source(name)
        library = code.split("\n", 1)[0].partition("name=")[2]
        stored: list[Any] = await redis.function_list(library, withcode=True)
        if not _holds(stored, code):
            await redis.function_load(code, replace=True)


def _holds(value: Any, code: str) -> bool:
    # The answer is a map or a flat list, by protocol version; the code is somewhere in it.
    if isinstance(value, dict):
        return any(_holds(item, code) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds(item, code) for item in value)
    return bool(value == code or value == code.encode())
