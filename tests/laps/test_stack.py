"""The supervisor, with children that do nothing: started again, stopped in order, never left behind."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from laps import child as child_module
from laps import log_files, logs, readiness_watch, store_child
from laps import stack as stack_module
from laps.child import Child, ChildSpec
from laps.log_files import older
from laps.ports import is_free
from laps.settings import Settings
from laps.stack import Stack, StackError

pytestmark = pytest.mark.stack

# Says that it runs, notes when it is told to stop.
IDLE = """
import os, signal, sys
def end(*_):
    open(os.environ["STOPPED"], "a").write(sys.argv[1] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("running", sys.argv[1], flush=True)
while True:
    signal.pause()
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(99)
"""

CHATTY = """
import time
for number in range(10**9):
    print(f"{number:09}", "." * 90, flush=True)
    time.sleep(0.0002)
"""


async def eventually(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "condition not met in time"
        await asyncio.sleep(0.01)


def idle(role: str) -> list[str]:
    return [sys.executable, "-c", IDLE, role]


def chatty(role: str) -> list[str]:
    return [sys.executable, "-c", CHATTY if role == "scheduler" else IDLE, role]


def read_numbers(log: Path) -> list[int]:
    """Of what CHATTY has written; a line that is cut is left out."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line[:9]) for line in lines if len(line) == 100]


async def always_ready(address: str) -> bool:
    return True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setenv("STOPPED", str(tmp_path / "stopped"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", redis_url="redis://elsewhere", workers=2, drain_s=60)


@pytest.fixture
def said() -> io.StringIO:
    """What `laps up` shows of its logs."""
    stream = io.StringIO()
    logs.configure_logging("up", pool="default", level="warning", form="plain", stream=stream)
    return stream


@asynccontextmanager
async def running(
    settings: Settings, is_ready: Callable[[str], Awaitable[bool]] = always_ready
) -> AsyncIterator[Stack]:
    """Each child has said so in its log, as the last line of it."""
    async with Stack(settings, any_ports=True, command=idle, is_ready=is_ready) as stack:
        for each in stack.children.values():
            await eventually(lambda log=each.log_path: log.exists() and "running" in log.read_text())
        yield stack


async def test_a_killed_child_is_started_again(settings: Settings, said: io.StringIO) -> None:
    async with running(settings) as stack:
        with stack.children["worker-1"].log_path.open("a") as log:
            log.write("trouble of another time\n")
        worker = stack.children["worker-1"]
        old = worker.pid
        worker.signal(signal.SIGKILL)
        await eventually(lambda: worker.starts == 2 and worker.pid not in (None, old))
        assert [each.starts for each in stack.children.values()].count(1) == 3
    assert "worker-1: ended, starting it again (how: killed by SIGKILL, " in said.getvalue()


async def test_children_stop_in_order_and_are_gone(settings: Settings, tmp_path: Path) -> None:
    async with running(settings) as stack:
        pids = [each.pid for each in stack.children.values()]
        assert list(stack.children) == ["scheduler", "gateway", "worker-0", "worker-1"]
    assert (tmp_path / "stopped").read_text().split() == ["gateway", "worker", "worker", "scheduler"]
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)
    assert not stack.children


@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_an_ipv6_address_stands_in_brackets(settings: Settings, host: str) -> None:
    if not is_free(0, host):
        pytest.skip("this machine has no such address")
    asked: set[str] = set()

    async def ready(address: str) -> bool:
        asked.add(address)
        return True

    settings = settings.model_copy(update={"host": host})
    async with Stack(settings, any_ports=True, command=idle, is_ready=ready) as stack:
        assert stack.gateway_address == f"[::1]:{stack.port}"
        assert {stack.gateway_address, stack.scheduler_address} < asked
        assert stack.http_url == f"http://[::1]:{stack.http_port}/v1"
    assert all(address.startswith("[::1]:") for address in asked)


async def test_children_get_their_settings(settings: Settings) -> None:
    async with running(settings.model_copy(update={"metrics_port": 9000, "gateways": 2})) as stack:
        worker = stack.children["worker-1"]
        assert isinstance(worker, Child)
        env = psutil.Process(worker.pid).environ()
        assert env["LAPS_SCHEDULER_ADDRESS"] == stack.scheduler_address
        assert env["LAPS_WORKER_ID"] == "worker-1"
        assert env["LAPS_REDIS_URL"] == "redis://elsewhere"
        names = ("gateway", "scheduler", "gateway-1", "worker-1")
        envs = (psutil.Process(stack.children[name].pid).environ() for name in names)
        assert [each.get("LAPS_METRICS_PORT", "0") for each in envs] == ["9000", "9001", "9501", "0"]


async def test_a_child_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    stubborn = Child(ChildSpec("stubborn", [sys.executable, "-c", STUBBORN]), tmp_path / "log")
    await stubborn.start()
    await eventually(lambda: "up" in stubborn.last_words())
    pid = stubborn.pid
    assert pid is not None
    await stubborn.stop(0.1)
    assert not psutil.pid_exists(pid)
    assert stubborn.exit_code == -signal.SIGKILL


async def test_logs_are_bounded_while_their_writers_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "MAX_LOG_BYTES", 20_000)
    monkeypatch.setattr(log_files, "INTERVAL_S", 0.02)
    async with Stack(settings, any_ports=True, command=chatty, is_ready=always_ready) as stack:
        pids = [each.pid for each in stack.children.values()]
        scheduler = stack.children["scheduler"]
        log = scheduler.log_path
        numbers: list[int] = []
        for _ in range(3):
            # All that it has written comes by in the older log, while the newest stays short.
            last = numbers[-1] if numbers else -1
            await eventually(lambda last=last: (found := read_numbers(older(log))) and found[-1] > last)
            numbers = read_numbers(older(log))
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        await eventually(lambda: log.stat().st_size < 20_000)
        assert [each.pid for each in stack.children.values()] == pids
        assert isinstance(scheduler, Child)
        await eventually(lambda: read_numbers(log) and scheduler.last_words())


async def test_what_a_child_started_goes_with_it(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys, time
print("child", subprocess.Popen([sys.executable, "-c", {STUBBORN!r}]).pid, flush=True)
time.sleep(99)
"""
    log = tmp_path / "log"
    parent = Child(ChildSpec("parent", [sys.executable, "-c", code]), log)
    await parent.start()
    await eventually(lambda: log.exists() and "child" in log.read_text())
    grandchild = int(log.read_text().split("child")[1].split()[0])
    await parent.stop(1)
    await eventually(lambda: not _alive(grandchild))


async def test_a_child_that_fails_at_the_start_is_named_with_its_last_words(
    settings: Settings, said: io.StringIO
) -> None:
    def failing(role: str) -> list[str]:
        return (
            [sys.executable, "-c", "import sys; sys.exit('no such model')"]
            if role == "worker"
            else idle(role)
        )

    async def not_workers(address: str) -> bool:
        return False

    with pytest.raises(StackError, match=r"worker-\d ended with exit code 1: no such model"):
        async with Stack(settings, any_ports=True, command=failing, is_ready=not_workers):
            pass
    # It would fail again.
    assert "starting it again" not in said.getvalue()


async def test_what_a_child_waits_for_is_said_in_a_sentence(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, said: io.StringIO
) -> None:
    event = {"event": "store not reachable", "level": "error", "error": "connection refused"}
    command = [sys.executable, "-c", f"import time; print({json.dumps(event)!r}, flush=True); time.sleep(99)"]
    monkeypatch.setattr(stack_module, "_PATIENCE_S", 0.0)

    async def once_said(address: str) -> bool:
        return "refused" in said.getvalue()

    async with Stack(settings, any_ports=True, command=lambda role: command, is_ready=once_said):
        pass
    assert re.search(
        r"(?m)^[\d:]{8} [a-z0-9-]+: not ready yet: store not reachable: connection refused \(after: \d+ s, ",
        said.getvalue(),
    )
    assert "{" not in said.getvalue()


async def test_what_is_waited_for_is_said_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, said: io.StringIO
) -> None:
    """Gateway and workers wait for the scheduler, and would only say that."""
    event = {"event": "waits for another", "level": "error"}
    command = [sys.executable, "-c", f"import time; print({json.dumps(event)!r}, flush=True); time.sleep(99)"]
    monkeypatch.setattr(stack_module, "_PATIENCE_S", 0.0)
    asked: Counter[str] = Counter()

    async def after_some_time(address: str) -> bool:
        asked[address] += 1
        return "waits for another" in said.getvalue() and min(asked.values()) > 30

    async with Stack(settings, any_ports=True, command=lambda role: command, is_ready=after_some_time):
        pass
    lines = [re.sub(r" \(.*| .*it is starting.*", "", line[9:]) for line in said.getvalue().splitlines()]
    assert [line for line in lines if line != "scheduler:"][:2] == [
        "scheduler: not ready yet: waits for another",
        "scheduler: ready now",
    ]
    assert len(lines) == len(set(lines)), "no line comes twice"


class Clock:
    """In place of the module `time`: a busy machine's own clock would tell other figures."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Counted:
    """Whether a service is ready, and how often that was asked."""

    def __init__(self, is_ready: Callable[[str], bool]) -> None:
        self._is_ready = is_ready
        self._asked = 0

    async def __call__(self, address: str) -> bool:
        self._asked += 1
        return self._is_ready(address)

    async def asked_often(self) -> None:
        enough = self._asked + 40
        await eventually(lambda: self._asked > enough)


async def test_who_ceases_to_be_ready_is_told_with_the_reason(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, said: io.StringIO
) -> None:
    clock = Clock()
    monkeypatch.setattr(readiness_watch, "time", clock)
    monkeypatch.setattr(readiness_watch, "INTERVAL_S", 0.02)
    lost = False
    unless_lost = Counted(lambda address: not lost)
    async with running(settings, unless_lost) as stack:
        event = {"event": "store does not answer", "level": "error", "error": "connection refused"}
        with stack.children["scheduler"].log_path.open("a") as log:
            log.write(json.dumps(event) + "\n")
        lost = True
        await unless_lost.asked_often()
        assert not said.getvalue(), "a standby takes over in less"
        clock.now_s += 4
        await eventually(lambda: "not ready any more" in said.getvalue())
        clock.now_s += 3
        await unless_lost.asked_often()
        lost = False
        await eventually(lambda: "ready again" in said.getvalue())
    lines = [line[9:] for line in said.getvalue().splitlines()]
    # The others wait for the scheduler.
    assert re.match(
        r"scheduler: not ready any more: store does not answer: connection refused \(log: ", lines[0]
    )
    assert re.match(r"scheduler: ready again \(after: 7 s\)", lines[1])
    assert len(lines) == 2


async def test_of_a_child_that_ended_it_is_told_when_it_is_ready_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, said: io.StringIO
) -> None:
    clock = Clock()
    monkeypatch.setattr(readiness_watch, "time", clock)
    monkeypatch.setattr(readiness_watch, "INTERVAL_S", 0.02)
    dead: set[str] = set()
    unless_dead = Counted(lambda address: address not in dead)
    async with Stack(settings, any_ports=True, command=idle, is_ready=unless_dead) as stack:
        scheduler = stack.children["scheduler"]
        dead.add(stack.scheduler_address)
        scheduler.signal(signal.SIGKILL)
        await eventually(lambda: scheduler.starts == 2)
        for passed_s in (4, 3):
            await unless_dead.asked_often()
            clock.now_s += passed_s
        await unless_dead.asked_often()
        dead.clear()
        await eventually(lambda: "ready again" in said.getvalue())
    first, second = said.getvalue().splitlines()
    assert "scheduler: ended, starting it again (how: killed by SIGKILL, " in first
    assert "scheduler: ready again (after: 7 s)" in second


async def test_a_store_without_room_waits_for_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: io.StringIO
) -> None:
    monkeypatch.setattr(store_child, "_ROOM_INTERVAL_S", 0.01)
    settings = Settings(data_dir=tmp_path / "data", workers=0)
    async with Stack(settings, any_ports=True, command=idle, is_ready=always_ready) as stack:
        monkeypatch.setattr(store_child, "disk_is_full", lambda folder: True)
        store = stack.children["store"]
        store.signal(signal.SIGKILL)
        await eventually(lambda: "is full: free some space" in said.getvalue())
        assert store.starts == 1
        monkeypatch.setattr(store_child, "disk_is_full", lambda folder: False)
        await eventually(lambda: store.starts == 2)
    assert said.getvalue().count("free some space") == 1


