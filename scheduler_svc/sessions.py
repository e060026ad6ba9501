"""The workers' open streams, and what a tick tells each of them."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from laps.v1 import worker_pb2
from scheduler_svc import convert
from scheduler_svc.core.records import Request, Tick

UPDATE_BYTES = 1 << 20
"""Of one message to a worker, about: gRPC refuses what is larger than `max_message_bytes`, and the contexts
that many slots are given in one tick can be. The worker would join anew, and be given the same."""
MAX_UNREAD_UPDATES = 1000
"""A worker that has not read so many reads nothing. It loses its session; what it ran waits again."""


@dataclass(eq=False)
class WorkerSession:
    """A worker's open stream: what goes out on it, and the last report that came in."""

    worker_id: str
    outbox: asyncio.Queue[worker_pb2.SessionResponse | None] = field(default_factory=asyncio.Queue)
    last_step: int = 0
    unacknowledged: bool = False

    def tell(self, update: worker_pb2.SessionResponse) -> bool:
        """False: the worker does not read."""
        for message in _of_bounded_size(update):
            self.outbox.put_nowait(message)
        return self.outbox.qsize() <= MAX_UNREAD_UPDATES

    def close(self) -> None:
        self.outbox.put_nowait(None)

    def abandon(self) -> None:
        """Closes it without what has not been read: that may never be."""
        while not self.outbox.empty():
            self.outbox.get_nowait()
        self.close()


def updates(
    tick: Tick, reported: Iterable[str], traceparent: Callable[[Request], str]
) -> dict[str, worker_pb2.SessionResponse]:
    """What the workers are told of a tick, by worker: of what they lose, of what they are given, and that
    their reports are stored. The caller adds what is the same for all."""
    told = {worker_id: worker_pb2.SessionResponse() for worker_id in reported}
    for revoke in tick.revokes:
        _of(told, revoke.worker_id).leases.revokes.append(convert.revoke(revoke))
    for grant in tick.grants:
        crc32 = zlib.crc32(grant.request.output)
        message = convert.grant(grant, crc32, traceparent(grant.request))
        _of(told, grant.worker_id).leases.grants.append(message)
    return told


def _of(told: dict[str, worker_pb2.SessionResponse], worker_id: str) -> worker_pb2.SessionResponse:
    if worker_id not in told:
        told[worker_id] = worker_pb2.SessionResponse()
    return told[worker_id]


def _of_bounded_size(update: worker_pb2.SessionResponse) -> Iterator[worker_pb2.SessionResponse]:
    """One, or several where the contexts in its grants are too long for that. Each holds for itself."""
    leases = update.leases
    if not leases.grants or update.ByteSize() <= UPDATE_BYTES:
        yield update
        return
    grants = list(leases.grants)
    del leases.grants[:]
    message, size = worker_pb2.SessionResponse(leases=leases), 0
    # A worker that has been told of what it loses has room for what it is given.
    del leases.revokes[:]
    for grant in grants:
        grant_bytes = grant.ByteSize()
        if size and size + grant_bytes > UPDATE_BYTES:
            yield message
            message, size = worker_pb2.SessionResponse(leases=leases), 0
        message.leases.grants.append(grant)
        size += grant_bytes
    yield message
