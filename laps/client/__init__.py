"""The Python client of LAPS: `Client` for threads, `AsyncClient` for asyncio.

    from laps.client import Client

    with Client("127.0.0.1:50051") as client:
        for chunk in client.stream("def fibonacci(n):", max_tokens=64):
            print(chunk.text, end="")

A stream that breaks is resumed where it broke: the caller sees no gap and no repeat.
"""

from laps.client.aio import AsyncClient, AsyncStream
from laps.client.requests import GenerateOptions, Prompt
from laps.client.results import (
    Chunk,
    Completion,
    Model,
    PoolQueues,
    QueueLevel,
    Request,
    RequestDetail,
    Slot,
    Snapshot,
    Speculation,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
    Worker,
)
from laps.client.retry import RetryPolicy
from laps.client.sync import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Client",
    "Completion",
    "GenerateOptions",
    "Model",
    "PoolQueues",
    "Prompt",
    "QueueLevel",
    "Request",
    "RequestDetail",
    "RetryPolicy",
    "Slot",
    "Snapshot",
    "Speculation",
    "Stream",
    "Timing",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
    "Worker",
]
