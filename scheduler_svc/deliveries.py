"""Carries stored tokens to the gateways that follow them: one message per gateway and tick.

A gateway's stream is a follower of requests. What it is sent is what Redis has: the hub is
told of tokens only after the commit that holds them.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType

from laps.v1 import scheduler_pb2
from scheduler_svc import convert
from scheduler_svc.core.records import TOKEN_BYTES, Emitted, Request, emitted_of

ABANDONED_AT_ONCE = 100
"""Requests that are given up at once because nobody follows them. A gateway may have thousands, and after a
crash of the scheduler none is followed yet."""
MAX_PENDING_BYTES = 8 << 20
"""Undelivered new output of one gateway. A gateway that reads nothing loses its stream
(and follows again from its offsets); the scheduler's memory does not grow for it."""
MESSAGE_BYTES = 1 << 20
"""Of one message, about. gRPC refuses one above `max_message_bytes`, and a gateway that follows again after
such an end is owed the same once more."""
ROW_BYTES = 64
"""What a row of it counts besides its tokens."""
COMPLETION_BYTES = 512


@dataclass(eq=False)
class Follower:
    """One gateway's Deliver stream and what waits to be sent on it."""

    message_bytes: int = MESSAGE_BYTES
    followed: set[str] = field(default_factory=set)
    overrun: bool = False
    closed: bool = False
    _missed: list[tuple[Emitted, bytes]] = field(default_factory=list)
    """Output from before it was followed, in pieces; goes out first. Its amount is the gateway's choice: no
    more is to be added before `until_room`."""
    _emitted: list[tuple[Emitted, bytes]] = field(default_factory=list)
    """What waits, in order; with its serialized log probabilities where it has one row and these."""
    _completions: dict[str, scheduler_pb2.Completion] = field(default_factory=dict)
    _unknown: list[str] = field(default_factory=list)
    _missed_bytes: int = 0
    _pending_bytes: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _taken: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, emitted: Emitted, logprobs: bytes = b"") -> None:
        """Queues stored tokens. `logprobs` belong to the one row that is in `emitted` then."""
        if self.overrun:
            return
        self._emitted.append((emitted, logprobs))
        self._count(_bytes(emitted, logprobs))

    def add_missed(self, request_id: str, offset: int, token_ids: bytes, logprobs: bytes = b"") -> None:
        """Queues one request's stored tokens, from where its gateway wants them."""
        self._drop([request_id])
        for emitted, some in _pieces(request_id, offset, token_ids, logprobs, self.message_bytes):
            self._missed.append((emitted, some))
            self._missed_bytes += _bytes(emitted, some)
        self._wake.set()

    async def until_room(self) -> None:
        """Waits until less waits than fills a message."""
        while self._missed_bytes + self._pending_bytes >= self.message_bytes:
            self._taken.clear()
            await self._taken.wait()

    def _drop(self, request_ids: Iterable[str]) -> None:
        """What waits of them is not wanted any more: their gateway has followed anew, or left. One search for
        all of them: of a gateway that is behind very much can wait."""
        dropped = {name for name in request_ids if name in self.followed or name in self._completions}
        if not dropped:
            return
        self._missed_bytes += _drop_from(self._missed, dropped)
        self._pending_bytes += _drop_from(self._emitted, dropped)
        self._taken.set()

    def add_completion(self, completion: scheduler_pb2.Completion, *, missed: bool = False) -> None:
        """`missed`: it has been stored since before it was followed."""
        self.followed.discard(completion.request_id)
        if self.overrun:
            return
        self._completions[completion.request_id] = completion
        if missed:
            self._missed_bytes += COMPLETION_BYTES
            self._wake.set()
        else:
            self._count(COMPLETION_BYTES)

    def add_unknown(self, request_id: str) -> None:
        self._unknown.append(request_id)
        self._missed_bytes += ROW_BYTES
        self._wake.set()

    def unfollow(self, request_ids: Iterable[str]) -> None:
        self._drop(request_ids)
        self.followed.difference_update(request_ids)

    def close(self) -> None:
        """Nothing more comes: its gateway says nothing any more, or the term is over."""
        self.closed = True
        self._wake.set()

    async def next_message(self) -> scheduler_pb2.DeliverResponse | None:
        """Waits until something is to be sent and takes as much as a message holds; the caller adds the
        commit's number. None: nothing more comes."""
        while not (self._missed or self._emitted or self._completions or self._unknown or self.overrun):
            if self.closed:
                return None
            self._wake.clear()
            await self._wake.wait()
        if self._missed_bytes + self._pending_bytes <= self.message_bytes:
            return self._take(self._missed + self._emitted, ends=True)
        some: list[tuple[Emitted, bytes]] = []
        room = self.message_bytes
        for waiting in (self._missed, self._emitted):
            for emitted, logprobs in waiting:
                room -= _bytes(emitted, logprobs)
                if room < 0 and some:
                    break
                some.append((emitted, logprobs))
            if room < 0:
                break
        # An end must not come before the last tokens.
        return self._take(some, ends=len(some) == len(self._missed) + len(self._emitted))

    def _take(self, emitted: list[tuple[Emitted, bytes]], *, ends: bool) -> scheduler_pb2.DeliverResponse:
        """The first ones of all that waits as a message, with completions and all if it `ends` with it."""
        message = scheduler_pb2.DeliverResponse(
            request_ids=list(chain.from_iterable([each.request_ids for each, _ in emitted])),
            offsets=list(chain.from_iterable([each.offsets for each, _ in emitted])),
            counts=list(chain.from_iterable([each.counts for each, _ in emitted])),
            token_ids=b"".join([each.token_ids for each, _ in emitted]),
        )
        row = 0
        for each, logprobs in emitted:
            if logprobs:
                message.logprobs[row].MergeFromString(logprobs)
            row += len(each.request_ids)
        if ends:
            message.completions.extend(self._completions.values())
            message.unknown.extend(self._unknown)
            self._clear()
        else:
            missed = min(len(emitted), len(self._missed))
            self._missed_bytes -= sum([_bytes(each, some) for each, some in emitted[:missed]])
            self._pending_bytes -= sum([_bytes(each, some) for each, some in emitted[missed:]])
            self._missed = self._missed[missed:]
            self._emitted = self._emitted[len(emitted) - missed :]
        self._taken.set()
        return message

    def _count(self, new_bytes: int) -> None:
        self._pending_bytes += new_bytes
        if self._pending_bytes > MAX_PENDING_BYTES:
            # A write that waits for the gateway may do so for long: what it will never be sent is not kept.
            self.overrun = True
            self._clear()
        self._wake.set()

    def _clear(self) -> None:
        self._missed, self._emitted, self._completions, self._unknown = [], [], {}, []
        self._missed_bytes = self._pending_bytes = 0


