"""The delivery hub: what gateways are sent, and whose client is gone."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laps.v1 import generation_pb2, scheduler_pb2
from scheduler_svc.core.records import TOKEN_BYTES, Emitted, FinishReason, Request, RequestSpec, emitted_of
from scheduler_svc.deliveries import (
    ABANDONED_AT_ONCE,
    MAX_PENDING_BYTES,
    ROW_BYTES,
    DeliveryHub,
    Follower,
)

GATEWAY_GRACE_S = 5.0


def pack(tokens: list[int]) -> bytes:
    return array("I", tokens).tobytes()


def unpack(packed: bytes) -> list[int]:
    return array("I", packed).tolist()


def make_request(request_id: str = "a", **spec: object) -> Request:
    return Request(RequestSpec(request_id, pack([1]), 100, **spec), arrival_s=0.0)  # type: ignore[arg-type]


async def take(follower: Follower) -> list[tuple[str, int, list[int]]]:
    """Rows of the next message."""
    message = await asyncio.wait_for(follower.next_message(), 60)
    rows, position = [], 0
    for request_id, offset, count in zip(message.request_ids, message.offsets, message.counts, strict=True):
        rows.append((request_id, offset, unpack(message.token_ids[4 * position : 4 * (position + count)])))
        position += count
    return rows


def joined(rows: list[tuple[str, int, list[int]]]) -> dict[str, tuple[int, list[int]]]:
    """First offset and all tokens by request; the rows of each must continue each other."""
    found: dict[str, tuple[int, list[int]]] = {}
    for request_id, offset, tokens in rows:
        begin, known = found.setdefault(request_id, (offset, []))
        assert offset == begin + len(known)
        known += tokens
    return found


@given(
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    follow_after=st.integers(0, 12),
    unstored=st.integers(0, 3),
    offset=st.integers(0, 10),
)
def test_a_follower_gets_what_is_stored_beyond_its_offset_and_nothing_else(
    steps: list[int], follow_after: int, unstored: int, offset: int
) -> None:
    async def run() -> None:
        hub, request, follower = DeliveryHub(GATEWAY_GRACE_S), make_request(), Follower()
        tokens = list(range(sum(steps)))
        offset_here = min(offset, sum(steps[:follow_after]))
        stored = 0
        for number, count in enumerate([*steps, 0]):
            if number == min(follow_after, len(steps)):
                # The core is ahead of the store: those tokens must not be seen.
                ahead = tokens[: stored + unstored]
                request.output[:] = pack(ahead)
                hub.follow(follower, request, stored, offset_here)
            if count:
                hub.published([emitted_of([("a", stored, pack(tokens[stored : stored + count]))])])
                stored += count
        expected = tokens[offset_here:]
        if expected:
            assert joined(await take(follower)) == {"a": (offset_here, expected)}

    asyncio.run(run())


def _beginnings(names: list[str]) -> st.SearchStrategy[list[str]]:
    return st.integers(1, len(names)).map(lambda count: names[:count])


_NAMES = ("a", "b", "c")
_ACTIONS = st.one_of(
    st.tuples(st.just("follow"), st.integers(0, 1), st.sampled_from(_NAMES)),
    st.tuples(st.just("unfollow"), st.integers(0, 1), st.sampled_from(_NAMES)),
    st.tuples(st.just("report"), st.just(0), st.permutations(_NAMES).flatmap(_beginnings)),
)


@settings(max_examples=300)
@given(st.lists(_ACTIONS, min_size=5, max_size=30))
def test_each_gateway_gets_the_rows_of_what_it_follows_whoever_else_does(
    actions: list[tuple[str, int, str]],
) -> None:
    async def run() -> None:
        hub, followers = DeliveryHub(GATEWAY_GRACE_S), [Follower() for _ in range(2)]
        requests = {name: make_request(name) for name in _NAMES}
        expected: list[list[tuple[str, int, list[int]]]] = [[], []]
        follows: list[set[str]] = [set(), set()]
        for action, number, names in actions:
            if action == "report":
                rows = [(name, requests[name].output_tokens, pack([number])) for name in names]
                hub.published([emitted_of(rows)])
                for name, offset, _ in rows:
                    requests[name].output += pack([number])
                    for place, followed in enumerate(follows):
                        if name in followed:
                            expected[place].append((name, offset, [number]))
                continue
            # What waits of it is not sent any more: the gateway has what it wants, or wants nothing.
            if names in follows[number]:
                expected[number] = [row for row in expected[number] if row[0] != names]
            if action == "follow":
                stored = requests[names].output_tokens
                hub.follow(followers[number], requests[names], stored, stored)
                follows[number].add(names)
            else:
                hub.unfollow(followers[number], {names: requests[names]}, 0.0)
                follows[number].discard(names)
        for follower, rows_of_it in zip(followers, expected, strict=True):
            if rows_of_it:
                assert follower._emitted
                assert sorted(await take(follower)) == sorted(rows_of_it)
            else:
                assert sum(len(emitted.request_ids) for emitted, _ in follower._emitted) == 0

    asyncio.run(run())


async def test_log_probabilities_stay_with_their_rows() -> None:
    from laps.v1 import generation_pb2, scheduler_pb2

    def packed(value: float) -> bytes:
        one = generation_pb2.TokenLogprob(logprob=value)
        return scheduler_pb2.TokenLogprobs(logprobs=[one]).SerializeToString()

    hub, request, follower = DeliveryHub(GATEWAY_GRACE_S), make_request(), Follower()
    hub.follow(follower, request, 0, 0)
    first, second = emitted_of([("a", 0, pack([7]))]), emitted_of([("a", 1, pack([8]))])
    hub.published([emitted_of([("b", 0, pack([5]))]), first, second], {1: packed(-1.0), 2: packed(-2.0)})
    message = await follower.next_message()
    assert [message.logprobs[row].logprobs[0].logprob for row in range(2)] == [-1.0, -2.0]


async def test_the_end_comes_after_the_last_tokens() -> None:
    hub, request, follower = DeliveryHub(GATEWAY_GRACE_S), make_request(), Follower()
    hub.follow(follower, request, 0, 0)
    request.output[:] = pack([7])
    request.finish_reason, request.finished_s = FinishReason.STOP, 1.0
    hub.published([emitted_of([("a", 0, pack([7]))])])
    hub.finished([request])
    message = await follower.next_message()
    assert list(message.request_ids) == ["a"]
    assert message.completions[0].output_tokens == 1
    assert not follower.followed


@pytest.mark.parametrize(
    ("spec", "cancelled_at_s"),
    [
        ({"cancel_on_disconnect": True, "disconnect_grace_s": 0.0}, 10.0),
        ({"cancel_on_disconnect": True, "disconnect_grace_s": 30.0}, 40.0),
        ({"cancel_on_disconnect": False}, None),
    ],
)
def test_a_lost_client_ends_its_request_as_the_request_says(
    spec: dict[str, object], cancelled_at_s: float | None
) -> None:
    hub, request, follower = DeliveryHub(GATEWAY_GRACE_S), make_request(**spec), Follower()
    hub.follow(follower, request, 0, 0)
    hub.unfollow(follower, {"a": request}, now_s=10.0)
    assert hub.next_orphan_s() == cancelled_at_s
    if cancelled_at_s is not None:
        assert hub.take_abandoned(cancelled_at_s - 0.001) == []
        assert hub.take_abandoned(cancelled_at_s) == ["a"]


def test_a_client_that_comes_back_starts_a_new_grace() -> None:
    hub, follower = DeliveryHub(GATEWAY_GRACE_S), Follower()
    request = make_request(disconnect_grace_s=30.0)
    hub.follow(follower, request, 0, 0)
    hub.unfollow(follower, {"a": request}, now_s=0.0)
    hub.follow(follower, request, 0, 0)
    hub.unfollow(follower, {"a": request}, now_s=29.0)
    assert hub.take_abandoned(30.0) == []
    assert hub.take_abandoned(59.0) == ["a"]


class LookedAt(list[str]):
    """Counts how often it is searched."""

    looks = 0

    def __iter__(self) -> Iterator[str]:
        self.looks += 1
        return super().__iter__()

    def __contains__(self, name: object) -> bool:
        self.looks += 1
        return super().__contains__(name)


async def test_many_who_leave_at_once_cost_one_search_of_what_waits() -> None:
    """Their gateway is behind: each of them would otherwise look through thousands of rows."""
    hub, follower = DeliveryHub(GATEWAY_GRACE_S), Follower()
    requests = {f"r{number}": make_request(f"r{number}") for number in range(200)}
    for request in requests.values():
        hub.follow(follower, request, 0, 0)
    waiting = [LookedAt(requests) for _ in range(5)]
    for offset, ids in enumerate(waiting):
        hub.published([Emitted(ids, [offset] * len(ids), [1] * len(ids), bytes(TOKEN_BYTES * len(ids)))])
    before = sum(ids.looks for ids in waiting)
    leaving = {name: request for name, request in requests.items() if name != "r7"}
    hub.unfollow(follower, leaving, 0.0)
    assert sum(ids.looks for ids in waiting) - before <= 5 * len(waiting)
    assert follower.followed == {"r7"}
    assert await take(follower) == [("r7", offset, [0]) for offset in range(5)]
    gone: set[str] = set()
    while abandoned := hub.take_abandoned(0.0):
        gone.update(abandoned)
    assert gone == set(leaving)


async def test_who_waits_for_room_goes_on_when_what_waited_is_not_wanted_any_more() -> None:
    follower = Follower(message_bytes=1024)
    follower.followed.add("a")
    follower.add_missed("a", 0, bytes(4096))
    room = asyncio.create_task(follower.until_room())
    await asyncio.sleep(0)
    assert not room.done()
    follower.unfollow(["a"])
    await asyncio.wait_for(room, 60)


def test_two_followers_and_one_goes() -> None:
    hub, first, second = DeliveryHub(GATEWAY_GRACE_S), Follower(), Follower()
    request = make_request()
    hub.follow(first, request, 0, 0)
    hub.follow(second, request, 0, 0)
    hub.unfollow(first, {"a": request}, now_s=0.0)
    assert hub.next_orphan_s() is None


def test_a_lost_gateway_gets_its_time_to_come_back() -> None:
    hub, follower, request = DeliveryHub(GATEWAY_GRACE_S), Follower(), make_request()
    hub.follow(follower, request, 0, 0)
    hub.lost(follower, {"a": request}, now_s=0.0)
    assert hub.take_abandoned(GATEWAY_GRACE_S - 0.1) == []
    assert hub.take_abandoned(GATEWAY_GRACE_S) == ["a"]


def test_after_a_crash_nobody_follows_and_everybody_gets_time() -> None:
    hub = DeliveryHub(GATEWAY_GRACE_S)
    hub.restored([make_request()], now_s=0.0)
    assert hub.take_abandoned(GATEWAY_GRACE_S) == ["a"]


def test_many_who_were_left_alone_are_given_up_a_few_at_a_time() -> None:
    hub = DeliveryHub(GATEWAY_GRACE_S)
    hub.restored([make_request(f"r{number}") for number in range(2 * ABANDONED_AT_ONCE)], 0.0)
    rounds = []
    while (due_s := hub.next_orphan_s()) is not None and due_s <= GATEWAY_GRACE_S:
        rounds.append(len(hub.take_abandoned(GATEWAY_GRACE_S)))
    assert rounds == [ABANDONED_AT_ONCE, ABANDONED_AT_ONCE]


def test_a_gateway_that_reads_nothing_is_noticed() -> None:
    hub, follower = DeliveryHub(GATEWAY_GRACE_S), Follower()
    hub.follow(follower, make_request(), 0, 0)
    hub.published([emitted_of([("a", 0, bytes(MAX_PENDING_BYTES - ROW_BYTES))])])
    assert not follower.overrun
    hub.published([emitted_of([("a", MAX_PENDING_BYTES // 4, bytes(4))])])
    assert follower.overrun


async def test_log_probabilities_fit_the_tokens_though_the_store_is_ahead_of_the_hub() -> None:
    def logprobs(*values: float) -> bytes:
        entries = [generation_pb2.TokenLogprob(logprob=value) for value in values]
        return scheduler_pb2.TokenLogprobs(logprobs=entries).SerializeToString()

    hub, request, follower = DeliveryHub(GATEWAY_GRACE_S), make_request(), Follower()
    hub.submitted(request, 0.0)
    request.output[:] = pack([10, 11, 12])
    hub.published([emitted_of([("a", 0, pack([10]))])], {0: logprobs(-1.0)})
    # The commit with the two other tokens is stored, and whoever reads the store gets theirs as well.
    hub.follow(follower, request, 1, 0, logprobs(-1.0, -2.0, -3.0))
    hub.published([emitted_of([("a", 1, pack([11, 12]))])], {0: logprobs(-2.0, -3.0)})
    message = await asyncio.wait_for(follower.next_message(), 60)
    assert unpack(message.token_ids) == [10, 11, 12]
    values = [[entry.logprob for entry in message.logprobs[row].logprobs] for row in range(2)]
    assert (values, list(message.counts)) == ([[-1.0], [-2.0, -3.0]], [1, 2])


@pytest.mark.parametrize("offset", [0, 1, 3])
async def test_who_follows_anew_before_the_last_row_was_sent_gets_no_token_twice(offset: int) -> None:
    hub, request, follower = DeliveryHub(GATEWAY_GRACE_S), make_request(), Follower()
    hub.submitted(request, 0.0)
    request.output[:] = pack([10, 11, 12])
    hub.published([emitted_of([("a", 0, pack([10, 11, 12]))])])
    hub.follow(follower, request, 0, 0)
    hub.unfollow(follower, {"a": request}, 0.0)
    hub.follow(follower, request, 3, offset)
    request.output += pack([13])
    hub.published([emitted_of([("a", 3, pack([13]))])])
    assert joined(await take(follower)) == {"a": (offset, [10, 11, 12, 13][offset:])}


def logprobs_of(tokens: int) -> bytes:
    entries = [generation_pb2.TokenLogprob(logprob=-float(number)) for number in range(tokens)]
    return scheduler_pb2.TokenLogprobs(logprobs=entries).SerializeToString()


@pytest.mark.parametrize("with_logprobs", [False, True])
async def test_what_was_missed_comes_in_messages_of_bounded_size_and_the_end_in_the_last(
    with_logprobs: bool,
) -> None:
    """A gateway that comes back follows all of its requests from their beginnings at once."""
    follower = Follower(message_bytes=4096)
    tokens = {f"r{number}": list(range(number, number + 1500)) for number in range(4)}
    logprobs = logprobs_of(1500) if with_logprobs else b""

    async def follow_all() -> None:
        for request_id, output in tokens.items():
            await follower.until_room()
            follower.add_missed(request_id, 0, pack(output), logprobs)
            end = scheduler_pb2.Completion(request_id=request_id, output_tokens=1500)
            follower.add_completion(end, missed=True)

    reading = asyncio.create_task(follow_all())
    rows: list[tuple[str, int, list[int]]] = []
    told: dict[str, list[float]] = {request_id: [] for request_id in tokens}
    ended: list[str] = []
    while len(ended) < len(tokens):
        message = await asyncio.wait_for(follower.next_message(), 60)
        assert message is not None
        assert message.ByteSize() <= 4096
        position = 0
        for row, (request_id, offset, count) in enumerate(
            zip(message.request_ids, message.offsets, message.counts, strict=True)
        ):
            assert request_id not in ended
            rows.append(
                (request_id, offset, unpack(message.token_ids[4 * position : 4 * (position + count)]))
            )
            told[request_id] += [entry.logprob for entry in message.logprobs[row].logprobs]
            position += count
        ended += [completion.request_id for completion in message.completions]
    await reading
    assert joined(rows) == {request_id: (0, output) for request_id, output in tokens.items()}
    expected = [-float(number) for number in range(1500)] if with_logprobs else []
    assert list(told.values()) == [expected] * len(tokens)


async def test_new_output_comes_after_what_was_missed_of_it() -> None:
    hub, request = DeliveryHub(GATEWAY_GRACE_S), make_request()
    follower = Follower(message_bytes=1024)
    request.output[:] = pack(list(range(1000)))
    hub.restored([request], 0.0)
    hub.follow(follower, request, 1000, 0)
    hub.published([emitted_of([("a", 1000, pack([1000]))])])
    rows: list[tuple[str, int, list[int]]] = []
    while not rows or rows[-1][1] < 1000:
        rows += await take(follower)
    assert joined(rows) == {"a": (0, list(range(1001)))}


async def test_nothing_is_kept_for_a_gateway_whose_stream_is_given_up() -> None:
    hub, follower = DeliveryHub(GATEWAY_GRACE_S), Follower()
    request = make_request()
    request.finish_reason, request.finished_s = FinishReason.STOP, 1.0
    hub.follow(follower, request, 0, 0)
    for _ in range(3):
        hub.published([emitted_of([("a", 0, bytes(MAX_PENDING_BYTES))])])
    hub.finished([request])
    assert follower.overrun
    message = await asyncio.wait_for(follower.next_message(), 60)
    assert message is not None
    assert message.ByteSize() == 0


async def test_who_asks_for_more_than_a_message_holds_must_take_it_first() -> None:
    follower = Follower(message_bytes=1024)
    follower.add_missed("a", 0, bytes(4096))
    room = asyncio.create_task(follower.until_room())
    waiting_tokens = 1024
    while waiting_tokens * TOKEN_BYTES >= 1024:
        await asyncio.sleep(0)
        assert not room.done()
        message = await asyncio.wait_for(follower.next_message(), 60)
        assert message is not None
        waiting_tokens -= sum(message.counts)
    await asyncio.wait_for(room, 60)
