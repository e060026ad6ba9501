"""Kills, freezes and cuts off real processes while clients run, then checks what everybody saw.

    python -m bench.killloop [--minutes 5] [--seed 0] [--store valkey] [--store redis] [--json OUT]
    python -m bench.killloop --fault "kill leader" --fault "cut worker" ...

Two gateways, two schedulers, two workers with the built-in models and a store of its own. Several stores are
tried one after the other, each for so many minutes, or with each of the faults that are named. Ends with exit
code 1 if anything was lost, told twice, or different from the target's own output.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Before torch is loaded: a thread that spins for work takes the core that another process needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click
from redis import RedisError
from transformers import AutoTokenizer

from bench._figures import spread
from bench._fleet import GATEWAYS, SCHEDULERS, Fleet
from bench._history import Reference, Seen, Verdict, judge, until_all_have_ended
from bench._plan import KINDS, Planned, chosen, plan
from bench._processes import end_on_sigterm
from laps.client import AsyncClient
from laps.client.retry import RetryPolicy
from laps.errors import LapsError
from laps.settings import BUILT_IN_TARGET
from scheduler_svc.store.server import redis_binary, valkey_binary
from scheduler_svc.store.store import Store

PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 12, 120, 64
CLIENTS = 6
"""At once; fewer than there are slots, so that a stream that stands still stands still for a fault."""
PATIENT = RetryPolicy(connect_attempts=80, resume_attempts=80, max_backoff_s=1.0)
GOES_ON_S = 40.0
FOUND_S = 60.0
DRAIN_S = 120.0


@dataclass
class Fault:
    kind: str
    """For example `kill leader`."""
    at_s: float
    lasts_s: float
    alone: bool = True
    """No other fault fell into its time."""
    recovered_s: float | None = None
    """From the fault until every stream that was open has moved or ended."""
    led_anew_s: float | None = None
    """From a leader's fault until another epoch began."""


