"""A connection whose calls are sent without waiting for the answers of those before them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection

OnAnswer = Callable[[Any, Exception | None], None]
"""Takes the answer, or what went wrong: an error of redis-py, or OSError."""


class Pipeline(asyncio.Protocol):
    """Answers come in the order of the calls, and each goes to whoever made its call in the turn of the event
    loop in which it is read. redis-py takes two more turns for that, and a task for each call; a turn is as
    long as everything else that is under way.

    When the connection is lost, with it are all calls that have no answer yet: whether they were carried
    out is unknown.
    """

    def __init__(self, connection: AbstractConnection, timeout_s: float) -> None:
        """Takes over a connection that redis-py has opened: how to reach the server, TLS and the credentials
        are its business. Raises redis.exceptions.ConnectionError: it has ended already."""
        self._connection = connection
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._asked: deque[tuple[OnAnswer, float]] = deque()
        """With when each must be answered, on the event loop's clock."""
        self._watching: asyncio.TimerHandle | None = None
        # Until the handshake's last answer redis-py reads, and nothing comes unasked.
        assert connection._writer is not None
        self._transport = connection._writer.transport
        if self._transport.is_closing():
            # Nobody would tell the new protocol.
            raise exceptions.ConnectionError("Connection closed by server.")
        self._transport.set_protocol(self)
        self._replies = hiredis.Reader(
            protocolError=exceptions.InvalidResponse, replyError=connection._parser.parse_error
        )
        self.lost = False

    def ask(self, *command: str | bytes | int | float, on_answer: OnAnswer) -> None:
        """Sends a command. It does not wait for room in the socket: the caller bounds what is under way."""
        self._asked.append((on_answer, self._loop.time() + self._timeout_s))
        if self._watching is None:
            self._watching = self._loop.call_later(self._timeout_s, self._watch)
        self._transport.writelines(self._connection.pack_command(*command))

    async def answer(self, *command: str | bytes | int | float) -> Any:
        """Sends a command and awaits its answer. A cancelled call's answer is thrown away when it comes."""
        answered: asyncio.Future[Any] = self._loop.create_future()

        def on_answer(reply: Any, error: Exception | None) -> None:
            if answered.done():
                return
            if error is None:
                answered.set_result(reply)
            else:
                answered.set_exception(error)

        self.ask(*command, on_answer=on_answer)
        return await answered

    def lose(self, error: Exception) -> None:
        """Ends the connection. All that have no answer get `error`."""
        if self.lost:
            return
        self.lost = True
        if self._watching is not None:
            self._watching.cancel()
        self._transport.abort()
        # It would be closed a second time, with a warning.
        self._connection._reader = self._connection._writer = None
        asked = list(self._asked)
        self._asked.clear()
        for on_answer, _ in asked:
            on_answer(None, error)

    def _watch(self) -> None:
        self._watching = None
        if not self._asked:
            return
        _, due_s = self._asked[0]
        if due_s <= self._loop.time():
            self.lose(exceptions.TimeoutError("no answer in time"))
        else:
            self._watching = self._loop.call_at(due_s, self._watch)

    # --- asyncio.Protocol --------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._replies.feed(data)
        try:
            while not self.lost and (reply := self._replies.gets()) is not False:
                if not self._asked:
                    raise exceptions.InvalidResponse("an answer that nobody asked for")
                on_answer, _ = self._asked.popleft()
                if isinstance(reply, Exception):
                    on_answer(None, reply)
                else:
                    on_answer(reply, None)
        except exceptions.InvalidResponse as error:
            self.lose(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(exceptions.ConnectionError(str(exc) if exc else "Connection closed by server."))
