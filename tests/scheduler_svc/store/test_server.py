"""The server process that we start ourselves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import redis

from scheduler_svc.store.errors import StoreError, StoreUnavailable
from scheduler_svc.store.server import LocalServer, ServerFailed
from scheduler_svc.store.store import Store


def test_data_outlive_a_stop(binary, tmp_path):
    server = LocalServer(binary=binary, data_dir=tmp_path)
    with server:
        redis.Redis.from_url(server.url).set("a", "b")
    assert server.pid == 0
    with server:
        assert redis.Redis.from_url(server.url).get("a") == b"b"


def test_without_a_folder_nothing_is_left(binary):
    with LocalServer(binary=binary) as server:
        folder, process = server.data_dir, psutil.Process(server.pid)
        assert folder.exists()
    assert not folder.exists()
    assert not process.is_running()


def test_a_taken_port_is_told(binary, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = LocalServer(binary=binary, port=port, data_dir=tmp_path)
        with pytest.raises(ServerFailed, match=str(port)):
            server.start()
        assert server.pid == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it only on Linux")
def test_the_server_ends_with_a_parent_that_is_killed(binary):
    code = (
        "import sys, time\n"
        "from scheduler_svc.store.server import LocalServer\n"
        "server = LocalServer(binary=sys.argv[1])\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, binary], stdout=subprocess.PIPE, text=True)
    process = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    process.wait(60)
    assert not process.is_running()


@pytest.mark.parametrize(
    ("appendfsync", "settings", "warnings"),
    [
        ("always", {}, []),
        (None, {}, ["appendonly is off"]),
        (
            "everysec",
            {"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"},
            ["appendfsync", "noeviction"],
        ),
    ],
)
async def test_connect_warns_of_settings_that_lose_data(binary, appendfsync, settings, warnings):
    with LocalServer(binary=binary, appendfsync=appendfsync, settings=settings) as server:
        store = Store(server.url, "p")
        told = (await store.connect()).warnings
        await store.close()
    assert len(told) == len(warnings)
    assert all(part in line for part, line in zip(warnings, told, strict=True))


async def test_connect_tells_what_is_wrong_in_one_line(binary):
    with LocalServer(binary=binary, appendfsync=None, settings={"requirepass": "right"}) as server:
        store = Store(server.url.replace("//", "//:wrong@"), "p")
        with pytest.raises(StoreError, match="refuses the credentials") as caught:
            await store.connect()
        assert "wrong" not in str(caught.value)
        assert "right" not in str(caught.value)
        await store.close()
        port = server.port
    started_s = time.monotonic()
    store = Store(f"redis://127.0.0.1:{port}/0", "p")
    with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port} cannot be reached") as caught:
        await store.connect()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started_s < 5
    await store.close()