async def test_what_is_never_ready_is_named(settings: Settings) -> None:
    async def never(address: str) -> bool:
        return False

    stack = Stack(settings, any_ports=True, command=idle, is_ready=never)
    await stack.start()
    with pytest.raises(StackError, match="not ready after 0 s: scheduler, gateway, worker-0, worker-1"):
        await stack.wait_ready(timeout_s=0)
    await stack.stop(0)


async def test_a_taken_port_is_named(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stack = Stack(settings.model_copy(update={"port": port}), command=idle)
        with pytest.raises(StackError, match=f"port {port} is in use; choose another with --port"):
            await stack.start()
        await stack.stop()


@pytest.mark.parametrize(
    ("taken", "changes", "problem"),
    [
        (7000, {}, "port 7000 is in use; choose another with --metrics-port"),
        (7001, {}, "port 7001 is in use; choose another with --metrics-port, which counts on from 7000"),
        (7501, {}, "port 7501 is in use; choose another with --metrics-port, which counts on from 7000"),
        (0, {"port": 7000}, "port 7000 is in use; choose another with --metrics-port"),
        (0, {"metrics_port": 65_100}, "metrics_port: counting on from 65100 leads beyond 65535; choose a "),
    ],
)
async def test_a_taken_metrics_port_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, taken: int, changes: dict[str, int], problem: str
) -> None:
    """The first gateway's, the scheduler's, a further gateway's, one that another setting has."""
    monkeypatch.setattr(stack_module, "is_free", lambda port, host: port == 0 or port != taken)
    given = {"gateways": 2, "port": 0, "scheduler_port": 0, "metrics_port": 7000} | changes
    stack = Stack(settings.model_copy(update=given), command=idle)
    with pytest.raises(StackError, match=f"^{problem}"):
        await stack.start()
    await stack.stop()


