"""Reading a whole pool back, for a new leader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, Literal, cast

from scheduler_svc.core.records import TOKEN_BYTES, Recovered, Request, RequestState, Retained
from scheduler_svc.store import codec, packing
from scheduler_svc.store.connection import Reader
from scheduler_svc.store.errors import LogConflict

BATCH_JOURNAL_ENTRIES = 20
"""Per call. One may hold a row of every running request."""
BATCH_REQUESTS = 500
"""Requests per call: some 10 ms in which the store does nothing else."""
BATCH_LOGS = 100
"""The same of requests that have run: their token logs come along."""
Ask = Callable[..., Coroutine[Any, Any, Any]]
"""Calls one of the functions of `recovery.lua`."""
CALLS_AHEAD = 2
"""Calls that are under way while an answer is decoded: the store need not wait, and memory is bounded."""


async def recover(reader: Reader, epoch: int) -> AsyncGenerator[Recovered, None]:
    """All that the leader of this epoch must know, in parts: first what was learnt and the finished requests,
    then the live ones, some hundreds at a time. So one part is taken over while the store reads the next.

    Raises:
        StoreBehind: the server that was read is not the one that has granted the leadership.
        StaleLeader: another scheduler leads now.
        LogConflict: token logs, journal and records do not agree.
        RecordDamaged: what is stored is not a request.
    """
    ask = partial(_ask, reader, epoch)
    learnt = await ask("laps_learnt")
    yield Recovered(retained=await _retained(ask), learnt=dict(_chunks(learnt, 2)))
    journal = await Journal.read(ask)
    async for requests in _live(ask):
        for request in requests:
            journal.complete(request)
        yield Recovered(requests=requests)


def _ask(
    reader: Reader, epoch: int, function: str, *args: str | int, raw: bool = False
) -> Coroutine[Any, Any, Any]:
    return reader.ask(function, epoch, *args, raw=raw)


class Journal:
    """Output that is stored but may not be in the logs of its requests yet."""

    def __init__(
        self, rows: Mapping[str, Sequence[tuple[int, packing.JournalRow]]], resumed_seq: int
    ) -> None:
        self._rows = rows
        """By request, with the commits that they are of, in their order."""
        self._resumed_seq = resumed_seq
        """An operator has accepted what was missing up to this commit."""

    @classmethod
    async def read(cls, ask: Ask) -> Journal:
        """Raises LogConflict where it has no readable end."""
        rows: dict[str, list[tuple[int, packing.JournalRow]]] = {}
        after, last_seq = "-", 0
        while True:
            journal_seq, journal_from, resumed_seq, entries = await ask(
                "laps_journal", after, BATCH_JOURNAL_ENTRIES, raw=True
            )
            for seq, packed in packing.pairs(entries):
                last_seq, after = seq, f"({seq}-0"
                try:
                    emitted = packing.journal_rows(packed)
                except ValueError as error:
                    raise LogConflict(f"the journal's entry {seq} cannot be read: {error}") from error
                for row in emitted:
                    rows.setdefault(row.request_id, []).append((seq, row))
            if len(entries) < 2 * BATCH_JOURNAL_ENTRIES:
                break
        if max(journal_from, resumed_seq + 1) <= journal_seq != last_seq:
            raise LogConflict(f"the journal ends with commit {last_seq}, its last entry was of {journal_seq}")
        return cls(rows, resumed_seq)

    def complete(self, request: Request) -> None:
        """Continues the output of a live request, read from its log, and what its record tells of its steps.

        Raises:
            LogConflict: a part of it is missing, and no operator has accepted that since.
        """
        for seq, row in self._rows.get(request.request_id, ()):
            if not _continue(request, row) and seq > self._resumed_seq:
                raise LogConflict(
                    f"the journal's entry {seq} goes on at {row.offset} of request {request.request_id}, of "
                    f"which {request.output_tokens} tokens are stored"
                )


def _continue(request: Request, row: packing.JournalRow) -> bool:
    """By a row of the journal, which its log may hold already. False: what comes before it is missing."""
    known_bytes = len(request.output) - row.offset * TOKEN_BYTES
    if known_bytes < 0:
        return False
    if len(row.token_ids) > known_bytes:
        request.output += row.token_ids[known_bytes:]
        # Its record is as old as its log, and does not count this step.
        _count(request, row.step)
    return True


def _count(request: Request, step: packing.Step | None) -> None:
    request.steps += 1
    if step is None:
        return
    request.attained_s += step.step_s
    if step.drafted:
        request.drafted_tokens += step.drafted
        request.accepted_tokens += step.accepted
        histogram = request.acceptance_histogram
        histogram += [0] * (step.accepted + 1 - len(histogram))
        histogram[step.accepted] += 1


async def _live(ask: Ask) -> AsyncIterator[list[Request]]:
    """All requests that are not finished: those that have never run by arrival, then the others."""
    others: list[str] = []
    async for rows, other_ids in _waiting(ask):
        others += other_ids
        requests = []
        for row in rows:
            try:
                requests.append(codec.waiting_request(*row))
            except codec.DAMAGE:
                # What is wrong with it is told by the reading that looks at everything.
                others.append(row[0])
        yield requests
    async for requests in _with_logs(ask, others):
        yield requests


async def _waiting(ask: Ask) -> AsyncIterator[tuple[list[tuple[Any, ...]], list[str]]]:
    """Batches of (arguments of `codec.waiting_request`, ids of live requests of another kind)."""
    names = codec.WAITING_NAMES
    calls = (ask("laps_load_waiting", first, BATCH_REQUESTS, *names) for first in count(step=BATCH_REQUESTS))
    async for flat, places, texts, others in _answers(calls, _is_last_batch):
        params = [_params(text) for text in texts]
        rows = [
            (*row, params[place]) for row, place in zip(_chunks(flat, len(names) + 2), places, strict=True)
        ]
        if False in flat or False in params:
            others = [*others, *(row[0] for row in rows if False in row)]
            rows = [row for row in rows if False not in row]
        yield rows, others


def _is_last_batch(answer: list[Any]) -> bool:
    _, places, _, others = answer
    return len(places) + len(others) < BATCH_REQUESTS


def _params(text: str) -> str | Literal[False]:
    try:
        return codec.params_from_text(text)
    except codec.DAMAGE:
        return False


async def _with_logs(ask: Ask, request_ids: list[str]) -> AsyncIterator[list[Request]]:
    """Those that have run, or whose record is odd: of an older version, or damaged."""
    names = codec.REQUEST_NAMES
    calls = (
        ask("laps_load_requests", len(names), *names, *request_ids[first : first + BATCH_LOGS])
        for first in range(0, len(request_ids), BATCH_LOGS)
    )
    async for flat in _answers(calls):
        requests = []
        for row in _chunks(flat, 5):
            with codec.damage(row[0]):
                requests.append(_live_request(*row))
        yield requests


async def _retained(ask: Ask) -> list[Retained]:
    """Finished requests that are still kept, by time of finish."""
    retained: list[Retained] = []
    calls = (
        ask("laps_load_finished", first, BATCH_REQUESTS, "digest", "finished_s")
        for first in count(step=BATCH_REQUESTS)
    )
    async for flat in _answers(calls, lambda answer: len(answer) < 2 * BATCH_REQUESTS):
        for request_id, values in _chunks(flat, 2):
            with codec.damage(request_id):
                retained.append(Retained(request_id, *_ended(*values)))
    return retained


def _ended(digest: str | Literal[False], finished_s: str | Literal[False]) -> tuple[str, float]:
    if digest is False or finished_s is False:
        raise ValueError("missing")
    return digest, float(finished_s)


async def _answers(
    calls: Iterator[Coroutine[Any, Any, Any]], is_last: Callable[[Any], bool] = lambda answer: False
) -> AsyncIterator[Any]:
    """What the calls return, in their order, up to the last one. The next ones are under way meanwhile."""
    coming: deque[asyncio.Task[Any]] = deque()

    def send() -> None:
        coming.extend(map(asyncio.create_task, islice(calls, CALLS_AHEAD - len(coming))))

    try:
        send()
        while coming:
            answer = await coming.popleft()
            last = is_last(answer)
            if not last:
                send()
                # Lets it go out before this answer is decoded.
                await asyncio.sleep(0)
            yield answer
            if last:
                return
    finally:
        for task in coming:
            task.cancel()


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
    request.book.logged_tokens = request.output_tokens
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
