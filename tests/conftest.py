"""Plain Python is tested, also where a compiled build lies about; `make test-compiled` sets the variable.

And how the tests are dealt out to the processes of pytest-xdist. Its `xdist_group` is without effect with
pytest 9.2, which makes node ids from something else than xdist 3.8 adds the group's name to.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
import uvloop
from hypothesis import HealthCheck, settings

os.environ.setdefault("LAPS_COMPILED", "0")
# As `laps` does, and why is said there: tests, too, start processes from uvloop beside gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# Where there is a proxy, it does not lead back to this machine.
for _name in ("no_proxy", "NO_PROXY"):
    _own = ("127.0.0.1", "localhost", "::1")
    os.environ[_name] = ",".join([*filter(None, [os.environ.get(_name)]), *_own])

# An example that waits for a busy core is no failure. In CI the examples are the same every time.
settings.register_profile(
    "laps",
    settings.get_profile("ci" if os.environ.get("CI") else "default"),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("laps")


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """Whatever a test does to this process's logs, the next one finds them as they were."""
    root = logging.getLogger()
    handlers, level, structured = root.handlers[:], root.level, structlog.get_config()
    yield
    structlog.configure(**structured)
    root.handlers[:] = handlers
    root.setLevel(level)


ON_BOTH_LOOPS = ("tests/scheduler_svc/store/test_caller.py", "tests/scheduler_svc/store/test_pipeline.py")
"""What works on transports themselves. The services have uvloop wherever there is one."""


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.nodeid.startswith(ON_BOTH_LOOPS):
        loops["asyncio"] = asyncio.new_event_loop
    return loops


TOGETHER = (
    ("tests/stack/test_outside.py", "tests/stack/test_output.py", "tests/stack/test_openai.py"),
    ("tests/gateway/console/test_pages.py", "tests/gateway/console/test_screenshots.py"),
    ("tests/stack/test_crash.py",),
    ("tests/stack/test_fleet.py",),
    ("tests/bench/test_killloop.py",),
    ("tests/stack/test_security.py",),
    ("tests/stack/test_gateways.py",),
)
"""Files whose tests share processes that take long to start: each line's run in one process, one after the
other. They begin first, so that none of them is still under way when all else is over."""
ALSO_FIRST = (
    "tests/bench/",
    "tests/stack/",
    "tests/deploy/",
    "tests/docs/test_operations.py",
    "tests/simulator/faults/",
    "tests/worker_svc/engine/test_parallel.py",
)
"""Long ones that share nothing."""


def _scope(nodeid: str) -> str:
    path = nodeid.partition("::")[0]
    return next((files[0] for files in TOGETHER if path in files), nodeid)


def _turn(nodeid: str) -> int:
    path = nodeid.partition("::")[0]
    firsts = [any(path == file for file in files) for files in TOGETHER]
    firsts += [path.startswith(prefix) for prefix in ALSO_FIRST]
    return firsts.index(True) if True in firsts else len(firsts)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _turn(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    # In the order in which they were collected, not by their number.
    config.option.loadscopereorder = False
    return Scheduling(config, log)
