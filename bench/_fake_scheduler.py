"""The scheduler of the gateway's benchmark: accepts everything, and delivers rows at the rate it is told.

    python bench/_fake_scheduler.py PORT

Commands come on standard input, one JSON object a line. The tokens of a row say when it was sent.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from _commands import obey

from laps import channels
from laps.v1 import scheduler_pb2, scheduler_pb2_grpc

TICK_S = 0.01
DIGIT_BITS, DIGITS = 6, 5
TIME_UNIT_S = 16e-6


def clock_tokens(now_s: float, alphabet: list[int]) -> bytes:
    """The instant as so many tokens; every token is one plain character."""
    ticks = int(now_s / TIME_UNIT_S)
    mask = (1 << DIGIT_BITS) - 1
    return struct.pack(f"<{DIGITS}I", *(alphabet[ticks >> DIGIT_BITS * i & mask] for i in range(DIGITS)))


def clock_of(tokens: list[int], digit_of: dict[int, int]) -> float:
    """The instant in `clock_tokens`, in seconds of a period of 2 ** 30 units."""
    return sum(digit_of[token] << DIGIT_BITS * i for i, token in enumerate(tokens)) * TIME_UNIT_S


PERIOD_S = (1 << DIGIT_BITS * DIGITS) * TIME_UNIT_S


class FakeScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    def __init__(self, alphabet: list[int]) -> None:
        self._alphabet = alphabet
        self._streams: dict[Any, dict[str, int]] = {}
        """By Deliver stream: followed requests, and their output tokens."""

    async def Submit(
        self, request: scheduler_pb2.SubmitRequest, context: Any
    ) -> scheduler_pb2.SubmitResponse:
        return scheduler_pb2.SubmitResponse(epoch=1)

    async def DescribePool(self, request: Any, context: Any) -> scheduler_pb2.DescribePoolResponse:
        return scheduler_pb2.DescribePoolResponse(
            pool="default", policy="fake", epoch=1, workers=1, slots=4096
        )

    async def Deliver(
        self, request_iterator: AsyncIterator[scheduler_pb2.DeliverRequest], context: Any
    ) -> None:
        followed: dict[str, int] = {}
        self._streams[context] = followed
        try:
            async for message in request_iterator:
                for follow in message.follow:
                    followed[follow.request_id] = follow.offset
                for unfollow in message.unfollow:
                    followed.pop(unfollow.request_id, None)
        finally:
            del self._streams[context]

    async def run(self, seconds: float, rows_per_s: float) -> dict[str, Any]:
        """Rows for all followed requests in turn."""
        began_s = due_s = time.monotonic()
        sent, turns = 0, dict.fromkeys(self._streams, 0)
        while due_s < began_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            due_s += TICK_S
            total = sum(map(len, self._streams.values()))
            for context, followed in self._streams.items():
                names = list(followed)
                rows = round(rows_per_s * TICK_S * len(names) / total)
                start = turns[context]
                turns[context] += rows
                chosen = [names[(start + i) % len(names)] for i in range(min(rows, len(names)))]
                message = scheduler_pb2.DeliverResponse(
                    request_ids=chosen,
                    offsets=[followed[name] for name in chosen],
                    counts=[DIGITS] * len(chosen),
                    token_ids=clock_tokens(time.monotonic(), self._alphabet) * len(chosen),
                )
                for name in chosen:
                    followed[name] += DIGITS
                sent += len(chosen)
                await context.write(message)
        return {"rows_per_s": sent / (time.monotonic() - began_s)}


async def main() -> None:
    fake = FakeScheduler(json.loads(sys.argv[2]))
    server = channels.new_server()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(fake, server)
    await obey(server, int(sys.argv[1]), fake.run)


if __name__ == "__main__":
    uvloop.run(main())
