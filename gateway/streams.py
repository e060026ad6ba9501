"""The outputs that this gateway follows, and the client streams that read them.

A feed is one request's output from its first token on, shared by all streams that read it: a
stream is a position in a feed. So a stream that waits for its client holds no copy, and a client
that reads slowly gets all that came meanwhile in one message. How far a stream may lag is bounded.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gateway.admission import unpack
from laps.errors import DataLoss, LapsError, Reason, ResourceExhausted
from laps.v1 import generation_pb2

MAX_CHUNK_TOKENS = 2048
"""Tokens of one message to a client; with a few bytes each they stay far below any message limit."""
MAX_CHUNK_TOKENS_WITH_LOGPROBS = 128


class GapError(Exception):
    """Tokens came that do not follow the ones that are here."""


class Feed:
    """One request's stored output as far as it has reached this gateway."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.tokens: array[int] = array("I")
        self.logprobs: list[generation_pb2.TokenLogprob] = []
        """One per token, where the request asked for them."""
        self.completion: generation_pb2.Complete | None = None
        self.error: LapsError | None = None
        self.readers: dict[Reader, None] = {}

    @property
    def ended(self) -> bool:
        return self.completion is not None or self.error is not None

    def extend(
        self, offset: int, packed: bytes, logprobs: Sequence[generation_pb2.TokenLogprob] = ()
    ) -> None:
        """Adds the tokens from `offset` on; those that are here already are dropped.

        Raises GapError where some are missing before them, DataLoss where they differ from the ones here.
        """
        have = len(self.tokens)
        if offset > have:
            raise GapError
        new = unpack(packed)
        known = have - offset
        if known:
            repeated = min(known, len(new))
            if new[:repeated] != self.tokens[offset : offset + repeated]:
                raise DataLoss(
                    f"request {self.request_id}: tokens from {offset} on differ from the first time"
                )
            new = new[repeated:]
        if not new or self.ended:
            return
        self.tokens.extend(new)
        if logprobs:
            # Never out of step with the tokens: a missing entry stays empty.
            self.logprobs.extend(generation_pb2.TokenLogprob() for _ in range(have - len(self.logprobs)))
            self.logprobs.extend(logprobs[known:])
        self._notify(len(new))

    def complete(self, completion: generation_pb2.Complete, output_tokens: int) -> None:
        """The request has ended. Raises GapError where tokens are missing, DataLoss where too many came."""
        if output_tokens > len(self.tokens):
            raise GapError
        if output_tokens < len(self.tokens):
            raise DataLoss(
                f"request {self.request_id}: ended with {output_tokens} tokens after {len(self.tokens)} came"
            )
        if not self.ended:
            self.completion = completion
            self._notify(0)

    def fail(self, error: LapsError) -> None:
        """No more will come."""
        if not self.ended:
            self.error = error
            self._notify(0)

    def _notify(self, new_tokens: int) -> None:
        for reader in tuple(self.readers):
            reader._fed(new_tokens)


class Batch(NamedTuple):
    """What a stream takes at a time. The output has ended with it when `completion` is set."""

    tokens: Sequence[int]
    completion: generation_pb2.Complete | None


class Reader:
    """One client's position in a feed. Made by the task that serves the client, and used by it alone."""

    def __init__(self, feed: Feed, buffer_tokens: int) -> None:
        self.feed = feed
        self.position = 0
        """Tokens taken."""
        self.lost: LapsError | None = None
        """Why the client lost this stream."""
        self._buffer_tokens = buffer_tokens
        self._excused_to = len(feed.tokens)
        """Tokens before this came faster than any client could read; they do not count as its lag."""
        self._waiter: asyncio.Future[None] | None = None
        self._task = asyncio.current_task()
        feed.readers[self] = None

    @property
    def lag_tokens(self) -> int:
        return len(self.feed.tokens) - max(self.position, self._excused_to)

    async def take(self) -> Batch:
        """Waits for something new and takes it. Raises why there will be nothing more."""
        feed = self.feed
        while self.position == len(feed.tokens) and not feed.ended and self.lost is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.lost is not None:
            raise self.lost
        at_most = MAX_CHUNK_TOKENS_WITH_LOGPROBS if feed.logprobs else MAX_CHUNK_TOKENS
        tokens = feed.tokens[self.position : self.position + at_most]
        self.position += len(tokens)
        if self.position < len(feed.tokens):
            return Batch(tokens, None)
        if feed.error is not None and not tokens:
            raise feed.error
        return Batch(tokens, feed.completion)

    def lose(self, error: LapsError) -> None:
        """Takes the stream from its client at once, also where its task waits for the client to read."""
        if self.lost is not None:
            return
        self.lost = error
        if not self._wake() and self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        self.feed.readers.pop(self, None)

    def _fed(self, new_tokens: int) -> None:
        lag = self.lag_tokens
        if lag - new_tokens > self._buffer_tokens:
            self.lose(
                ResourceExhausted(
                    f"the client is {lag} tokens behind and lost its stream; the request goes on, resume it",
                    reason=Reason.CLIENT_TOO_SLOW,
                    retry_after_s=0.0,
                    quota_subject="stream_buffer_tokens",
                    metadata={"request_id": self.feed.request_id, "limit_tokens": self._buffer_tokens},
                )
            )
            return
        if new_tokens > self._buffer_tokens:
            self._excused_to = len(self.feed.tokens)
        self._wake()

    def _wake(self) -> bool:
        """Whether the task was waiting for something new."""
        if self._waiter is None:
            return False
        if not self._waiter.done():
            self._waiter.set_result(None)
        return True


class Limit:
    """At most so many of something at a time; more are refused at once."""

    def __init__(
        self,
        most: int,
        refuse: Callable[[int], LapsError],
        on_change: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.count = 0
        self._most = most
        self._refuse = refuse
        self._on_change = on_change
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        if self.count >= self._most:
            raise self._refuse(self._most)
        self.count += 1
        self._on_change(self.count)
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        self._on_change(self.count)
        if self.count == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        await self._idle.wait()
