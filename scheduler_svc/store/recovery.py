"""Reading a whole pool back, for a new leader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, cast

from scheduler_svc.core.records import TOKEN_BYTES, Recovered, Request, RequestState, Retained
from scheduler_svc.store import codec, keys
from scheduler_svc.store.connection import Reader
from scheduler_svc.store.errors import LogConflict

BATCH_REQUESTS = 500
"""Requests per call: some 10 ms in which the store does nothing else."""


async def read_live(reader: Reader) -> list[Request]:
    """All requests that are not finished, by arrival.

    Raises:
        LogConflict: a token log does not agree with its request.
        RecordDamaged: what is stored is not a request.
    """
    requests: list[Request] = []
    async for row in _rows(reader, "live", True, codec.REQUEST_NAMES, columns=5):
        # Not `with codec.damage(...)`: it would cost as much as half a dozen fields.
        try:
            requests.append(_live_request(*row))
        except codec.DAMAGE as error:
            raise codec.damaged(row[0], error) from error
    return requests


async def read_retained(reader: Reader) -> list[Retained]:
    """Finished requests that are still kept, by time of finish."""
    retained = []
    async for request_id, values in _rows(reader, "finished", False, ("digest", "finished_s"), columns=2):
        with codec.damage(request_id):
            retained.append(Retained(request_id, *_retained(*values)))
    return retained


def _retained(digest: str | Literal[False], finished_s: str | Literal[False]) -> tuple[str, float]:
    if digest is False or finished_s is False:
        raise ValueError("missing")
    return digest, float(finished_s)


async def recover(reader: Reader, pool: str) -> Recovered:
    learnt = await reader.read(reader.redis.hgetall(keys.learnt(pool)))
    return Recovered(
        requests=await read_live(reader),
        retained=await read_retained(reader),
        learnt={name.decode(): value.decode() for name, value in learnt.items()},
    )


async def _rows(
    reader: Reader, source: str, whole: bool, names: tuple[str, ...], columns: int
) -> AsyncIterator[tuple[Any, ...]]:
    def ask(first: int) -> asyncio.Task[list[Any]]:
        return asyncio.create_task(reader.ask("laps_load", source, first, BATCH_REQUESTS, int(whole), *names))

    first = 0
    coming = ask(first)
    try:
        while True:
            flat = await coming
            more = len(flat) == BATCH_REQUESTS * columns
            if more:
                # The store reads the next batch while this one is decoded.
                first += BATCH_REQUESTS
                coming = ask(first)
                await asyncio.sleep(0)
            for row in _chunks(flat, columns):
                yield row
            if not more:
                return
    finally:
        coming.cancel()


def _chunks(flat: list[Any], columns: int) -> Iterator[tuple[Any, ...]]:
    iterator = iter(flat)
    return zip(*[iterator] * columns, strict=True)


_LOG_ENTRIES, _OUTPUT_TOKENS, _PROMPT_TOKENS = (
    codec.REQUEST_NAMES.index(name) for name in ("log_entries", "output_tokens", "prompt_tokens")
)


def _live_request(
    request_id: str, values: list[str | Literal[False]], prompt: str, params_json: str, log: list[str]
) -> Request:
    stored = cast(list[str], values) if False not in values else _completed(request_id, values)
    output = codec.tokens_from_text(" ".join(log))
    if len(log) != int(stored[_LOG_ENTRIES]) or len(output) != TOKEN_BYTES * int(stored[_OUTPUT_TOKENS]):
        raise LogConflict(
            f"request {request_id} has {len(log)} log entries with {len(output) // TOKEN_BYTES} tokens, "
            f"its record tells of {stored[_LOG_ENTRIES]} with {stored[_OUTPUT_TOKENS]}"
        )
    prompt_ids = codec.tokens_from_text(prompt)
    if len(prompt_ids) != TOKEN_BYTES * int(stored[_PROMPT_TOKENS]):
        raise LogConflict(
            f"request {request_id} has a prompt of {len(prompt_ids) // TOKEN_BYTES} tokens, "
            f"its record tells of {stored[_PROMPT_TOKENS]}"
        )
    request = codec.request_from_values(
        request_id, stored, prompt_ids, codec.params_from_text(params_json), output
    )
    # No lease outlives the leadership that granted it.
    if request.state is RequestState.RUNNING:
        request.state = RequestState.PREEMPTED
    request.slot = 0
    request.lease_id = 0
    request.releasing = False
    request.kv_resident = False
    return request


def _completed(request_id: str, values: list[str | Literal[False]]) -> list[str]:
    """With what the absence of a field means."""
    by_name = dict(zip(codec.REQUEST_NAMES, values, strict=True))
    absent = {name: codec.ABSENT.get(name) for name, value in by_name.items() if value is False}
    if missing := [name for name, meant in absent.items() if meant is None]:
        raise LogConflict(f"request {request_id} is stored without {', '.join(missing)}")
    return [cast(str, absent.get(name, value)) for name, value in by_name.items()]
