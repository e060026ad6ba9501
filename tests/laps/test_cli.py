from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from laps.cli import main, tables
from laps.cli.options import waiting_told
from laps.client import queries
from laps.errors import InvalidArgument, Unavailable
from laps.v1 import queue_pb2

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def gateway(serve: Any, script: Any) -> Callable[..., Any]:
    """A fake gateway in a thread of its own, for the command line's blocking calls."""

    @contextmanager
    def start(**played: Any) -> Iterator[Any]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        context = serve(script(**played))
        try:
            yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(60)
        finally:
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    return start


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from laps.cli import main; main(['--help']); "
        "heavy = {'grpc', 'torch', 'pydantic', 'rich', 'structlog'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "import time; print('cpu_s', time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
    # Of the processor, as a busy machine takes its time. For a person the bound is 0.4 s.
    assert float(done.stdout.split()[-1]) < 2


def test_every_command_of_this_package_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    from laps.cli import _COMMANDS

    for name, (target, _) in _COMMANDS.items():
        if target.startswith("laps."):
            assert main([name, "--help"]) == 0
            assert "Usage: laps " + name in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("laps ")


@pytest.mark.parametrize("wrong", [["nonsense"], ["generate"], ["queue", "--head", "x"], ["cancel"]])
def test_wrong_usage_exits_with_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert "Error: " in capsys.readouterr().err


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["queue", "--server", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("laps: there is no connection to 127.0.0.1:1 (Connection refused); is a gateway")
    assert error.count("\n") == 1


def test_a_bad_setting_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--port", "x"]) == 1
    assert capsys.readouterr().err.startswith("laps: port: ")


def test_generate_streams_text_and_sums_up_on_stderr(
    gateway: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with gateway(breaks=[(2, "status")]) as served:
        assert main(["generate", "hello", "--server", served.address, "--seed", "3", "--stop", "x"]) == 0
    out, err = capsys.readouterr()
    assert out == "one two three four\n"
    assert "stop, 4 tokens" in err
    assert "resumed 1 times" in err
    request = served.calls[0][1]
    assert (request.text, request.sampling.seed, list(request.stopping.stop)) == ("hello", 3, ["x"])
    assert not request.sampling.HasField("temperature")


def test_generate_takes_penalties_and_biases(gateway: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--frequency-penalty", "0.5", "--presence-penalty", "-1", "--logit-bias", "5=-100"]
    with gateway() as served:
        command = ["generate", "hello", "--server", served.address]
        assert main([*command, *options, "--logit-bias", "7=0.5"]) == 0
        assert main([*command, "--logit-bias", "the"]) == 2
    assert "'the' is not TOKEN=BIAS" in capsys.readouterr().err
    sampling = served.calls[0][1].sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1.0)
    assert dict(sampling.logit_bias) == {5: -100.0, 7: 0.5}


def test_generate_json(gateway: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with gateway() as served:
        assert main(["generate", "hi", "--json", "--server", served.address, "--request-id", "r7"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["request_id"] == "r7"
    assert answer["text"] == "one two three four"
    assert answer["token_ids"] == [0, 1, 2, 3]
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["speculation"]["acceptance_histogram"] == [0, 0, 2]


def give(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """On standard input, as it is where the locale says little."""
    stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)


def test_generate_takes_the_prompt_from_standard_input(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, "häßlich\r\nlong".encode())
    with gateway() as served:
        assert main(["generate", "-", "--server", served.address]) == 0
    assert served.calls[0][1].text == "häßlich\nlong"


def test_standard_input_that_is_no_text_is_refused(
    gateway: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(monkeypatch, b"abc\xff\xfe\n")
    with gateway() as served:
        assert main(["generate", "-", "--server", served.address]) == 1
    assert capsys.readouterr().err == "laps: standard input is not valid UTF-8 at byte 3\n"
    assert not served.calls


def test_generate_chat_sends_messages(gateway: Any) -> None:
    with gateway() as served:
        assert main(["generate", "hi", "--chat", "--temperature", "0", "--server", served.address]) == 0
    request = served.calls[0][1]
    assert [(m.role, m.content) for m in request.messages.messages] == [("user", "hi")]
    assert request.sampling.HasField("temperature")


def test_what_the_server_refuses_is_one_line(gateway: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with gateway(error=InvalidArgument("sampling.top_p", "must be in (0, 1]")) as served:
        assert main(["generate", "hi", "--top-p", "7", "--server", served.address]) == 1
    assert capsys.readouterr().err == "laps: sampling.top_p: must be in (0, 1]\n"


def test_what_cannot_be_sent_is_one_line(gateway: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with gateway() as served:
        assert main(["generate", "hi", "--seed", "-1", "--server", served.address]) == 1
        assert main(["generate", "\udcff", "--server", served.address]) == 1
        for time_s in ("nan", "inf", "1e300"):
            assert main(["generate", "hi", "--timeout-s", time_s, "--server", served.address]) == 1
    assert not served.calls
    seed, text, *times = capsys.readouterr().err.splitlines()
    assert seed == f"laps: sampling.seed: -1 cannot be sent: it must be between 0 and {(1 << 64) - 1}"
    assert text.startswith("laps: text: ")
    assert times[0] == "laps: timeout: nan cannot be sent: it must be seconds, 315576000000 at most"
    assert all(line.endswith(times[0].partition("nan")[2]) for line in times)
    assert len(times) == 3


def test_a_timeout_of_many_centuries_is_none_that_has_passed(gateway: Any) -> None:
    with gateway() as served:
        assert main(["generate", "hi", "--timeout-s", "2e11", "--server", served.address]) == 0
    assert served.calls[0][1].timeout.seconds == 2 * 10**11


def test_a_demonstration_without_workers_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--workers", "0"]) == 1
    needs = "laps: workers: the demonstration needs at least one, not 0 (from flag --workers)\n"
    assert capsys.readouterr().err == needs


def test_a_request_that_failed_exits_with_1(gateway: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with gateway(finish_reason=5) as served:
        assert main(["generate", "hi", "--server", served.address]) == 1


@pytest.mark.parametrize(
    ("command", "key", "shown"),
    [
        (["queue"], "pools", "laps-sd"),
        (["workers"], "workers", "w0"),
        (["models"], "models", "tiny"),
        (["request", "r1"], "request", "acceptance_estimate"),
        (["cancel", "r1"], "state", "r1: finished"),
    ],
)
def test_inspecting_commands(
    command: list[str], key: str, shown: str, gateway: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with gateway() as served:
        assert main([*command, "--server", served.address]) == 0
        assert shown in capsys.readouterr().out
        assert main([*command, "--json", "--server", served.address]) == 0
        assert key in json.loads(capsys.readouterr().out)


def test_request_output(gateway: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with gateway() as served:
        assert main(["request", "r1", "--output", "--json", "--server", served.address]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["completion"]["finish_reason"]) == ("one two three four", "stop")


def test_an_unknown_request_is_one_line(gateway: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with gateway() as served:
        assert main(["request", "unknown", "--server", served.address]) == 1
    assert capsys.readouterr().err == "laps: there is no request 'unknown'\n"


def test_top(gateway: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with gateway() as served:
        # Each of the fake's streams has two pictures: the third needs another connection.
        assert main(["top", "--json", "--count", "3", "--server", served.address]) == 0
        pictures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [picture["time_s"] for picture in pictures] == [0, 1, 0]
        assert pictures[0]["running"][0]["request_id"] == "r1"
        assert main(["top", "--count", "1", "--waiting", "3", "--server", served.address]) == 0
        assert served.calls[-1][1].head_limit == 3
    out = capsys.readouterr().out
    assert "w0" in out
    assert "50%" in out


def test_top_tells_who_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    def waits(name: str, level: int, priority: int = 0, rank: float = 1.0) -> queue_pb2.RequestInfo:
        return queue_pb2.RequestInfo(
            request_id=name, level=level, priority=priority, rank=rank, preempted_because=f"why {name} waits"
        )

    levels = [
        queue_pb2.QueueLevel(level=0, waiting=2, head=[waits("second", 0), waits("third", 0)]),
        queue_pb2.QueueLevel(
            level=1, waiting=2, head=[waits("first", 1, priority=2, rank=-1e15), waits("no", 1)]
        ),
    ]
    picture = queue_pb2.WatchResponse(pools=[queue_pb2.PoolQueues(pool="p", waiting=4, levels=levels)])
    tables.show(tables.picture(queries.snapshot(picture), 3))
    rows = [line.split() for line in capsys.readouterr().out.split("next ")[1].splitlines()[1:]]
    assert [row[0] for row in rows] == ["first", "second", "third"]
    assert rows[0][2] == "overdue"
    assert "why first waits" in " ".join(rows[0])


@pytest.mark.parametrize(("width", "bars"), [(80, False), (120, True)])
def test_top_fits_the_terminal(width: int, bars: bool) -> None:
    """Numbers are never cut; of the ids, which may be long, only the end."""
    running = queue_pb2.RequestInfo(
        request_id="f" * 32, output_tokens=1234, max_tokens=4096, num_steps=400, num_draft_tokens=1600,
        num_accepted_tokens=834, perceived_service_s=12.34, leased_s=1.0,
    )  # fmt: skip
    slot = queue_pb2.SlotInfo(slot=15, request_id=running.request_id)
    worker = queue_pb2.WorkerInfo(worker_id="worker-0", slots=[slot, queue_pb2.SlotInfo(slot=16)])
    picture = queue_pb2.WatchResponse(time_s=124.4, workers=[worker], running=[running])
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(tables.picture(queries.snapshot(picture), width=console.width))
    _, taken, free = out.getvalue().splitlines()
    for text in ("worker-0", "15", "ffffffff", "1234/4096", "52%", "3.08", "12.34 s", "123.4 s"):
        assert text in taken
    assert ("█" in taken) == bars
    assert "free" in free


def test_config_shows_values_and_origins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAPS_REDIS_URL", "redis://me:hidden@host")
    monkeypatch.setenv("LAPS_PROT", "1")
    Path("laps.toml").write_text("slots = 2\n")
    assert main(["config", "--port", "7", "--json"]) == 0
    out, err = capsys.readouterr()
    by_name = {row["name"]: row for row in json.loads(out)}
    assert (by_name["port"]["value"], by_name["port"]["source"]) == (7, "flag")
    assert (by_name["slots"]["value"], by_name["slots"]["origin"]) == (2, "laps.toml")
    assert by_name["redis_url"]["value"] == "redis://me:***@host"
    assert by_name["pool"]["source"] == "default"
    assert "LAPS_PROT" in err
    assert main(["config", "--port", "7"]) == 0
    out = capsys.readouterr().out
    assert "hidden" not in out
    assert any(line.split() == ["port", "7", "flag", "--port"] for line in out.splitlines())


def test_a_command_that_goes_on_trying_says_so_after_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 100.0
    tell = waiting_told(lambda: now_s)

    def outage(waits_s: list[float]) -> str:
        nonlocal now_s
        for wait_s in waits_s:
            tell(Unavailable("no leader"), wait_s)
            now_s += wait_s
        return capsys.readouterr().err

    assert outage([0.1, 0.2, 0.4, 0.8]) == ""
    assert outage([1.6, 3.2]) == "still trying, no leader\n"
    assert outage([5.0, 5.0, 5.0]) == "still trying, no leader\n"
    now_s += 60.0
    assert outage([0.1, 0.2]) == "", "another outage, and a short one"


SERVES_AND_PRINTS = """
import asyncio, pathlib, subprocess, sys
import click
from laps import cli

@click.command()
def run():
    import uvloop

    async def main():
        print("nobody reads this")
        print("nor this", file=sys.stderr)
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        server.close()
        await server.wait_closed()
        child = await asyncio.create_subprocess_exec("cat")
        assert await child.wait() == 0

    uvloop.run(main())
    pathlib.Path(sys.argv[1]).write_text(sys.stdin.read() + "ended")

cli.cli.add_command(run)
cli._COMMANDS["run"] = ("__main__:run", "")
sys.exit(cli.main(["run"]))
"""


@pytest.mark.parametrize("closed", ["<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed: str, tmp_path: Path) -> None:
    """As some start their services."""
    told = tmp_path / "told"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", SERVES_AND_PRINTS, str(told)]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert told.read_text() == "ended"


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """In rich's markup they would be styles, or mistakes."""
    table = tables._table("model", "folder")
    table.add_row("a [bold]name :smile:", "/data/[llama]/[/old]")
    tables.show(table)
    shown = capsys.readouterr().out
    assert "a [bold]name :smile:" in shown
    assert "/data/[llama]/[/old]" in shown


def test_clients_settings_are_flags(gateway: Any, tmp_path: Path) -> None:
    with gateway() as served:
        file = tmp_path / "laps.toml"
        file.write_text(f'server = "{served.address}"')
        assert main(["models", "--config", str(file), "--api-key", "laps_key"]) == 0
        assert main(["models", "--server", served.address, "--tls-ca", str(tmp_path / "none")]) == 1
