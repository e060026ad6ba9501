"""The bare limit of the gateway's benchmark: grpc.aio streams on which nothing is done but to send.

    python bench/_bare_streams.py PORT ALPHABET

Each stream has a task that waits and then writes bytes made beforehand: no scheduler, no request, no
text. Commands come on standard input, one JSON object a line.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from typing import Any

import grpc
import uvloop
from _commands import obey
from _fake_scheduler import DIGITS, TICK_S, clock_tokens

from laps import channels
from laps.v1 import inference_pb2

REQUEST_ID = "00000000-0000-0000-0000-000000000000"


class BareStreams:
    """Every stream's task waits for its next message."""

    def __init__(self, alphabet: list[int]) -> None:
        self._alphabet = alphabet
        self._waiters: list[asyncio.Future[bytes]] = []

    async def generate(self, request: bytes, context: Any) -> None:
        await context.send_initial_metadata((("laps-request-id", REQUEST_ID),))
        number = len(self._waiters)
        self._waiters.append(asyncio.get_running_loop().create_future())
        while True:
            message = await self._waiters[number]
            self._waiters[number] = asyncio.get_running_loop().create_future()
            await context.write(message)

    async def run(self, seconds: float, rows_per_s: float) -> dict[str, Any]:
        """Messages on all streams in turn; a stream that has not sent the last one is left out."""
        began_s = due_s = time.monotonic()
        sent = turn = 0
        while due_s < began_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            due_s += TICK_S
            message = self._message()
            for _ in range(min(round(rows_per_s * TICK_S), len(self._waiters))):
                waiter = self._waiters[turn % len(self._waiters)]
                turn += 1
                if not waiter.done():
                    waiter.set_result(message)
                    sent += 1
        return {"rows_per_s": sent / (time.monotonic() - began_s)}

    def _message(self) -> bytes:
        message = inference_pb2.GenerateResponse(request_id=REQUEST_ID, offset=100)
        tokens = clock_tokens(time.monotonic(), self._alphabet)
        message.chunk.token_ids.extend(struct.unpack(f"<{DIGITS}I", tokens))
        message.chunk.text = "x" * DIGITS
        return message.SerializeToString()


async def main() -> None:
    bare = BareStreams(json.loads(sys.argv[2]))
    server = channels.new_server()
    method = grpc.unary_stream_rpc_method_handler(bare.generate)
    handlers: dict[str, Any] = {"Generate": method}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("laps.v1.InferenceService", handlers),)
    )
    await obey(server, int(sys.argv[1]), bare.run)


if __name__ == "__main__":
    uvloop.run(main())
