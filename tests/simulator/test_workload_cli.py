"""`laps workload pool`: which store it asks, and what it prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from laps.cli import main
from scheduler_svc.store.server import LocalServer
from simulator import cli, pool_log
from simulator.mixes import make_mix
from simulator.pool_costs import PoolCosts
from simulator.pool_log import PoolLog
from simulator.workload import read_workload
from tests.certificates import Authority

COSTS = PoolCosts(slots=2, step_ms=20.0, row_ms=1.0, prefill_ms=0.3, switch_ms=1.0, start_ms=10.0)


class Asked:
    """What the store is asked with; it has served `workload`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workload = make_mix(jobs=3)
        self.costs: PoolCosts | None = COSTS
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        monkeypatch.setattr(pool_log, "from_pool", self.from_pool)

    async def from_pool(self, *args: Any, **options: Any) -> PoolLog:
        self.calls.append((args, options))
        return PoolLog(self.workload, [1.0] * len(self.workload), self.costs)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_the_store_is_a_setting(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["workload", "pool", str(out)]) == 1
    assert capsys.readouterr().err == (
        "laps: redis_url: say which store, with --redis-url or LAPS_REDIS_URL\n"
    )
    files = Authority().write(tmp_path / "made", "scheduler", "localhost")
    monkeypatch.setenv("LAPS_REDIS_URL", "rediss://operator:secret@redis:6379/0")
    monkeypatch.setenv("LAPS_POOL", "chat")
    monkeypatch.setenv("LAPS_TLS_CERT", files.certificate)
    monkeypatch.setenv("LAPS_TLS_KEY", files.key)
    monkeypatch.setenv("LAPS_TLS_CA", files.authorities)
    assert main(["workload", "pool", str(out), "--class", "code"]) == 0
    monkeypatch.setenv("LAPS_REDIS_CA", "/other.pem")
    assert main(["workload", "pool", str(out), "--pool", "code"]) == 0
    shown = {"ssl_certfile": files.certificate, "ssl_keyfile": files.key}
    assert asked.calls == [
        (
            ("rediss://operator:secret@redis:6379/0", "chat", "code"),
            {"ssl_ca_certs": files.authorities, **shown},
        ),
        (("rediss://operator:secret@redis:6379/0", "code", None), {"ssl_ca_certs": "/other.pem", **shown}),
    ]
    steps = [job.emitted_per_step for job in asked.workload]
    assert [job.emitted_per_step for job in read_workload(out)] == steps


def test_a_store_that_refuses_the_credentials_is_one_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = tmp_path / "users.acl"
    users.write_text("user default off\nuser blind on nopass ~* -@all +@connection\n")
    with LocalServer(appendfsync=None, settings={"aclfile": str(users)}) as server:
        url = server.url.replace("redis://", "redis://blind:secret@")
        assert main(["workload", "pool", str(tmp_path / "out.jsonl"), "--redis-url", url]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: Redis at ")
    assert "refuses the credentials" in said
    assert "secret" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("costs", [COSTS, None])
def test_the_printed_command_replays_with_the_pools_starvation_bound(
    asked: Asked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    costs: PoolCosts | None,
) -> None:
    asked.costs = costs
    given: list[float | None] = []
    replay = cli.replay

    def noted(*args: Any, **options: Any) -> Any:
        given.append(options["starvation_bound_s"])
        return replay(*args, **options)

    monkeypatch.setattr(cli, "replay", noted)
    arguments = ["workload", "pool", str(tmp_path / "out.jsonl"), "--redis-url", "redis://nowhere:1/0"]
    for more in ([], ["--starvation-bound-s", "7.5"], ["--starvation-bound-s", "0"]):
        assert main([*arguments, *more]) == 0
        command = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert command[0] == "laps"
        assert main([*command[1:], "--policies", "fcfs"]) == 0
        capsys.readouterr()
    assert given == [60.0, 7.5, None]
