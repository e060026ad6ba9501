"""What is followed at the scheduler: whom to follow and leave, and where delivered tokens go."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from gateway.streams import Feed, GapError, Reader
from laps.errors import DataLoss, request_unknown
from laps.logs import get_logger
from laps.v1 import generation_pb2, scheduler_pb2

TOKEN_BYTES = 4
MAX_MESSAGE_ENTRIES = 1000
"""Follows and unfollows of one message to the scheduler."""
REFOLLOW_AFTER_S = 1.0
"""A gap that is still there after this time is asked about again."""

log = get_logger()


class ProtocolError(Exception):
    """A delivery's columns do not fit each other."""


class Feeds:
    """Feeds by request, and the messages that keep the scheduler's idea of them right."""

    def __init__(self, buffer_tokens: int) -> None:
        self._buffer_tokens = buffer_tokens
        self._feeds: dict[str, Feed] = {}
        self._lingering: dict[str, asyncio.TimerHandle] = {}
        self._gaps: dict[str, asyncio.TimerHandle] = {}
        """Requests whose missing tokens were asked for; the timer asks again."""
        self._outbox: list[scheduler_pb2.Follow | scheduler_pb2.Unfollow] = []
        self._online = False
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._feeds)

    def attach(self, request_id: str) -> Reader:
        if (lingering := self._lingering.pop(request_id, None)) is not None:
            lingering.cancel()
        feed = self._feeds.get(request_id)
        if feed is None or feed.error is not None:
            # From the first token on, whatever the client has: text depends on all of them.
            feed = self._feeds[request_id] = Feed(request_id)
            self._post(scheduler_pb2.Follow(request_id=request_id, offset=0))
        return Reader(feed, self._buffer_tokens)

    def detach(self, reader: Reader, *, done: bool, linger_s: float) -> None:
        feed = reader.feed
        reader.close()
        if feed.readers or self._feeds.get(feed.request_id) is not feed:
            return
        if linger_s > 0 and not done and not feed.ended:
            loop = asyncio.get_running_loop()
            self._lingering[feed.request_id] = loop.call_later(linger_s, self._leave, feed, False)
        else:
            self._leave(feed, done)

    def close(self) -> None:
        for timer in (*self._lingering.values(), *self._gaps.values()):
            timer.cancel()

    def follow_all(self) -> None:
        """On a new stream: every live request from the offset that is here."""
        self._online = True
        for request_id in tuple(self._gaps):
            self._gap_closed(request_id)
        self._outbox = [
            scheduler_pb2.Follow(request_id=feed.request_id, offset=len(feed.tokens))
            for feed in self._feeds.values()
            if not feed.ended
        ]
        self._wake.set()

    def offline(self) -> None:
        """The stream is gone: the scheduler knows by that, and the next stream begins with `follow_all`."""
        self._online = False
        self._outbox.clear()

    async def outgoing(self) -> list[scheduler_pb2.DeliverRequest]:
        """Waits until something is to be said and takes all of it."""
        while not self._outbox:
            self._wake.clear()
            await self._wake.wait()
        posted, self._outbox = self._outbox, []
        return list(_messages(posted))

    def accept(self, response: scheduler_pb2.DeliverResponse) -> None:
        """Hands the tokens on. Raises ProtocolError."""
        counts, packed = response.counts, response.token_ids
        ids, offsets = response.request_ids, response.offsets
        if not len(ids) == len(offsets) == len(counts) or sum(counts) * TOKEN_BYTES != len(packed):
            raise ProtocolError("a delivery's columns do not fit each other")
        logprobs = response.logprobs
        start = 0
        for index, (request_id, offset, count) in enumerate(zip(ids, offsets, counts, strict=True)):
            end = start + count * TOKEN_BYTES
            feed = self._feeds.get(request_id)
            if feed is not None:
                entries = logprobs[index].logprobs if logprobs and index in logprobs else ()
                self._extend(feed, offset, packed[start:end], entries)
            start = end
        for completion in response.completions:
            feed = self._feeds.get(completion.request_id)
            if feed is not None:
                self._complete(feed, completion)
        for request_id in response.unknown:
            feed = self._feeds.get(request_id)
            if feed is not None:
                feed.fail(request_unknown(request_id))

    def _extend(
        self, feed: Feed, offset: int, packed: bytes, logprobs: Sequence[generation_pb2.TokenLogprob]
    ) -> None:
        try:
            feed.extend(offset, packed, logprobs)
            self._gap_closed(feed.request_id)
        except GapError:
            self._ask_again(feed)
        except DataLoss as error:
            self._contradiction(feed, error)

    def _complete(self, feed: Feed, completion: scheduler_pb2.Completion) -> None:
        try:
            feed.complete(completion.complete, completion.output_tokens)
            self._gap_closed(feed.request_id)
        except GapError:
            self._ask_again(feed)
        except DataLoss as error:
            self._contradiction(feed, error)

    def _ask_again(self, feed: Feed) -> None:
        # Once per gap: until the answer comes, everything else that comes has the same gap.
        if feed.request_id not in self._gaps:
            log.warning("gap in a delivery", request_id=feed.request_id, offset=len(feed.tokens))
            self._ask(feed)

    def _ask(self, feed: Feed) -> None:
        loop = asyncio.get_running_loop()
        self._gaps[feed.request_id] = loop.call_later(REFOLLOW_AFTER_S, self._ask, feed)
        self._post(scheduler_pb2.Follow(request_id=feed.request_id, offset=len(feed.tokens)))

    def _gap_closed(self, request_id: str) -> None:
        if (timer := self._gaps.pop(request_id, None)) is not None:
            timer.cancel()

    def _contradiction(self, feed: Feed, error: DataLoss) -> None:
        # Tokens that a client has seen were rewritten. This must never happen; nothing more goes out.
        log.error("delivered output contradicted", request_id=feed.request_id, error=error.message)
        self._gap_closed(feed.request_id)
        feed.fail(error)

    def _leave(self, feed: Feed, done: bool) -> None:
        self._lingering.pop(feed.request_id, None)
        if feed.readers or self._feeds.get(feed.request_id) is not feed:
            return
        del self._feeds[feed.request_id]
        self._gap_closed(feed.request_id)
        self._post(scheduler_pb2.Unfollow(request_id=feed.request_id, done=done))

    def _post(self, entry: scheduler_pb2.Follow | scheduler_pb2.Unfollow) -> None:
        if self._online:
            self._outbox.append(entry)
            self._wake.set()


def _messages(
    posted: Iterable[scheduler_pb2.Follow | scheduler_pb2.Unfollow],
) -> Iterable[scheduler_pb2.DeliverRequest]:
    """Few messages for many entries. A message's follows are read before its unfollows, so that an id
    which was left and is followed again needs a new one."""
    message, left = scheduler_pb2.DeliverRequest(), set[str]()
    entries = 0
    for entry in posted:
        follows = isinstance(entry, scheduler_pb2.Follow)
        if entries == MAX_MESSAGE_ENTRIES or (follows and entry.request_id in left):
            yield message
            message, left, entries = scheduler_pb2.DeliverRequest(), set[str](), 0
        if isinstance(entry, scheduler_pb2.Follow):
            message.follow.append(entry)
        else:
            message.unfollow.append(entry)
            left.add(entry.request_id)
        entries += 1
    if entries:
        yield message
