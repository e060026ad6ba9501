"""A connection on which calls do not wait for each other, and a server that answers as each test likes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis import exceptions
from redis.asyncio.connection import Connection

from scheduler_svc.store.pipeline import Pipeline


class Server:
    """Takes what comes and answers by hand."""

    def __init__(self) -> None:
        self.received = b""
        self.came = asyncio.Event()
        self.ended = asyncio.Event()
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        while data := await reader.read(1 << 16):
            self.received += data
            self.came.set()
        self.ended.set()
        writer.close()

    async def until_received(self, text: bytes) -> None:
        while text not in self.received:
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), 60)

    def answer(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, int]]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    yield server, listening.sockets[0].getsockname()[1]
    listening.close()


async def connected(port: int) -> Connection:
    connection = Connection(host="127.0.0.1", port=port, protocol=2, driver_info=None)
    await connection.connect()  # type: ignore[no-untyped-call]
    return connection


async def opened(port: int, timeout_s: float = 60.0) -> Pipeline:
    return Pipeline(await connected(port), timeout_s)


async def test_each_call_gets_its_answer_however_the_bytes_come(server: tuple[Server, int]) -> None:
    peer, port = server
    pipeline = await opened(port)
    calls = [asyncio.create_task(pipeline.answer("ECHO", number)) for number in range(3)]
    await peer.until_received(b"$1\r\n2\r\n")
    for byte in b"+zero\r\n-SEQ_GAP commit 9 after 7\r\n*2\r\n:2\r\n:1\r\n":
        peer.answer(bytes([byte]))
        await asyncio.sleep(0)
    first, second, third = await asyncio.gather(*calls, return_exceptions=True)
    assert (first, third) == (b"zero", [2, 1])
    assert isinstance(second, exceptions.ResponseError)
    assert str(second) == "SEQ_GAP commit 9 after 7"
    assert not pipeline.lost
    pipeline.lose(exceptions.ConnectionError("over"))


async def test_a_cancelled_call_does_not_shift_the_answers(server: tuple[Server, int]) -> None:
    peer, port = server
    pipeline = await opened(port)
    first, second = (asyncio.create_task(pipeline.answer("ECHO", number)) for number in range(2))
    await peer.until_received(b"$1\r\n1\r\n")
    first.cancel()
    peer.answer(b"+zero\r\n+one\r\n")
    assert await second == b"one"
    with pytest.raises(asyncio.CancelledError):
        await first
    pipeline.lose(exceptions.ConnectionError("over"))


async def test_who_is_answered_may_give_the_connection_up(server: tuple[Server, int]) -> None:
    peer, port = server
    pipeline = await opened(port)
    told: list[Any] = []
    over = asyncio.Event()

    def give_up(reply: Any, _: Exception | None) -> None:
        told.append(reply)
        pipeline.lose(exceptions.ConnectionError("given up"))

    def note(reply: Any, error: Exception | None) -> None:
        told.append((reply, type(error)))
        over.set()

    pipeline.ask("ECHO", 0, on_answer=give_up)
    pipeline.ask("ECHO", 1, on_answer=note)
    await peer.until_received(b"$1\r\n1\r\n")
    peer.answer(b"+zero\r\n+one\r\n")
    await asyncio.wait_for(over.wait(), 60)
    assert told == [b"zero", (None, exceptions.ConnectionError)]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", exceptions.ConnectionError),
        (b"+one\r\n", exceptions.ConnectionError),
        (b"?what is this\r\n", exceptions.InvalidResponse),
    ],
)
async def test_with_the_connection_all_calls_without_answer_are_lost(
    server: tuple[Server, int], answer: bytes, error: type[Exception]
) -> None:
    peer, port = server
    pipeline = await opened(port)
    calls = [asyncio.create_task(pipeline.answer("ECHO", number)) for number in range(2)]
    await peer.until_received(b"$1\r\n1\r\n")
    peer.answer(answer)
    assert peer.writer is not None
    peer.writer.close()
    outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
    answered = [b"one"] if answer.startswith(b"+") else []
    assert outcomes[: len(answered)] == answered
    assert {type(outcome) for outcome in outcomes[len(answered) :]} == {error}
    assert pipeline.lost


async def test_an_answer_that_nobody_asked_for_ends_the_connection(server: tuple[Server, int]) -> None:
    peer, port = server
    pipeline = await opened(port)
    call = asyncio.create_task(pipeline.answer("ECHO", 0))
    await peer.until_received(b"ECHO")
    peer.answer(b"+zero\r\n+one\r\n")
    assert await call == b"zero"
    await asyncio.wait_for(peer.ended.wait(), 60)
    assert pipeline.lost


async def test_a_server_that_keeps_silent_loses_the_connection(server: tuple[Server, int]) -> None:
    """After the time of the one that waits longest; an answer meanwhile gives the others theirs."""
    peer, port = server
    pipeline = await opened(port, timeout_s=1.0)
    first = asyncio.create_task(pipeline.answer("ECHO", 0))
    await peer.until_received(b"ECHO")
    later = asyncio.create_task(pipeline.answer("ECHO", 1))
    peer.answer(b"+zero\r\n")
    assert await first == b"zero"
    with pytest.raises(exceptions.TimeoutError):
        await asyncio.wait_for(later, 60)
    assert pipeline.lost


async def test_a_connection_that_has_ended_already_is_not_taken_over(server: tuple[Server, int]) -> None:
    """Who asked on it would never hear of its end."""
    _, port = server
    connection = await connected(port)
    assert connection._writer is not None
    connection._writer.transport.abort()
    with pytest.raises(exceptions.ConnectionError):
        Pipeline(connection, 60.0)
