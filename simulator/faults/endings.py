"""What must be true when the faults are over and everything has come to rest."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import grpc

from laps.client.transcript import Transcript
from laps.errors import LapsError, from_rpc_error
from laps.v1 import inference_pb2_grpc
from simulator.faults.clients import PATIENT
from simulator.faults.clock import Process
from simulator.faults.network import Channel
from simulator.faults.nodes import GATEWAY

if TYPE_CHECKING:
    from simulator.faults.world import World

READERS = 6
SLACK_S = 6.0
"""What hearing of a lost client and a commit may take besides the grace periods."""


def read_again(world: World) -> list[asyncio.Task[Any]]:
    """Readers that come when all is over and want the rest of some request from some offset on."""
    rng = random.Random(f"{world.knobs.seed} readers")
    kept = [life for life in world.history.lives.values() if not life.forgotten]
    tasks = []
    for number, life in enumerate(rng.sample(kept, min(READERS, len(kept)))):
        offset = rng.randint(0, life.stored_tokens)
        process = Process(f"reader-{number}")
        tasks.append(world.loop.spawn(process, _read(world, process.name, life.request_id, offset)))
    return tasks


async def _read(world: World, name: str, request_id: str, offset: int) -> None:
    transcript = Transcript(None, request_id=request_id, offset=offset, retry=PATIENT, rng=random.Random(0))
    channel: Any = Channel(world.network, GATEWAY)
    stubs: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    history = world.history
    life = history.lives[request_id]
    while transcript.result is None:
        call = transcript.next_call()
        stream = stubs.Resume(call.request)
        problem: LapsError | None = None
        try:
            async for response in stream:
                if response.WhichOneof("event") == "chunk":
                    history.shown(name, request_id, response.offset, response.chunk.token_ids)
                transcript.accept(response)
                if transcript.result is not None:
                    break
        except grpc.RpcError as error:
            problem = from_rpc_error(error)
            if problem.status == "NOT_FOUND" and life.forgotten:
                return
        finally:
            stream.cancel()
        if transcript.result is None:
            full = problem is not None and problem.status == "RESOURCE_EXHAUSTED"
            await asyncio.sleep(1.0 if full else transcript.failed(problem))
    history.require(
        list(transcript.result.token_ids) == life.expected[offset : life.stored_tokens],
        f"{name} resumed {request_id} at {offset} and got {len(transcript.result.token_ids)} tokens, "
        f"not the rest of {life.stored_tokens}",
    )


def check_end(world: World, readers: list[asyncio.Task[Any]]) -> None:
    """Raises Violation."""
    history = world.history
    require = history.require
    for number, reader in enumerate(readers):
        require(reader.done(), f"reader-{number} did not come to an end")
        if reader.done() and reader.exception() is not None:
            require(False, f"reader-{number}: {reader.exception()!r}")
    _check_store(world)
    for life in history.lives.values():
        require(bool(life.ended), f"{life.request_id} was accepted and never ended")
        if life.client_gone_s is not None and life.cancels:
            graces_s = life.grace_s + world.knobs.gateway_grace_s + world.knobs.leader_ttl_s
            due_s = (
                max(life.client_gone_s, world.knobs.faults_s + world.knobs.leader_ttl_s) + graces_s + SLACK_S
            )
            require(
                life.ended_s <= due_s,
                f"{life.request_id} outlived its client: gone at {life.client_gone_s:.3f}, "
                f"ended at {life.ended_s:.3f}, due at {due_s:.3f}",
            )
    for client in world.clients:
        text, first = client.transcript._token_ids, client.transcript._first_offset
        lives = [history.lives[name] for name in client.request_ids if name in history.lives]
        require(
            not text
            or any(
                text == life.expected[first : max(life.stored_tokens, life.former_tokens)][: len(text)]
                for life in lives
            ),
            f"the transcript of {client.name} is not the beginning of its log",
        )
    left = unrest(world)
    require(not left, f"not at rest in the end: {left}")


def _check_store(world: World) -> None:
    keys, history = world.server.model.keys, world.history
    require = history.require
    for name in ("live", "leases"):
        left = getattr(keys, name)
        require(not left, f"the store still has {name}: {sorted(left)}")
    for level, waiting in keys.queues.items():
        require(not waiting, f"ended requests wait in level {level}: {sorted(waiting)}")
    require(
        keys.meta.get("backlog_us", "0") == "0",
        f"a backlog of {keys.meta.get('backlog_us')} us without requests",
    )
    for request_id, log in keys.tokens.items():
        stored = [int(token) for entry in log for token in entry.tokens.split()]
        life = history.lives[request_id]
        require(
            stored == life.expected[: life.stored_tokens],
            f"the log of {request_id} is not what was committed",
        )


def unrest(world: World) -> str:
    """What is not empty, closed or connected yet; nothing, where all is at rest."""
    leaders = [node.terms.leader for node in world.schedulers if node.terms.leader is not None]
    if len(leaders) != 1:
        return f"{len(leaders)} schedulers lead"
    core, hub = leaders[0].core, leaders[0].hub
    in_session = set(core.workers)
    facts: list[tuple[str, object]] = [
        ("the store has leases", world.server.model.keys.leases),
        ("the leader holds requests", core.requests),
        ("the leader counts running requests", core.running_requests),
        ("the hub has followers", hub._followers),
        ("the hub has several followers of one", hub._shared),
        ("the hub waits for clients", hub._orphan_due_s),
        ("workers are not in session", {w.name for w in world.workers} ^ in_session),
    ]
    for worker in world.workers:
        held = [name for name in worker.engine.held if worker.engine.holds(name)]
        facts.append((f"{worker.name} holds leases of ended requests", worker.driver.held_leases))
        facts.append((f"{worker.name} holds the KV cache of ended requests", held))
    for gateway in world.gateways:
        facts.append((f"{gateway.name} is not connected", not gateway.link.connected))
        facts.append((f"{gateway.name} follows requests", gateway.followed))
        facts.append((f"{gateway.name} counts streams", gateway.inference.streams.count))
    return "; ".join(f"{what}: {found}" for what, found in facts if found)