class DeliveryHub:
    """Which gateway follows what, how far each live request is stored, and whose client is gone."""

    def __init__(self, gateway_grace_s: float) -> None:
        self._gateway_grace_s = gateway_grace_s
        self._followers: dict[str, tuple[Follower, ...]] = {}
        self._shared: set[str] = set()
        """Requests with several followers."""
        self._open: dict[Follower, None] = {}
        self._closed = False
        self._orphans: list[tuple[float, str]] = []
        """Heap of (instant, request): cancelled then unless somebody follows again."""
        self._orphan_due_s: dict[str, float] = {}
        """The instant that counts; other entries of the heap are of the past."""

    def restored(self, requests: Iterable[Request], now_s: float) -> None:
        """After a crash nobody follows yet: gateways get their time to come back."""
        for request in requests:
            self._orphan(request, now_s, self._gateway_grace_s)

    def opened(self, follower: Follower) -> None:
        """A stream begins; it is over when it is `lost`."""
        self._open[follower] = None
        if self._closed:
            follower.close()

    def close(self) -> None:
        """The term is over."""
        self._closed = True
        for follower in self._open:
            follower.close()

    def follow(
        self, follower: Follower, request: Request, stored_tokens: int, offset: int, logprobs: bytes = b""
    ) -> None:
        """Starts with what is stored beyond `offset` of a live request, of which `stored_tokens` were told to
        the hub. `logprobs` belong to those tokens; the core does not keep them, so the caller brings them.
        They may reach further: a commit that the store has carried out is told a little later."""
        request_id = request.request_id
        follower.unfollow([request_id])
        if stored_tokens > offset:
            output = bytes(request.output[offset * TOKEN_BYTES : stored_tokens * TOKEN_BYTES])
            found = _first_logprobs(logprobs, stored_tokens - offset)
            follower.add_missed(request_id, offset, output, found)
        follower.followed.add(request_id)
        self._set_followers(request_id, (*self._others(follower, request_id), follower))
        self._orphan_due_s.pop(request_id, None)

    def unfollow(self, follower: Follower, requests: Mapping[str, Request | None], now_s: float) -> None:
        """The clients behind this stream are gone. `requests`: by id; None: it needs nobody to follow it."""
        follower.unfollow(requests.keys())
        for request_id, request in requests.items():
            if request_id in self._followers and not self._left(follower, request_id):
                continue
            if request is not None:
                self._orphan(request, now_s, 0.0)

    def lost(self, follower: Follower, live: Mapping[str, Request], now_s: float) -> None:
        """A gateway's stream broke: it may come back, or be dead with all its clients."""
        self._open.pop(follower, None)
        for request_id in list(follower.followed):
            if self._left(follower, request_id) and request_id in live:
                self._orphan(live[request_id], now_s, self._gateway_grace_s)
        follower.followed.clear()

    def _others(self, follower: Follower, request_id: str) -> tuple[Follower, ...]:
        return tuple(each for each in self._followers.get(request_id, ()) if each is not follower)

    def _left(self, follower: Follower, request_id: str) -> bool:
        """Whether nobody follows the request any more."""
        others = self._others(follower, request_id)
        self._set_followers(request_id, others)
        return not others

    def _set_followers(self, request_id: str, followers: tuple[Follower, ...]) -> None:
        if followers:
            self._followers[request_id] = followers
        else:
            self._followers.pop(request_id, None)
        if len(followers) > 1:
            self._shared.add(request_id)
        else:
            self._shared.discard(request_id)

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
        followers = self._followers
        for place, each in enumerate(emitted):
            ids = each.request_ids
            first = followers.get(ids[0])
            if first is not None and not self._shared and first[0].followed.issuperset(ids):
                # Mostly one gateway follows all that a worker runs: its rows go on as they came.
                groups: dict[tuple[Follower, ...] | None, None] = {first: None}
            else:
                # By their first rows: a set's order is another one every time.
                groups = dict.fromkeys(map(followers.get, ids))
            for group in groups:
                if group is None:
                    continue
                here = each
                if len(groups) > 1:
                    here = each.of({name for name in ids if followers.get(name) == group})
                for follower in group:
                    follower.add(here, logprobs.get(place, b""))

    def finished(self, requests: Iterable[Request]) -> None:
        """The commit that ends these is stored."""
        for request in requests:
            self._orphan_due_s.pop(request.request_id, None)
            followers = self._followers.get(request.request_id, ())
            self._set_followers(request.request_id, ())
            if followers:
                completion = scheduler_pb2.Completion(
                    request_id=request.request_id,
                    output_tokens=request.output_tokens,
                    complete=convert.complete(request),
                )
                for follower in followers:
                    follower.add_completion(completion)