async def test_a_host_of_another_machine_is_named(settings: Settings) -> None:
    stack = Stack(settings.model_copy(update={"host": "203.0.113.1"}), command=idle)
    with pytest.raises(StackError, match=r"host: 203\.0\.113\.1 is no address of this machine"):
        await stack.start()
    await stack.stop()


async def test_one_data_folder_serves_one_stack(settings: Settings) -> None:
    async with running(settings):
        second = Stack(settings, any_ports=True, command=idle)
        with pytest.raises(StackError, match=r"used by another .* --data-dir"):
            await second.start()
    async with running(settings):
        pass


async def test_the_store_comes_back_with_its_data(tmp_path: Path) -> None:
    pytest.importorskip("scheduler_svc.store.server")
    import redis

    settings = Settings(data_dir=tmp_path / "data", workers=0)
    async with Stack(settings, any_ports=True, command=idle, is_ready=always_ready) as stack:
        store = stack.children["store"]
        client = redis.Redis.from_url(stack.redis_url)
        client.set("kept", "yes")
        store.signal(signal.SIGKILL)
        await eventually(lambda: store.starts == 2)
        assert client.get("kept") == b"yes"
        client.close()
        pid = store.pid
    assert pid is not None
    assert not _alive(pid)


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from laps.logs import configure_logging
from laps.settings import Settings
from laps.stack import Stack
from tests_idle import idle, always_ready

async def main():
    configure_logging("test")
    settings = Settings(data_dir=Path(sys.argv[1]), workers=2, redis_url=sys.argv[2])
    async with Stack(settings, any_ports=True, command=idle, is_ready=always_ready) as stack:
        print(*(child.pid for child in stack.children.values()), flush=True)
        await asyncio.sleep(99)

asyncio.run(main())
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    helper = f"import sys\nIDLE = {IDLE!r}\n"
    helper += (
        "def idle(role): return [sys.executable, '-c', IDLE, role]\nasync def always_ready(_): return True\n"
    )
    (tmp_path / "tests_idle.py").write_text(helper)
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path / "data"), ""],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as process:
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
async def test_nothing_outlives_a_killed_supervisor(supervisor: subprocess.Popen[str]) -> None:
    assert supervisor.stdout is not None
    pids = [int(pid) for pid in (await asyncio.to_thread(supervisor.stdout.readline)).split()]
    assert len(pids) == 5
    assert all(map(_alive, pids))
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    await eventually(lambda: not any(map(_alive, pids)))


def _alive(pid: int) -> bool:
    # Where nobody reaps orphans they stay as zombies.
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
