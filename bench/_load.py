"""The load of the scheduler's benchmark, as a process of its own: simulated workers and one gateway.

It reads commands from standard input, one JSON object a line, and answers each with one. Its own time must
not show in the figures: what does not change between two reports is serialised once.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import sys
import time
import traceback
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import grpc.aio
import uvloop

from gateway.submissions import Submissions
from laps import channels
from laps.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc, worker_pb2

DRAFTED, ACCEPTED = 4, 2
EMITTED = ACCEPTED + 1
STEP_S = 1 / 30
"""What reports claim that a step took, whatever their rate."""
PROMPT_TOKENS = 128
SUBMITTING = 64
"""Submissions under way while a queue is filled."""
MAX_MESSAGE_BYTES = 64 << 20
TOKEN = struct.pack("<I", 1234)


class Worker:
    """A worker without an engine: reports a step of all its slots whenever it is told to."""

    def __init__(self, channel: grpc.aio.Channel, pool: str, number: int, slots: int) -> None:
        self.name = f"simulated-{number}"
        self.latencies_s: list[float] = []
        """From a report to the lease update that acknowledges it."""
        self.acknowledged = self.step = 0
        self._pool, self._slots = pool, slots
        self._session = channel.stream_stream(
            "/laps.v1.WorkerService/Session",
            request_serializer=None,
            response_deserializer=worker_pb2.SessionResponse.FromString,
        )
        self._call: Any = None
        self._epoch = 0
        self._sent_s: dict[int, float] = {}
        self._leases: dict[str, list[int]] = {}
        """By request: lease, output tokens, max_tokens."""
        self._released: list[int] = []
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()
        self._constant: dict[int, bytes] = {}

    async def join(self) -> None:
        self._call = self._session()
        hello = worker_pb2.WorkerHello(
            worker_id=self.name,
            pool=self._pool,
            slots=self._slots,
            vocabulary_size=32000,
            context_tokens=1 << 20,
            costs=_costs(),
            target="simulated",
            model_fingerprint="simulated",
        )
        await self._write(worker_pb2.SessionRequest(hello=hello).SerializeToString())
        welcome = await self._call.read()
        self._epoch = welcome.welcome.epoch
        self._tasks = [must_go_on(self._read()), must_go_on(self._beat())]

    async def paced(self, steps_per_s: float, until_s: float) -> None:
        """One step every so often, in whatever phase this worker is."""
        due_s = time.perf_counter() + random.random() / steps_per_s
        while due_s < until_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            due_s += 1 / steps_per_s
            await self.do_step()

    async def at_once(self, window: int, until_s: float) -> None:
        """As many as are acknowledged, `window` of them under way."""
        while time.perf_counter() < until_s:
            if self.step - self.acknowledged >= window:
                self._changed.clear()
                await self._changed.wait()
            else:
                await self.do_step()

    async def settled(self) -> None:
        """Waits until every report is acknowledged."""
        while self.acknowledged < self.step:
            self._changed.clear()
            await self._changed.wait()

    async def do_step(self) -> None:
        self.step += 1
        report = worker_pb2.StepReport(epoch=self._epoch, step=self.step)
        report.lease_ids.extend([lease[0] for lease in self._leases.values()])
        report.offsets.extend([lease[1] for lease in self._leases.values()])
        rows = len(self._leases)
        ended = []
        for row, (request_id, lease) in enumerate(self._leases.items()):
            lease[1] += EMITTED
            if lease[1] >= lease[2]:
                report.finishes.add(row=row, reason=generation_pb2.FINISH_REASON_LENGTH)
                ended.append(request_id)
        for request_id in ended:
            del self._leases[request_id]
        report.released_lease_ids.extend(self._released)
        self._released.clear()
        # Serialised messages, put one behind the other, are their union.
        body = report.SerializeToString() + self._constant_part(rows)
        self._sent_s[self.step] = time.perf_counter()
        await self._write(_field(2, body))

    def _constant_part(self, rows: int) -> bytes:
        part = self._constant.get(rows)
        if part is None:
            part = self._constant[rows] = worker_pb2.StepReport(
                emitted_counts=[EMITTED] * rows,
                drafted_counts=[DRAFTED] * rows,
                accepted_counts=[ACCEPTED] * rows,
                token_ids=TOKEN * (EMITTED * rows),
                timings=worker_pb2.StepTimings(step_s=STEP_S, costs=_costs()),
                kv_used_tokens=rows * PROMPT_TOKENS,
                kv_capacity_tokens=1 << 20,
            ).SerializeToString()
        return part

    async def _write(self, message: bytes) -> None:
        async with self._writing:
            await self._call.write(message)

    async def _read(self) -> None:
        async for message in _messages(self._call):
            now_s = time.perf_counter()
            update = message.leases
            for step in range(self.acknowledged + 1, update.acknowledged_step + 1):
                self.latencies_s.append(now_s - self._sent_s.pop(step))
            self.acknowledged = max(self.acknowledged, update.acknowledged_step)
            for revoke in update.revokes:
                self._leases.pop(revoke.request_id, None)
                if revoke.lease_id:
                    self._released.append(revoke.lease_id)
            for grant in update.grants:
                # A multiple of what a step emits, so that the last step is a whole one.
                most = grant.stopping.max_tokens
                self._leases[grant.request_id] = [grant.lease_id, grant.output_tokens, most]
            self._changed.set()

    async def _beat(self) -> None:
        beat = worker_pb2.SessionRequest(heartbeat=worker_pb2.Heartbeat()).SerializeToString()
        while True:
            await asyncio.sleep(1.0)
            await self._write(beat)


class Load:
    """What the commands do. The gateway's part follows every request and submits new ones."""

    def __init__(self, address: str, output_tokens: int, pool: str) -> None:
        channel = channels.open_channel(address, max_message_bytes=MAX_MESSAGE_BYTES)
        self._address, self._pool = address, pool
        self._scheduler = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        self._submissions = Submissions(self._scheduler)
        self._output_tokens = output_tokens
        self._workers: list[Worker] = []
        self._submitted = self._finished = 0
        self._chance = random.Random(0)
        self._replacing: set[asyncio.Task[float]] = set()
        self._follows: asyncio.Queue[str] = asyncio.Queue()

    async def start(self, workers: int, slots: int) -> dict[str, Any]:
        for number in range(workers):
            # A connection each: workers are on machines of their own.
            channel = channels.open_channel(self._address, max_message_bytes=MAX_MESSAGE_BYTES)
            self._workers.append(Worker(channel, self._pool, number, slots))
        await asyncio.gather(*(worker.join() for worker in self._workers))
        self._delivering = must_go_on(self._deliver())
        return {}

    async def submit(self, count: int) -> dict[str, Any]:
        """So many more requests, as fast as they are acknowledged."""
        began_s = time.perf_counter()
        slots = asyncio.Semaphore(SUBMITTING)

        async def one() -> None:
            async with slots:
                await self._submit()

        for first in range(0, count, 1000):
            await asyncio.gather(*(one() for _ in range(min(1000, count - first))))
        return {"submissions_per_s": count / (time.perf_counter() - began_s)}

    async def steps(
        self, seconds: float, steps_per_s: float = 0.0, window: int = 4, submissions_per_s: float = 0.0
    ) -> dict[str, Any]:
        """Steps for so long: `steps_per_s` of all workers together, or 0: as many as are acknowledged."""
        for worker in self._workers:
            worker.latencies_s.clear()
        first = sum(worker.acknowledged for worker in self._workers)
        began_s = time.perf_counter()
        until_s = began_s + seconds
        submitting = asyncio.create_task(self._submit_steadily(submissions_per_s, until_s))
        if steps_per_s:
            each = steps_per_s / len(self._workers)
            await asyncio.gather(*(worker.paced(each, until_s) for worker in self._workers))
        else:
            await asyncio.gather(*(worker.at_once(window, until_s) for worker in self._workers))
        await asyncio.gather(*(worker.settled() for worker in self._workers))
        took_s = time.perf_counter() - began_s
        acknowledgements_s = await submitting
        steps = sum(worker.acknowledged for worker in self._workers) - first
        latencies_s = [latency for worker in self._workers for latency in worker.latencies_s]
        return {
            "seconds": took_s,
            "steps": steps,
            "steps_per_s": steps / took_s,
            "finished": self._finished,
            **_percentiles("report_to_lease", latencies_s),
            **_percentiles("submit_to_ack", acknowledgements_s),
        }

    async def _submit_steadily(self, rate_per_s: float, until_s: float) -> list[float]:
        if not rate_per_s:
            return []
        tasks = []
        due_s = time.perf_counter()
        while due_s < until_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            due_s += 1 / rate_per_s
            tasks.append(asyncio.create_task(self._submit()))
        return list(await asyncio.gather(*tasks))

    async def _submit(self) -> float:
        """Returns the seconds from submission to acknowledgement."""
        self._submitted += 1
        request_id = f"bench-{self._submitted:08d}"
        steps = max(1, round(self._output_tokens * self._chance.uniform(0.25, 1.75) / EMITTED))
        spec = scheduler_pb2.RequestSpec(
            request_id=request_id,
            pool=self._pool,
            prompt_token_ids=TOKEN * PROMPT_TOKENS,
            sampling=generation_pb2.SamplingParams(temperature=0.0),
            stopping=generation_pb2.StoppingParams(max_tokens=steps * EMITTED, ignore_eos=True),
            digest=bytes(32),
        )
        request = scheduler_pb2.SubmitRequest(spec=spec, gateway_id="bench")
        began_s = time.perf_counter()
        while True:
            try:
                await self._submissions.submit(request)
                break
            except grpc.aio.AioRpcError as error:
                # As a gateway does; the time that it takes counts.
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.05)
        took_s = time.perf_counter() - began_s
        self._follows.put_nowait(request_id)
        return took_s

    async def _deliver(self) -> None:
        """Follows everything, and submits a new request for each that ends."""
        call: Any = self._scheduler.Deliver()  # type: ignore[call-arg]
        await call.write(scheduler_pb2.DeliverRequest(gateway_id="bench"))
        following = must_go_on(self._follow(call))
        async for message in _messages(call):
            for _ in message.completions:
                self._finished += 1
                task = asyncio.create_task(self._submit())
                self._replacing.add(task)
                task.add_done_callback(self._replacing.discard)
        await following

    async def _follow(self, call: Any) -> None:
        while True:
            message = scheduler_pb2.DeliverRequest()
            message.follow.add(request_id=await self._follows.get())
            while not self._follows.empty() and len(message.follow) < 1000:
                message.follow.add(request_id=self._follows.get_nowait())
            await call.write(message)


