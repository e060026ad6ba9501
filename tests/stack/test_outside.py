"""The stack as people meet it: grpcurl, Redis, bad input, the command line, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis

from laps.client import AsyncClient
from laps.errors import AlreadyExists, InvalidArgument, NotFound
from laps.settings import Settings
from laps.stack import Stack
from tests.stack.conftest import SharedStack, StartStack, until_held, until_running

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

BIN = Path(sys.executable).parent


async def run(*command: str, stdin: str = "") -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(stdin.encode())
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.asyncio(loop_scope="session")
async def test_an_independent_client_by_reflection(shared_stack: SharedStack) -> None:
    grpcurl = shutil.which("grpcurl", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert grpcurl is not None
    stack, _ = shared_stack
    address = stack.gateway_address
    listed = await run(grpcurl, "-plaintext", address, "list")
    assert {"laps.v1.InferenceService", "laps.v1.QueueService"} <= set(listed.split())
    body = {"text": "def add(a, b):", "stopping": {"maxTokens": 12}}
    call = (grpcurl, "-plaintext", "-d", json.dumps(body), address, "laps.v1.InferenceService/Generate")
    output = await run(*call)
    assert '"completion_tokens": 12' in output or "FINISH_REASON_STOP" in output
    models = await run(grpcurl, "-plaintext", address, "laps.v1.InferenceService/ListModels")
    assert json.loads(models)["models"][0]["name"] == "tiny"


async def test_what_redis_shows_is_what_laps_queue_shows(start_stack: StartStack, prompts: list[str]) -> None:
    """With the worker frozen the queue stands still, so that two readings can be compared."""
    async with start_stack(workers=1, slots=2, patient=True) as (stack, client):
        worker = stack.children["worker-0"]
        worker.signal(signal.SIGSTOP)
        # So many tokens that the last of them still waits when the first have tokens, whoever is slow.
        asked = {"max_tokens": 1500, "ignore_eos": True}
        burst = [asyncio.ensure_future(client.generate(text, **asked)) for text in prompts[:12]]
        await until_held(client, 12, running=2)
        worker.signal(signal.SIGCONT)
        async for snapshot in client.watch(interval_s=0.05):
            if all(request.output_tokens for request in snapshot.running):
                break
        worker.signal(signal.SIGSTOP)
        database = redis.Redis.from_url(stack.redis_url, decode_responses=True)
        # What it had sent before is still on its way: until the scheduler and the store say the same, and
        # go on saying it.
        seen, commits = -2, -1
        async with asyncio.timeout(60):
            while seen != commits:
                pool = (await client.queues(head_limit=100))[0]
                prefix = f"laps:{{{pool.pool}}}"
                await asyncio.sleep(0.5)
                seen, commits = pool.commit_seq, int(database.hget(f"{prefix}:meta", "commit_seq"))
        for level in pool.levels:
            stored = database.zrange(f"{prefix}:queue:{level.level}", 0, -1)
            assert stored == [request.request_id for request in level.head]
            assert len(stored) == level.waiting
        running = await client.requests("running")
        # One more for each of the two slots whose request was preempted, but not let go by the frozen worker.
        assert 2 <= len(running) <= 4
        assert pool.waiting
        assert {request.request_id for request in running} == set(database.zrange(f"{prefix}:leases", 0, -1))
        for request in running:
            fields = database.hgetall(f"{prefix}:request:{request.request_id}")
            assert fields["state"] == "running"
            assert int(fields["output_tokens"]) == request.output_tokens
            entries = database.xrange(f"{prefix}:tokens:{request.request_id}")
            assert sum(len(entry["tokens"].split()) for _, entry in entries) == request.output_tokens
        for task in burst:
            task.cancel()
        worker.signal(signal.SIGCONT)
        await asyncio.gather(*burst, return_exceptions=True)


@pytest.mark.asyncio(loop_scope="session")
async def test_bad_input_is_refused_by_name_and_nothing_is_lost(shared_stack: SharedStack) -> None:
    stack, client = shared_stack
    for options, field in (
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"max_tokens": 0}, "stopping.max_tokens"),
        ({"max_tokens": 100_000}, "stopping.max_tokens"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await client.generate("x", **options)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(InvalidArgument) as caught:
        await client.generate([10**6], max_tokens=1)
    assert "2048" in str(caught.value)
    with pytest.raises(InvalidArgument, match="2047"):
        await client.generate([5] * 5000, max_tokens=1)
    with pytest.raises(NotFound):
        await client.generate("x", model="nobody-has-this")
    first = await client.generate("x = ", max_tokens=4, request_id="twice")
    joined = await client.generate("x = ", max_tokens=4, request_id="twice")
    assert joined.token_ids == first.token_ids
    with pytest.raises(AlreadyExists):
        await client.generate("y = ", max_tokens=4, request_id="twice")
    await check_deadline(stack, client)
    await check_cancel(stack, client)


async def check_deadline(stack: Stack, client: AsyncClient) -> None:
    """It cannot be over before: the worker is frozen until then."""
    stack.children["worker-0"].signal(signal.SIGSTOP)
    late = await client.generate("x", max_tokens=1500, ignore_eos=True, timeout_s=2.0)
    stack.children["worker-0"].signal(signal.SIGCONT)
    assert late.finish_reason == "deadline"


async def check_cancel(stack: Stack, client: AsyncClient) -> None:
    """Before it can be over: the worker is frozen."""
    stack.children["worker-0"].signal(signal.SIGSTOP)
    stream = client.stream("def f(", max_tokens=1500, ignore_eos=True, request_id="to-cancel")
    reading = asyncio.create_task(stream.finish())
    await until_running(client, "to-cancel")
    await client.cancel("to-cancel")
    stack.children["worker-0"].signal(signal.SIGCONT)
    completion = await reading
    assert completion.finish_reason == "cancelled"
    assert (await client.get("to-cancel")).request.state == "finished"


@pytest.mark.asyncio(loop_scope="session")
async def test_a_request_id_goes_through_all_logs_and_prompts_through_none(shared_stack: SharedStack) -> None:
    stack, client = shared_stack
    prompt = "xylophone_quartz = "
    await client.generate(prompt, max_tokens=3, request_id="to-be-logged")
    for service in ("gateway", "scheduler", "worker-0"):
        path = stack.children[service].log_path
        await asyncio.to_thread(wait_for_text, path, '"request_id": "to-be-logged"')
        assert "xylophone" not in path.read_text()


def test_a_worker_without_a_model_says_so() -> None:
    environment = os.environ | {"LAPS_TARGET": "/nowhere/model", "LAPS_LOG_LEVEL": "error"}
    ended = subprocess.run(
        [BIN / "laps", "worker"], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode != 0
    assert "/nowhere/model" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_scheduler_without_its_store_says_so_and_waits(tmp_path: Path) -> None:
    environment = os.environ | {"LAPS_REDIS_URL": "redis://127.0.0.1:1/0", "LAPS_SCHEDULER_PORT": "0"}
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([BIN / "laps", "scheduler"], env=environment, stderr=log)
        try:
            wait_for_text(tmp_path / "log", "store not reachable")
            assert process.poll() is None
        finally:
            process.terminate()
            assert process.wait(90) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def wait_for_text(path: Path, text: str) -> None:
    """Until the file has the text; pytest's timeout bounds it."""
    process = subprocess.Popen(
        ["tail", "-n", "+1", "-F", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            break
    process.kill()
    process.wait()


@pytest.mark.parametrize("how", [None, signal.SIGINT])
def test_the_demonstration_leaves_nothing_behind(tmp_path: Path, how: signal.Signals | None) -> None:
    """Wherever somebody is who runs it: in a folder with files named as packages are, behind a proxy."""
    temporary, folder = tmp_path / "temporary", tmp_path / "folder"
    for path in (temporary, folder):
        path.mkdir()
    (folder / "redis.py").write_text("raise SystemExit('somebody else's redis.py')\n")
    environment = os.environ | {
        "TMPDIR": str(temporary),
        "COLUMNS": "120",
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
        "NO_PROXY": "",
    }
    if how is not None:
        environment["LAPS_WORKERS"] = "1"
    # Set by torch in a process that has imported it, such as this one after other tests.
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    process = subprocess.Popen(
        [BIN / "laps", "demo"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    children: list[psutil.Process] = []
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "in slots" in line and not children:
            children = psutil.Process(process.pid).children(recursive=True)
            if how is not None:
                process.send_signal(how)
    output = "".join(lines)
    code = process.wait()
    assert len(children) >= (5 if how is None else 4), output
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert list(temporary.iterdir()) == []
    assert [path.name for path in folder.iterdir()] == ["redis.py"]
    if how is not None:
        assert code == 130
        return
    assert code == 0, output
    for expected in ("latency", "time to first token", "tokens/s", "acceptance", "preemptions"):
        assert expected in output
    assert re.search(r"\b42 requests", output)


async def test_two_stacks_on_one_folder_are_refused(start_stack: StartStack) -> None:
    async with start_stack(workers=0) as (stack, _):
        second = Stack(Settings(data_dir=stack.settings.data_dir, workers=0), any_ports=True)
        with pytest.raises(Exception, match="used by another"):
            await second.start()
