"""The bare limit of the scheduler's benchmark: every report is parsed, written to Redis once, and answered.

python bench/_echo.py PORT REDIS_URL
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from laps import channels
from laps.v1 import worker_pb2, worker_pb2_grpc
from scheduler_svc.store import connection


class Echo(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, redis_url: str) -> None:
        pool = connection.make_pool(redis_url, 5.0)
        self._redis: Any = pool.make_connection()  # type: ignore[no-untyped-call]
        self._redis.socket_timeout = None

    async def Session(
        self, request_iterator: AsyncIterator[worker_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        await self._redis.connect()
        await anext(request_iterator)
        yield worker_pb2.SessionResponse(welcome=worker_pb2.SessionWelcome(epoch=1))
        async for message in request_iterator:
            report = message.report
            rows = [
                list(report.lease_ids),
                list(report.offsets),
                list(report.emitted_counts),
                list(report.drafted_counts),
                list(report.accepted_counts),
            ]
            assert len(rows[0]) == len(rows[4])
            packed = self._redis.pack_command("SET", "laps:{bench}:echo", report.token_ids)
            await self._redis.send_packed_command(packed, check_health=False)
            await self._redis.read_response()
            update = worker_pb2.LeaseUpdate(epoch=1, acknowledged_step=report.step, step_credit=64)
            yield worker_pb2.SessionResponse(leases=update)


async def main() -> None:
    server = channels.new_server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Echo(sys.argv[2]), server)
    channels.bind(server, "127.0.0.1", int(sys.argv[1]))
    await server.start()
    print("listening", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main())