async def echo(address: str, slots: int, seconds: float, window: int = 32) -> dict[str, Any]:
    """The bare limit: the same reports on one stream, `window` of them under way."""
    worker = Worker(channels.open_channel(address), "bare", 0, slots)
    await worker.join()
    for number in range(slots):
        worker._leases[f"bench-{number:08d}"] = [(1 << 32) + number, 100_000, 1 << 40]
    began_s = time.perf_counter()
    await worker.at_once(window, began_s + seconds)
    await worker.settled()
    took_s = time.perf_counter() - began_s
    return {"steps_per_s": worker.step / took_s, **_percentiles("report_to_echo", worker.latencies_s)}


async def _messages(call: Any) -> AsyncIterator[Any]:
    while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        yield message


def must_go_on(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task whose failure ends the process: without it the figures would mean nothing."""

    async def guarded() -> None:
        try:
            await work
        except Exception:
            traceback.print_exc()
            os._exit(1)

    return asyncio.create_task(guarded())


def _costs() -> worker_pb2.StepCosts:
    return worker_pb2.StepCosts(draft_token_s=0.002, verify_s=0.025, prefill_token_s=0.0001, switch_s=0.001)


def _field(number: int, body: bytes) -> bytes:
    """A length-delimited field of a serialised message."""
    size, varint = len(body), bytearray()
    while size >= 0x80:
        varint.append(size & 0x7F | 0x80)
        size >>= 7
    varint.append(size)
    return bytes([number << 3 | 2]) + bytes(varint) + body


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {
        f"{name}_p50_ms": round(ordered[len(ordered) // 2] * 1e3, 3),
        f"{name}_p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 3),
        f"{name}_max_ms": round(ordered[-1] * 1e3, 3),
    }


async def main() -> None:
    address, output_tokens, pool = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    load = Load(address, output_tokens, pool)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        name = command.pop("do")
        if name == "echo":
            answer = await echo(address, **command)
        else:
            answer = await {"start": load.start, "submit": load.submit, "steps": load.steps}[name](**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
