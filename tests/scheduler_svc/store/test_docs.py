"""docs/redis.md says what is there, and its command lines work."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import redis

from scheduler_svc.core.records import (
    Append,
    Commit,
    Event,
    FinishReason,
    QueueMove,
    RequestState,
    StepCosts,
    Worker,
)
from scheduler_svc.store import errors, keys, layout, library
from scheduler_svc.store.server import LocalServer
from scheduler_svc.store.store import Store

ROOT = Path(__file__).parents[3]
DOC = (ROOT / "docs" / "redis.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("redis-cli")
]


def key_patterns() -> set[str]:
    """Names of all keys as people write them, from keys.py."""
    words = {"level": "LEVEL", "worker_id": "WORKER", "request_id": "REQUEST"}
    patterns = set()
    for name, function in inspect.getmembers(keys, inspect.isfunction):
        if name != "prefix":
            arguments = [words[parameter] for parameter in list(inspect.signature(function).parameters)[1:]]
            patterns.add(function("POOL", *arguments).removeprefix("laps:{POOL}:"))
    return patterns


def test_every_key_is_told():
    section = DOC.split("## Keys", 1)[1].split("**", 1)[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) == key_patterns()


def test_the_functions_tell_the_same_keys():
    head = library.source("functions.lua").split("--[[", 1)[1].split("]]", 1)[0]
    told = re.findall(r"^  (\S+)\s+(?:hash|string|stream|sorted set) ", head, re.MULTILINE)
    assert set(told) == key_patterns()


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("request:REQUEST", layout.REQUEST_FIELDS),
        ("worker:WORKER", layout.WORKER_FIELDS),
        ("meta", layout.META_FIELDS),
        ("leader", layout.LEADER_FIELDS),
        ("stopped", layout.STOPPED_FIELDS),
    ],
)
def test_every_field_is_told(heading, fields):
    section = DOC.split(f"### `{heading}`", 1)[1].split("\n#", 1)[0]
    told = re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, re.MULTILINE)
    assert told == [(field.name, field.meaning) for field in fields]


@pytest.mark.parametrize(("key", "fields"), [("meta", layout.META_FIELDS), ("leader", layout.LEADER_FIELDS)])
def test_the_functions_tell_the_same_fields(key, fields):
    head = library.source("functions.lua").split("--[[", 1)[1].split("]]", 1)[0]
    (told,) = re.findall(rf"^  {key} +hash +(.+)$", head, re.MULTILINE)
    assert told.split(", ") == [field.name for field in fields]


def test_every_code_of_a_refusal_has_an_exception_and_is_told():
    codes = set(re.findall(r"refuse\('([A-Z_]+)'", library.source("functions.lua")))
    assert codes <= set(errors.BY_CODE)
    assert codes <= set(re.findall(r"`([A-Z_]+)`", DOC))


@pytest.fixture(scope="module")
def filled(binary, tmp_path_factory):
    """A server with a pool `default` in which everything occurs."""
    with LocalServer(binary=binary, data_dir=tmp_path_factory.mktemp("docs")) as server:
        yield server


@pytest.fixture
async def pool_default(filled, make_request, tokens):
    store = Store(filled.url, "default")
    await store.load_functions()
    if (await store.lead("a", "127.0.0.1:50052", 600.0)).epoch == 1:
        now_s = time.time()
        waiting, running, ended = make_request(1), make_request(2), make_request(3)
        worker = Worker("w-1", 2, StepCosts(0.001, 0.02), device="cpu")
        await store.describe("laps-sd", [0.5])
        await store.commit(
            store.encode(
                Commit(
                    submitted=[waiting, running, ended],
                    moves=[QueueMove("req-1", 0, 1.5)],
                    workers=[(worker, now_s + 600)],
                    appended=[Append("req-1", 1, 0, tokens(7))],
                    events=[Event("accepted", "req-1")],
                    learnt={"prior": "2.1"},
                ),
                now_s,
            )
        )
        ended.state, ended.finish_reason, ended.finished_s = (
            RequestState.FINISHED,
            FinishReason.STOP,
            now_s,
        )
        await store.commit(store.encode(Commit(finished=[ended]), now_s))
    # Every line is asked about one request, so that one waits and runs at once here.
    await store.commit(store.encode(Commit(leased=[("req-1", time.time() + 600)]), time.time()))
    await store.close()
    return filled


def answer_of(server: LocalServer, line: str) -> str:
    line = line.replace("REQUEST", "req-1").replace("WORKER", "w-1")
    words = shlex.split(line)
    if shutil.which("redis-cli"):
        command = ["redis-cli", "-u", server.url, *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout.strip()
    with redis.Redis.from_url(server.url, decode_responses=True, protocol=2) as client:
        # Replies as they are: without the client's own ideas about them.
        client.response_callbacks.clear()
        return str(client.execute_command(*words[1:]))


async def test_every_command_line_works(pool_default):
    assert len(LINES) > 25
    for line in LINES:
        answer = answer_of(pool_default, line)
        assert answer, line
        assert answer not in ("(nil)", "[]", "None"), line
        assert not re.match(r"\(?(ERR|error|WRONGTYPE|NOSCRIPT)", answer), (line, answer)


async def test_answers_are_what_the_questions_are_about(pool_default):
    assert answer_of(pool_default, LINES[0]) == "1"
    assert "req-1" in answer_of(pool_default, LINES[1])
    assert "laps_inspection" in answer_of(pool_default, "redis-cli FUNCTION LIST")
    assert "always" in answer_of(pool_default, "redis-cli CONFIG GET appendfsync")