@dataclass
class Run:
    fleet: Fleet
    rng: random.Random
    prompts: list[list[int]]
    seen: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    open: dict[str, Seen] = field(default_factory=dict)
    struck: set[str] = field(default_factory=set)
    """Processes to which something is being done."""
    over: bool = False

    # --- Clients --------------------------------------------------------------------------------

    async def client(self, number: int) -> None:
        address = self.fleet.gateway_addresses[number % len(GATEWAYS)]
        rng = random.Random(f"{number} {self.rng.random()}")
        count = 0
        async with AsyncClient(address, retry=PATIENT) as client:
            while not self.over:
                count += 1
                one = Seen(
                    f"c{number}-{count}",
                    rng.randrange(len(self.prompts)),
                    rng.randint(8, MAX_TOKENS),
                    None if rng.random() < 0.7 else rng.randrange(2),
                    may_be_cut=rng.random() < 0.1,
                )
                self.seen.append(one)
                await self._read(client, one, rng)

    async def _read(self, client: AsyncClient, one: Seen, rng: random.Random) -> None:
        sampling = {} if one.seed is None else {"temperature": 0.8, "seed": one.seed}
        cancels_after = rng.randint(0, 20) if one.may_be_cut and rng.random() < 0.5 else None
        if one.may_be_cut and cancels_after is None:
            sampling["timeout_s"] = rng.uniform(0.2, 4.0)
        stream = client.stream(
            self.prompts[one.prompt], max_tokens=one.max_tokens, request_id=one.request_id, **sampling
        )
        self.open[one.request_id] = one
        try:
            async for chunk in stream:
                one.acknowledged = True
                one.heard_s.append(time.monotonic())
                if chunk.offset != len(one.tokens):
                    raise AssertionError(
                        f"{one.request_id}: a chunk at {chunk.offset}, not {len(one.tokens)}"
                    )
                one.tokens += chunk.token_ids
                if cancels_after is not None and len(one.tokens) >= cancels_after:
                    cancels_after = None
                    with suppress(LapsError):
                        await client.cancel(one.request_id)
            one.finish_reason, one.acknowledged = stream.result.finish_reason, True
            one.resumptions = stream.result.resumptions
        except LapsError as error:
            if error.status == "DEADLINE_EXCEEDED" and one.may_be_cut:
                return
            one.gave_up = f"{error.status}: {error}"
        finally:
            one.heard_s.append(time.monotonic())
            del self.open[one.request_id]

    # --- Faults ---------------------------------------------------------------------------------

    async def do_faults(self, faults: Iterator[Planned], until_s: float) -> None:
        striking: set[asyncio.Task[None]] = set()
        for planned in faults:
            if time.monotonic() + planned.pause_s > until_s:
                break
            await asyncio.sleep(planned.pause_s)
            if striking and not planned.overlaps:
                await asyncio.wait(striking)
            if time.monotonic() > until_s:
                break
            task = asyncio.create_task(self._strike(planned))
            striking.add(task)
            task.add_done_callback(striking.discard)
        if striking:
            await asyncio.gather(*striking)

    async def _strike(self, planned: Planned) -> None:
        epoch, victim = await self._find(planned)
        self.struck.add(victim)
        fault = Fault(planned.kind, time.monotonic(), planned.lasts_s)
        running = [other for other in self.faults if other.recovered_s is None]
        for other in running:
            other.alone = fault.alone = False
        self.faults.append(fault)
        waiting = list(self.open.values())
        led = None
        if planned.target == "leader" and planned.verb != "cut":
            led = asyncio.create_task(self.fleet.until_led_anew(epoch, GOES_ON_S))
        if planned.verb == "kill":
            self.fleet.kill(victim)
            await asyncio.sleep(planned.lasts_s)
            self.fleet.start_again(victim)
        elif planned.verb == "freeze":
            self.fleet.freeze(victim)
            await asyncio.sleep(planned.lasts_s)
            self.fleet.thaw(victim)
        else:
            links = self.fleet.links_of(victim)
            for link in links:
                link.cut()
            await asyncio.sleep(planned.lasts_s)
            for link in links:
                link.heal(planned.resets)
        self.struck.discard(victim)
        fault.recovered_s = await self._until_all_move(waiting, fault.at_s)
        if led is not None:
            fault.led_anew_s = await led

    async def _find(self, planned: Planned) -> tuple[int, str]:
        """The epoch, and a process of the kind that is planned which runs and to which nothing is done now.
        The store may be away, and nobody lead: until there is one. Raises TimeoutError."""
        async with asyncio.timeout(FOUND_S):
            while True:
                epoch, leader = await self._leader()
                if planned.target in ("leader", "standby"):
                    wanted = [name for name in SCHEDULERS if (name == leader) == (planned.target == "leader")]
                    wanted = wanted if leader else []
                else:
                    wanted = [name for name in self.fleet.names if name.startswith(planned.target)]
                free = [name for name in wanted if name not in self.struck and self.fleet.runs(name)]
                if free:
                    return epoch, free[int(planned.which * len(free))]
                await asyncio.sleep(0.05)

    async def _leader(self) -> tuple[int, str]:
        with suppress(RedisError, OSError):
            return await self.fleet.leader()
        return 0, ""

    async def _until_all_move(self, waiting: list[Seen], since_s: float) -> float:
        """Seconds from the fault until each of these streams has brought something, or has ended."""
        give_up_s = time.monotonic() + GOES_ON_S
        while time.monotonic() < give_up_s:
            if all(one.heard_s and one.heard_s[-1] > since_s for one in waiting):
                break
            await asyncio.sleep(0.02)
        firsts = [next((at for at in one.heard_s if at > since_s), time.monotonic()) for one in waiting]
        return max(firsts, default=since_s) - since_s

    # --- The whole ------------------------------------------------------------------------------

    async def play(self, faults: Iterator[Planned], seconds: float) -> None:
        """Until the faults have an end, or the time has."""
        until_s = time.monotonic() + seconds
        clients = [asyncio.create_task(self.client(number)) for number in range(CLIENTS)]
        show = asyncio.create_task(self._show(until_s))
        try:
            await self.do_faults(faults, until_s)
        finally:
            self.over = True
        done, pending = await asyncio.wait(clients, timeout=DRAIN_S)
        for process in self.fleet.processes.values():
            # A fault of the loop must not hide one of ours.
            if process.crashes:
                raise SystemExit(
                    f"{process.name} ended by itself with {process.crashes}. The end of its log:\n"
                    + process.end_of_log()
                )
        show.cancel()
        for task in pending:
            task.cancel()
        for task in done:
            task.result()
        if pending:
            raise SystemExit(f"{len(pending)} clients did not come to an end in {DRAIN_S:g} s")

    async def _show(self, until_s: float) -> None:
        while True:
            await asyncio.sleep(10.0)
            tokens = sum(len(one.tokens) for one in self.seen)
            left_s = max(0.0, until_s - time.monotonic())
            line = (
                f"{len(self.faults)} faults, {len(self.seen)} requests, {tokens} tokens, {left_s:.0f} s left"
            )
            print(line, file=sys.stderr, flush=True)


def make_reference() -> tuple[list[list[int]], Reference]:
    """The prompts, and what the target makes of them."""
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN_TARGET)
    lines = (Path(BUILT_IN_TARGET).parent / "prompts.jsonl").read_text().splitlines()
    texts = [record["text"] for record in map(json.loads, lines) if "text" in record][:PROMPTS]
    prompts = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    return prompts, Reference(prompts, MAX_TOKENS)


