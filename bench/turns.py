"""What gRPC does in a turn of a busy event loop: how many calls it accepts, how long a message takes.

    python bench/turns.py [--seconds 3] [--turns-ms 0.5 1 3] [--json OUT]

A server whose event loop does nothing but compute, so many milliseconds a turn, as that of a scheduler with
much to do, and a client in a process of its own. Without protobuf, Redis and our own code: the bare limit of
everything that travels in calls or in streams. Ten seconds for each length of a turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from _processes import Process, end_on_sigterm

WAITING = 64
"""Calls under way at once, where it is asked how many are accepted."""


async def serve(turn_s: float) -> None:
    async def call(request: bytes, _context: object) -> bytes:
        return request

    async def stream(_requests: object, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            await context.write(message)

    server = grpc.aio.server()
    handlers = {
        "Call": grpc.unary_unary_rpc_method_handler(call),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("turns", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    while True:
        until_s = time.perf_counter() + turn_s
        while time.perf_counter() < until_s:
            pass
        await asyncio.sleep(0)


async def measure(port: int, turn_s: float, seconds: float) -> dict[str, float]:
    """In turns of the server's loop: accepted calls, and the round trips of a call alone and of a message."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary("/turns/Call")
        open_stream: Any = channel.stream_stream("/turns/Stream")
        stream = open_stream()
        await call(b"x")

        async def message() -> None:
            await stream.write(b"x")
            await stream.read()

        many = sum(
            map(len, await asyncio.gather(*(_repeat(lambda: call(b"x"), seconds) for _ in range(WAITING))))
        )
        alone_s = statistics.median(await _repeat(lambda: call(b"x"), seconds))
        message_s = statistics.median(await _repeat(message, seconds))
        stream.cancel()
    return {
        "turn_ms": turn_s * 1e3,
        "accepted_calls_per_s": many / seconds,
        "accepted_calls_per_turn": many / seconds * turn_s,
        "turns_of_a_call": alone_s / turn_s,
        "turns_of_a_message": message_s / turn_s,
    }


async def _repeat(work: Callable[[], Awaitable[object]], seconds: float) -> list[float]:
    """One after the other; the seconds that each took."""
    took_s = []
    until_s = time.perf_counter() + seconds
    while (began_s := time.perf_counter()) < until_s:
        await work()
        took_s.append(time.perf_counter() - began_s)
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each of the three measurements")
    parser.add_argument(
        "--turns-ms", type=float, nargs="+", default=[0.5, 1.0, 3.0], help="lengths of a turn"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        uvloop.run(serve(given.serve))
        return
    end_on_sigterm()
    figures = []
    for turn_ms in given.turns_ms:
        with tempfile.NamedTemporaryFile() as log:
            server = Process([__file__, "--serve", str(turn_ms / 1e3)], log, talks=True)
            try:
                port = server.answer()["port"]
                figures.append(uvloop.run(measure(port, turn_ms / 1e3, given.seconds)))
            finally:
                server.kill()
        print(" ".join(f"{name}={value:.2f}" for name, value in figures[-1].items()), flush=True)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
