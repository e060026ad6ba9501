"""What the gateway says about what it follows, and what it takes of what is delivered."""

from __future__ import annotations

import asyncio
from array import array

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway import deliveries
from gateway.deliveries import Feeds
from gateway.streams import Feed, GapError, Reader
from laps.errors import DataLoss
from laps.v1 import generation_pb2, scheduler_pb2


def pack(*tokens: int) -> bytes:
    return array("I", tokens).tobytes()


@example(steps=[("a", "attach"), ("a", "send"), ("a", "detach"), ("a", "attach")], most=4)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["attach", "detach", "send"])), max_size=30
    ),
    most=st.integers(1, 4),
)
def test_the_scheduler_follows_what_somebody_reads(steps: list[tuple[str, str]], most: int) -> None:
    """It takes a message's follows before its unfollows."""

    async def run() -> None:
        feeds = Feeds(100)
        feeds.follow_all()
        followed: set[str] = set()
        readers: dict[str, list[Reader]] = {"a": [], "b": [], "c": []}

        async def send() -> None:
            for message in await feeds.outgoing() if feeds._outbox else ():
                followed.update(follow.request_id for follow in message.follow)
                followed.difference_update(unfollow.request_id for unfollow in message.unfollow)

        for request_id, step in steps:
            if step == "attach":
                readers[request_id].append(feeds.attach(request_id))
            elif step == "detach" and readers[request_id]:
                feeds.detach(readers[request_id].pop(), done=False, linger_s=0.0)
            elif step == "send":
                await send()
        await send()
        assert followed == {request_id for request_id, here in readers.items() if here}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deliveries, "MAX_MESSAGE_ENTRIES", most)
        asyncio.run(run())


def test_an_end_must_fit_the_output() -> None:
    feed, end = Feed("a"), generation_pb2.Complete()
    feed.extend(0, pack(1, 2))
    with pytest.raises(GapError):
        feed.complete(end, 3)
    with pytest.raises(DataLoss):
        feed.complete(end, 1)
    assert not feed.ended
    feed.complete(end, 2)
    assert feed.ended


async def test_an_end_that_is_told_too_early_ends_the_stream() -> None:
    feeds = Feeds(100)
    reader = feeds.attach("a")
    feeds.accept(
        scheduler_pb2.DeliverResponse(
            request_ids=["a"], offsets=[0], counts=[2], token_ids=pack(1, 2),
            completions=[scheduler_pb2.Completion(request_id="a", output_tokens=1)],
        )
    )  # fmt: skip
    assert (await reader.take()).tokens == array("I", [1, 2])
    with pytest.raises(DataLoss):
        await reader.take()
