"""Carries stored tokens to the gateways that follow them: one message per gateway and tick.

A gateway's stream is a follower of requests. What it is sent is what Redis has: the hub is
told of tokens only after the commit that holds them, and remembers per live request how
many of its tokens are stored, because the core is ahead of the store by a tick.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from laps.v1 import scheduler_pb2
from scheduler_svc import convert
from scheduler_svc.core.records import TOKEN_BYTES, Emitted, Request

ABANDONED_AT_ONCE = 100
"""Requests that are given up at once because nobody follows them. A gateway may have thousands, and after a
crash of the scheduler none is followed yet."""
MAX_PENDING_BYTES = 8 << 20
"""Undelivered token bytes of one gateway. A gateway that reads nothing loses its stream
(and follows again from its offsets); the scheduler's memory does not grow for it."""


@dataclass(eq=False)
class Follower:
    """One gateway's Deliver stream and what waits to be sent on it."""

    gateway_id: str
    followed: set[str] = field(default_factory=set)
    overrun: bool = False
    _rows: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """By request: output tokens before, and packed tokens."""
    _logprobs: dict[str, bytes] = field(default_factory=dict)
    _completions: dict[str, scheduler_pb2.Completion] = field(default_factory=dict)
    _unknown: list[str] = field(default_factory=list)
    _pending_bytes: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def add_tokens(self, request_id: str, offset: int, token_ids: bytes, logprobs: bytes = b"") -> None:
        """Queues stored tokens; rows of one request that were not sent yet become one."""
        rows = self._rows
        self._pending_bytes += len(token_ids) + len(logprobs)
        row = rows.get(request_id)
        if row is not None:
            before, waiting = row
            waiting_logprobs = self._logprobs.pop(request_id, b"")
            if offset == before + len(waiting) // TOKEN_BYTES:
                # Serialised messages of one repeated field: joined bytes are the joined message.
                offset, token_ids, logprobs = before, waiting + token_ids, waiting_logprobs + logprobs
            else:
                # The gateway has followed anew, from here on: what waited for it is part of that.
                self._pending_bytes -= len(waiting) + len(waiting_logprobs)
        rows[request_id] = offset, token_ids
        if logprobs:
            self._logprobs[request_id] = logprobs
        if self._pending_bytes > MAX_PENDING_BYTES:
            self.overrun = True
        self._wake.set()

    def add_completion(self, completion: scheduler_pb2.Completion) -> None:
        self.followed.discard(completion.request_id)
        self._completions[completion.request_id] = completion
        self._wake.set()

    def add_unknown(self, request_id: str) -> None:
        self._unknown.append(request_id)
        self._wake.set()

    async def next_message(self) -> scheduler_pb2.DeliverResponse:
        """Waits until something is to be sent and takes all of it; the caller adds the commit's number."""
        while not (self._rows or self._completions or self._unknown or self.overrun):
            self._wake.clear()
            await self._wake.wait()
        rows, self._rows = self._rows, {}
        logprobs, self._logprobs = self._logprobs, {}
        completions, self._completions = self._completions, {}
        unknown, self._unknown = self._unknown, []
        self._pending_bytes = 0
        message = scheduler_pb2.DeliverResponse(
            request_ids=rows.keys(),
            offsets=[offset for offset, _ in rows.values()],
            counts=[len(token_ids) // TOKEN_BYTES for _, token_ids in rows.values()],
            token_ids=b"".join([token_ids for _, token_ids in rows.values()]),
            completions=completions.values(),
            unknown=unknown,
        )
        if logprobs:
            for index, request_id in enumerate(rows):
                if request_id in logprobs:
                    message.logprobs[index].MergeFromString(logprobs[request_id])
        return message


class DeliveryHub:
    """Which gateway follows what, how far each live request is stored, and whose client is gone."""

    def __init__(self, gateway_grace_s: float) -> None:
        self._gateway_grace_s = gateway_grace_s
        self._followers: dict[str, set[Follower]] = {}
        self._stored_tokens: dict[str, int] = {}
        self._orphans: list[tuple[float, str]] = []
        """Heap of (instant, request): cancelled then unless somebody follows again."""
        self._orphan_due_s: dict[str, float] = {}
        """The instant that counts; other entries of the heap are of the past."""

    def restored(self, requests: Iterable[Request], now_s: float) -> None:
        """After a crash nobody follows yet: gateways get their time to come back."""
        for request in requests:
            self._stored_tokens[request.request_id] = request.output_tokens
            self._orphan(request, now_s, self._gateway_grace_s)

    def stored_tokens(self, request_id: str) -> int:
        return self._stored_tokens.get(request_id, 0)

    def follow(self, follower: Follower, request: Request, offset: int, logprobs: bytes = b"") -> None:
        """Starts with what is stored beyond `offset` of a live request. `logprobs` belong to
        those tokens; the core does not keep them, so the caller brings them. They may reach
        further: a commit that the store has carried out is told to the hub a little later."""
        request_id = request.request_id
        stored = self.stored_tokens(request_id)
        if stored > offset:
            output = bytes(request.output[offset * TOKEN_BYTES : stored * TOKEN_BYTES])
            found = _first_logprobs(logprobs, stored - offset)
            follower.add_tokens(request_id, offset, output, found)
        follower.followed.add(request_id)
        self._followers.setdefault(request_id, set()).add(follower)
        self._orphan_due_s.pop(request_id, None)

    def unfollow(self, follower: Follower, request: Request | None, request_id: str, now_s: float) -> None:
        """The client behind this stream is gone."""
        follower.followed.discard(request_id)
        followers = self._followers.get(request_id)
        if followers is not None:
            followers.discard(follower)
            if followers:
                return
            del self._followers[request_id]
        if request is not None:
            self._orphan(request, now_s, 0.0)

    def lost(self, follower: Follower, live: Mapping[str, Request], now_s: float) -> None:
        """A gateway's stream broke: it may come back, or be dead with all its clients."""
        for request_id in list(follower.followed):
            followers = self._followers.get(request_id, set())
            followers.discard(follower)
            if not followers:
                self._followers.pop(request_id, None)
                if request_id in live:
                    self._orphan(live[request_id], now_s, self._gateway_grace_s)
        follower.followed.clear()

    def submitted(self, request: Request, now_s: float) -> None:
        """A gateway that dies between submitting and following must not leave work behind."""
        if request.request_id not in self._followers:
            self._orphan(request, now_s, self._gateway_grace_s)

    def _orphan(self, request: Request, now_s: float, least_s: float) -> None:
        if request.spec.cancel_on_disconnect:
            wait_s = max(least_s, request.spec.disconnect_grace_s)
            self._orphan_due_s[request.request_id] = now_s + wait_s
            heapq.heappush(self._orphans, (now_s + wait_s, request.request_id))

    def next_orphan_s(self) -> float | None:
        return self._orphans[0][0] if self._orphans else None

    def take_abandoned(self, now_s: float) -> list[str]:
        """Requests whose grace is over and that nobody follows, at most `ABANDONED_AT_ONCE`."""
        abandoned: list[str] = []
        while self._orphans and self._orphans[0][0] <= now_s and len(abandoned) < ABANDONED_AT_ONCE:
            due_s, request_id = heapq.heappop(self._orphans)
            if self._orphan_due_s.get(request_id) == due_s:
                del self._orphan_due_s[request_id]
                abandoned.append(request_id)
        return abandoned

    def published(
        self, emitted: Sequence[Emitted], logprobs: Mapping[int, bytes] = MappingProxyType({})
    ) -> None:
        """The commit that holds these is stored. `logprobs`: by place in `emitted`."""
        stored_tokens, followers = self._stored_tokens, self._followers
        for place, (request_id, offset, token_ids) in enumerate(emitted):
            stored_tokens[request_id] = offset + len(token_ids) // TOKEN_BYTES
            for follower in followers.get(request_id, ()):
                follower.add_tokens(request_id, offset, token_ids, logprobs.get(place, b""))

    def finished(self, requests: Iterable[Request]) -> None:
        """The commit that ends these is stored."""
        for request in requests:
            self._stored_tokens.pop(request.request_id, None)
            self._orphan_due_s.pop(request.request_id, None)
            followers = self._followers.pop(request.request_id, None)
            if followers:
                completion = scheduler_pb2.Completion(
                    request_id=request.request_id,
                    output_tokens=request.output_tokens,
                    complete=convert.complete(request),
                )
                for follower in followers:
                    follower.add_completion(completion)


def _first_logprobs(logprobs: bytes, tokens: int) -> bytes:
    """A serialized `TokenLogprobs` cut to so many entries."""
    message = scheduler_pb2.TokenLogprobs.FromString(logprobs)
    if len(message.logprobs) <= tokens:
        return logprobs
    del message.logprobs[tokens:]
    return message.SerializeToString()