async def run(
    kinds: tuple[str, ...],
    seconds: float,
    seed: int,
    binary: str,
    data_dir: Path,
    prompts: list[list[int]],
    reference: Reference,
) -> tuple[Run, Verdict]:
    """`kinds` empty: what the seed says, for so many seconds."""
    fleet = Fleet(data_dir, binary, slots=4, retention_s=3600.0, max_retained_requests=1_000_000)
    try:
        await fleet.start()
        playing = Run(fleet, random.Random(seed), prompts)
        async with AsyncClient(fleet.gateway_addresses[0], retry=PATIENT) as client:
            await client.generate(prompts[0], max_tokens=2)
        if kinds:
            await playing.play(chosen(kinds, playing.rng), math.inf)
        else:
            await playing.play(plan(playing.rng), seconds)
        store = Store(fleet.store.url, fleet.settings.pool)
        try:
            live = await until_all_have_ended(store, DRAIN_S)
            verdict = await judge(store, playing.seen, reference)
        finally:
            await store.close()
        if live:
            verdict.lost.append(f"{live} requests are still live")
        return playing, verdict
    finally:
        await fleet.close()


def summary(playing: Run, verdict: Verdict) -> dict[str, Any]:
    kinds: dict[str, list[float]] = {}
    led: dict[str, list[float]] = {}
    for fault in playing.faults:
        if fault.alone and fault.recovered_s is not None:
            kinds.setdefault(fault.kind, []).append(fault.recovered_s)
        if fault.led_anew_s is not None and (fault.kind == "kill leader" or fault.lasts_s > 5.0):
            led.setdefault(fault.kind, []).append(fault.led_anew_s)
    done = [fault.kind for fault in playing.faults]
    return {
        "faults": len(done),
        "faults_by_kind": {kind: done.count(kind) for kind in KINDS},
        **{name: value for name, value in asdict(verdict).items() if not isinstance(value, list)},
        "lost": len(verdict.lost),
        "doubled": len(verdict.doubled),
        "different": len(verdict.different),
        "recovery_of_faults_alone": {kind: spread(kinds[kind]) for kind in KINDS if kind in kinds},
        "another_leads_after": {kind: spread(values) for kind, values in sorted(led.items())},
    }


def table(figures: dict[str, Any]) -> str:
    """By kind: faults, those of them that fell together with no other, and their recovery in seconds."""
    lines = [f"{'':16}{'faults':>8}{'alone':>8}{'p50 s':>8}{'p99 s':>8}"]
    for kind, faults in figures["faults_by_kind"].items():
        alone = figures["recovery_of_faults_alone"].get(kind, {"n": 0})
        times = "".join(
            f"{alone[name]:8.1f}" if name in alone else f"{'-':>8}" for name in ("p50_s", "p99_s")
        )
        lines.append(f"{kind:16}{faults:8}{alone['n']:8}{times}")
    return "\n".join(lines)


@click.command()
@click.option("--minutes", type=float, default=5.0, show_default=True, help="With each store.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is done, and when.")
@click.option(
    "--store",
    "stores",
    type=click.Choice(["valkey", "redis"]),
    multiple=True,
    default=["valkey"],
    show_default=True,
)
@click.option(
    "--fault",
    "kinds",
    type=click.Choice(KINDS),
    multiple=True,
    help="These, one after the other, however long they take; no more than these.",
)
@click.option("--keep", type=click.Path(path_type=Path), help="A folder for logs and data, which stay.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures there.")
def main(
    minutes: float,
    seed: int,
    stores: tuple[str, ...],
    kinds: tuple[str, ...],
    keep: Path | None,
    out: Path | None,
) -> None:
    """Kills, freezes and cuts off real processes while clients run, then checks what everybody saw."""
    binaries = {store: valkey_binary() if store == "valkey" else redis_binary() for store in stores}
    prompts, reference = make_reference()
    figures: dict[str, object] = {"minutes": minutes, "seed": seed}
    holds = True
    for store, binary in binaries.items():
        if binary is None:
            raise SystemExit(f"there is no {store}-server on PATH")
        print(f"with {store}: {', '.join(kinds) or f'{minutes:g} min'}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="laps-killloop-") as scratch:
            folder = (keep or Path(scratch)) / store
            playing, verdict = asyncio.run(
                run(kinds, minutes * 60.0, seed, binary, folder, prompts, reference)
            )
        figures[store] = told = summary(playing, verdict)
        print(table(told), file=sys.stderr, flush=True)
        holds = holds and verdict.holds
        for problem in (*verdict.lost, *verdict.doubled, *verdict.different):
            print(problem, file=sys.stderr)
    print(json.dumps(figures, indent=2))
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    end_on_sigterm()
    main()
