"""A leadership that is renewed for as long as it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from scheduler_svc.store.errors import StoreUnavailable
from scheduler_svc.store.store import Store

log = structlog.get_logger()

T = TypeVar("T")


async def while_leading(
    work: Coroutine[Any, Any, T],
    store: Store,
    leader_ttl_s: float,
    told: Callable[[bool], None] = lambda renewed: None,
) -> T:
    """Does the work and renews the leadership until it is done. `told`: whether a renewal was stored.

    Raises:
        StaleLeader, Alarm: the leadership cannot be renewed. The work is cancelled then.
    """

    async def renew() -> None:
        while True:
            await asyncio.sleep(leader_ttl_s / 3)
            try:
                await store.renew()
                told(True)
            except StoreUnavailable as error:
                told(False)
                # Not the end of the term: commits check the epoch in any case.
                log.warning("leadership not renewed", error=str(error))

    renewal, working = asyncio.create_task(renew()), asyncio.create_task(work)
    try:
        await asyncio.wait((renewal, working), return_when=asyncio.FIRST_COMPLETED)
        if renewal.done():
            renewal.result()
        return working.result()
    finally:
        for task in (renewal, working):
            task.cancel()
        await asyncio.gather(renewal, working, return_exceptions=True)
