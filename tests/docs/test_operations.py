"""The lines of docs/operations.md about backup and restore, on a real Redis, in the order of the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from laps.history import HistoryPoint
from scheduler_svc.core.records import Commit, Request, RequestSpec
from scheduler_svc.store import keys
from scheduler_svc.store.server import LocalServer, redis_binary
from scheduler_svc.store.store import Store

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    section = PAGE.split("\n## Backup and restore of the store\n", 1)[1].split("\n## ", 1)[0]
    return [textwrap.dedent(each) for each in re.findall(r"^ *```sh\n(.*?)^ *```$", section, re.M | re.S)]


@pytest.fixture
def server(tmp_path: Path) -> LocalServer:
    binary = redis_binary()
    if binary is None or shutil.which("redis-cli") is None:
        pytest.skip("no redis-server and redis-cli on PATH")
    return LocalServer(binary=binary, data_dir=tmp_path / "store")


async def test_backup_restore_and_resume(server: LocalServer, tmp_path: Path) -> None:
    back_up, put_back, ask, resume = blocks()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "laps").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m laps.cli "$@"\n')
    (programs / "laps").chmod(0o755)

    def run(lines: str) -> str:
        variables = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "STORE": str(server.data_dir),
            "LAPS_REDIS_URL": server.url,
        }
        done = subprocess.run(
            ["sh", "-euc", lines], env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with server:
        store = Store(server.url, "default")
        await store.load_functions()
        await store.lead("a", "127.0.0.1:50052", 600.0)
        await submit(store, "kept")
        run(back_up)
        seen = HistoryPoint(1, 1, await submit(store, "lost"))
        assert "not stopped; a leads" in run(ask)

        await store.close()
        server.kill()
        run(put_back)
        server.start()
        assert "not stopped" in run(ask), "nobody has missed anything yet"
        # As a leader does that knows of the lost commit.
        store = Store(server.url, "default")
        await store.stop_pool("a", "HISTORY_WENT_BACK", seen)
        assert "STOPPED" in run(ask)
        assert "lost     at least 1 commits" in run(ask)
        assert "resumed, timeline 2" in run(resume)
        there = store.reader.redis
        assert await there.exists(keys.request("default", "kept")) == 1
        assert await there.exists(keys.request("default", "lost")) == 0
        await store.close()


async def submit(store: Store, name: str) -> int:
    """Returns the number of the commit."""
    request = Request(RequestSpec(request_id=name, prompt=b"\1\0\0\0", max_tokens=8), arrival_s=1.0)
    await store.commit(store.encode(Commit(submitted=[request]), 1.0))
    return int(await store.reader.redis.hget(keys.meta("default"), "commit_seq"))