def _bytes(emitted: Emitted, logprobs: bytes) -> int:
    return ROW_BYTES * len(emitted.request_ids) + len(emitted.token_ids) + len(logprobs)


def _drop_from(waiting: list[tuple[Emitted, bytes]], request_ids: set[str]) -> int:
    """Takes the rows of these requests out; returns by how many bytes that changes what waits."""
    change = 0
    for place, (emitted, logprobs) in enumerate(waiting):
        if not request_ids.isdisjoint(emitted.request_ids):
            rest = emitted.of({name for name in emitted.request_ids if name not in request_ids})
            waiting[place] = rest, b""
            change += _bytes(rest, b"") - _bytes(emitted, logprobs)
    return change


def _pieces(
    request_id: str, offset: int, token_ids: bytes, logprobs: bytes, most_bytes: int
) -> list[tuple[Emitted, bytes]]:
    """One request's output as rows of about equal size, each of which fits into a message."""
    whole_bytes = ROW_BYTES + len(token_ids) + len(logprobs)
    tokens = len(token_ids) // TOKEN_BYTES
    if whole_bytes <= most_bytes or tokens < 2:
        return [(emitted_of([(request_id, offset, token_ids)]), logprobs)]
    each = max(1, tokens * most_bytes // (2 * whole_bytes))
    told = scheduler_pb2.TokenLogprobs.FromString(logprobs).logprobs
    pieces: list[tuple[Emitted, bytes]] = []
    for first in range(0, tokens, each):
        some = token_ids[first * TOKEN_BYTES : (first + each) * TOKEN_BYTES]
        of_some = scheduler_pb2.TokenLogprobs(logprobs=told[first : first + each])
        pieces.append((emitted_of([(request_id, offset + first, some)]), of_some.SerializeToString()))
    return pieces


def _first_logprobs(logprobs: bytes, tokens: int) -> bytes:
    """A serialized `TokenLogprobs` cut to so many entries."""
    message = scheduler_pb2.TokenLogprobs.FromString(logprobs)
    if len(message.logprobs) <= tokens:
        return logprobs
    del message.logprobs[tokens:]
    return message.SerializeToString()
