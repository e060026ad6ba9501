"""How much one gateway holds: thousands of streams, a real gateway process, a scheduler that only delivers.

    python bench/streams.py [--seconds 10] [--streams 2000] [--processes 2] [--json OUT]

Beside it, in turns, the bare limit: grpc.aio streams on which nothing is done but to send
(`_bare_streams.py`).
The delay of a token is counted from the delivery's making in the scheduler to the client's reading, so it
holds both hops and the client's own time. `--tree` runs the gateway of another working tree.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _fake_scheduler import DIGIT_BITS
from _processes import BENCH, Process, end_on_sigterm, measured_cpu, wait_for

from gateway.tokenizer import load_tokenizer
from laps.ports import free_ports
from laps.settings import BUILT_IN_TARGET, Settings

STEP_RATE = 10_000.0
"""Messages per second that one process should hold; delays are told at half of it."""
OVERLOAD = 40_000.0
"""Rows offered to find out how many messages it sends at most; what is late is sent together."""
DEAF_STREAMS = 100
LISTENING = '"event": "scheduler connected"'


def plain_tokens() -> list[int]:
    """Tokens whose text is one ASCII character, so that nothing is held back."""
    tokenizer = load_tokenizer(BUILT_IN_TARGET)
    plain = []
    for token in range(tokenizer.vocabulary_size):
        text = tokenizer.decoder().push(token)
        if len(text) == 1 and text.isascii():
            plain.append(token)
    return plain[: 1 << DIGIT_BITS]


@contextmanager
def bed(folder: Path, tree: Path, processes: int) -> Iterator[tuple[list[Process], Process, Process]]:
    """Gateways on one port, the scheduler, the clients."""
    folder.mkdir()
    port, scheduler_port = free_ports(2, "127.0.0.1")
    alphabet = json.dumps(plain_tokens())
    started: list[Process] = []

    def start(name: str, argv: list[str], **options: Any) -> Process:
        process = Process(argv, (folder / f"{name}.log").open("ab"), **options)
        started.append(process)
        return process

    try:
        scheduler = start(
            "scheduler", [str(BENCH / "_fake_scheduler.py"), str(scheduler_port), alphabet], talks=True
        )
        gateways = []
        for number in range(processes):
            settings = Settings(
                port=port,
                scheduler_address=f"127.0.0.1:{scheduler_port}",
                max_streams=10_000,
                log_level="info",
            )
            env = settings.to_env() | {"PYTHONPATH": str(tree)}
            if processes > 1:
                env["LAPS_SHARE_PORT"] = "true"
            # The working folder too: `-m` looks there first.
            gateways.append(start(f"gateway-{number}", ["-m", "laps.cli", "gateway"], env=env, cwd=tree))
            wait_for(folder / f"gateway-{number}.log", LISTENING, gateways[-1])
        clients = start("clients", [str(BENCH / "_clients.py"), str(port), alphabet], talks=True)
        yield gateways, scheduler, clients
    finally:
        for process in started:
            process.kill()


@contextmanager
def bare_bed(folder: Path) -> Iterator[tuple[Process, Process]]:
    """The bare limit and its clients."""
    folder.mkdir()
    (port,) = free_ports(1, "127.0.0.1")
    alphabet = json.dumps(plain_tokens())
    log = folder / "bare.log"
    started: list[Process] = []
    try:
        bare = Process([str(BENCH / "_bare_streams.py"), str(port), alphabet], log.open("ab"), talks=True)
        started.append(bare)
        # It sends nothing yet: that it answers says that it listens.
        bare.ask("run", seconds=0.0, rows_per_s=0.0)
        clients = Process([str(BENCH / "_clients.py"), str(port), alphabet], log.open("ab"), talks=True)
        started.append(clients)
        yield bare, clients
    finally:
        for process in started:
            process.kill()


def measure(
    gateways: list[Process], scheduler: Process, clients: Process, rows_per_s: float, seconds: float
) -> dict[str, Any]:
    scheduler.tell("run", seconds=seconds + 1.0, rows_per_s=rows_per_s)
    processes = {f"gateway-{number}": gateway.usage for number, gateway in enumerate(gateways)}
    processes["clients"] = clients.usage
    with measured_cpu(processes) as cpu_s:
        answer = clients.ask("count", seconds=seconds)
    answer |= scheduler.answer()
    spent_s = sum(cpu_s[f"gateway-{number}"] for number in range(len(gateways)))
    answer["gateway_us_per_message"] = round(spent_s / max(1.0, answer["messages_per_s"] * seconds) * 1e6, 1)
    for name, used_s in cpu_s.items():
        answer[f"{name}_cores"] = round(used_s / seconds, 3)
    return answer


def run(folder: Path, tree: Path, streams: int, seconds: float, processes: int) -> dict[str, Any]:
    result: dict[str, Any] = {"streams": streams}
    with (
        bed(folder / "one", tree, 1) as (gateways, scheduler, clients),
        bare_bed(folder / "bare") as (bare, bare_clients),
    ):
        for each in (clients, bare_clients):
            each.ask("open", streams=streams)
        measure(gateways, scheduler, clients, STEP_RATE / 2, 2.0)
        measure([bare], bare, bare_clients, STEP_RATE / 2, 2.0)
        result["half"] = measure(gateways, scheduler, clients, STEP_RATE / 2, seconds)
        result["half_bare"] = measure([bare], bare, bare_clients, STEP_RATE / 2, seconds)
        result["most"] = measure(gateways, scheduler, clients, OVERLOAD, seconds)
        result["most_bare"] = measure([bare], bare, bare_clients, OVERLOAD, seconds)
        # What was late has gone out before the next part begins.
        measure(gateways, scheduler, clients, STEP_RATE / 2, 2.0)
        # They read nothing at all. What the others get must not change.
        clients.ask("open", streams=DEAF_STREAMS, deaf=True)
        share = (streams + DEAF_STREAMS) / streams
        result["half_beside_deaf"] = measure(gateways, scheduler, clients, STEP_RATE / 2 * share, seconds)
    for part in ("half", "most"):
        ours, bare_limit = (result[name]["gateway_us_per_message"] for name in (part, f"{part}_bare"))
        result[part]["times_bare_cpu"] = round(ours / bare_limit, 2)
    if processes > 1:
        with bed(folder / "several", tree, processes) as (gateways, scheduler, clients):
            clients.ask("open", streams=streams)
            measure(gateways, scheduler, clients, STEP_RATE / 2, 2.0)
            result[f"most_of_{processes}_processes"] = measure(
                gateways, scheduler, clients, OVERLOAD, seconds
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2, help="gateways on one port in the last part")
    parser.add_argument("--tree", type=Path, default=BENCH.parent, help="working tree of the gateway")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="laps-bench-") as name:
        result = run(
            Path(name), arguments.tree.resolve(), arguments.streams, arguments.seconds, arguments.processes
        )
    for part, figures in result.items():
        print(f"{part}: {json.dumps(figures)}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    end_on_sigterm()
    main()
