"""The clients of the gateway's benchmark: thousands of streams in one process that costs little.

A gRPC client in Python costs as much per message as the gateway does. This one speaks just enough HTTP/2:
it sends `Generate` once per stream and then only reads.

    python bench/_clients.py PORT ALPHABET
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from typing import Any

import uvloop
from _fake_scheduler import DIGITS, PERIOD_S, clock_of

from laps.v1 import inference_pb2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
MAX_WINDOW = (1 << 31) - 1
STREAMS_PER_CONNECTION = 100
REFILL_BYTES = 1 << 24


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(method: str, authority: str) -> bytes:
    """An HPACK block of literals that are not indexed (RFC 7541, 6.2.2)."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", authority),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )
    block = b""
    for name, value in fields:
        block += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return block


class Connection(asyncio.Protocol):
    """Many streams; counts the messages of each and their delays."""

    def __init__(self, digit_of: dict[int, int], initial_window_bytes: int) -> None:
        self.messages = self.tokens = 0
        self.opened: set[int] = set()
        self.delays_s: list[float] = []
        self.closed = ""
        self._digit_of = digit_of
        self._window_bytes = initial_window_bytes
        self._partial = b""
        self._unread: dict[int, bytes] = {}
        self._taken_bytes = 0
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        settings = struct.pack(">HI", 4, self._window_bytes)
        transport.write(PREFACE + frame(SETTINGS, 0, 0, settings))
        transport.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MAX_WINDOW - 65535)))

    def open(self, stream: int, request: bytes, authority: str) -> None:
        method = "/laps.v1.InferenceService/Generate"
        body = struct.pack(">BI", 0, len(request)) + request
        self.transport.write(
            frame(HEADERS, END_HEADERS, stream, headers(method, authority))
            + frame(DATA, END_STREAM, stream, body)
        )

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = self.closed or f"connection lost: {error}"

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic() % PERIOD_S
        if self._partial:
            data = self._partial + data
        at, end = 0, len(data)
        while end - at >= 9:
            size = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            if end - at < 9 + size:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9], "big") & MAX_WINDOW
            payload = data[at + 9 : at + 9 + size]
            at += 9 + size
            if kind == DATA:
                self._taken_bytes += size
                self._messages(stream, payload, now_s)
            elif kind == HEADERS:
                # The first headers say that the request is stored; more of them are the status.
                if flags & END_STREAM:
                    self.closed = "a stream has ended"
                self.opened.add(stream)
            elif kind == PING and not flags & ACK:
                self.transport.write(frame(PING, ACK, 0, payload))
            elif kind == SETTINGS and not flags & ACK:
                self.transport.write(frame(SETTINGS, ACK, 0))
            elif kind in (RST, GOAWAY):
                self.closed = f"frame {kind}: {payload!r}"
        self._partial = data[at:]
        if self._taken_bytes > REFILL_BYTES:
            self.transport.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._taken_bytes)))
            self._taken_bytes = 0

    def _messages(self, stream: int, payload: bytes, now_s: float) -> None:
        data = self._unread.pop(stream, b"") + payload
        at = 0
        while len(data) - at >= 5:
            size = int.from_bytes(data[at + 1 : at + 5], "big")
            if len(data) - at < 5 + size:
                break
            message = inference_pb2.GenerateResponse.FromString(data[at + 5 : at + 5 + size])
            at += 5 + size
            ids = message.chunk.token_ids
            self.messages += 1
            self.tokens += len(ids)
            for first in range(0, len(ids) - DIGITS + 1, DIGITS):
                sent_s = clock_of(ids[first : first + DIGITS], self._digit_of)
                self.delays_s.append((now_s - sent_s) % PERIOD_S)
        if at < len(data):
            self._unread[stream] = data[at:]


class Clients:
    def __init__(self, port: int, alphabet: list[int]) -> None:
        self._port = port
        self._digit_of = {token: digit for digit, token in enumerate(alphabet)}
        self._connections: list[Connection] = []
        self._deaf: list[Connection] = []

    async def open(self, streams: int, deaf: bool = False) -> dict[str, Any]:
        """Begins so many streams. `deaf`: their windows are so small that nothing can be sent on them."""
        into = self._deaf if deaf else self._connections
        window_bytes = 0 if deaf else MAX_WINDOW
        loop = asyncio.get_running_loop()
        for first in range(0, streams, STREAMS_PER_CONNECTION):
            _, connection = await loop.create_connection(
                lambda: Connection(self._digit_of, window_bytes), "127.0.0.1", self._port
            )
            into.append(connection)
            wanted = min(STREAMS_PER_CONNECTION, streams - first)
            for number in range(wanted):
                request = inference_pb2.GenerateRequest()
                request.token_ids.ids.extend([1, 2, 3])
                request.stopping.max_tokens = 1000
                request.stopping.ignore_eos = True
                connection.open(2 * number + 1, request.SerializeToString(), f"127.0.0.1:{self._port}")
            while len(connection.opened) < wanted:
                if connection.closed:
                    raise RuntimeError(connection.closed)
                await asyncio.sleep(0.005)
        return {}

    async def count(self, seconds: float) -> dict[str, Any]:
        """What comes in so many seconds."""
        for connection in self._connections:
            connection.messages = connection.tokens = 0
            connection.delays_s.clear()
        began_s = time.monotonic()
        await asyncio.sleep(seconds)
        took_s = time.monotonic() - began_s
        delays_s = sorted(delay for each in self._connections for delay in each.delays_s)
        closed = [each.closed for each in self._connections if each.closed]
        if closed:
            raise RuntimeError(closed[0])
        return {
            "messages_per_s": round(sum(each.messages for each in self._connections) / took_s, 1),
            "tokens_per_s": round(sum(each.tokens for each in self._connections) / took_s, 1),
            "delay_p50_ms": round(delays_s[len(delays_s) // 2] * 1e3, 3) if delays_s else None,
            "delay_p99_ms": round(delays_s[int(len(delays_s) * 0.99)] * 1e3, 3) if delays_s else None,
        }


async def main() -> None:
    clients = Clients(int(sys.argv[1]), json.loads(sys.argv[2]))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        answer = await {"open": clients.open, "count": clients.count}[command.pop("do")](**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
