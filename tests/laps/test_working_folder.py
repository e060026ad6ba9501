"""Whatever lies in the folder where somebody runs LAPS, none of its processes takes it for a package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from laps.settings import Settings
from laps.stack import service_command
from worker_svc import shards

NAMES = ("click", "grpc", "laps", "redis", "torch", "worker_svc")


@pytest.fixture
def cluttered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('somebody\\'s own {name}.py')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("cluttered")
@pytest.mark.parametrize("role", ["scheduler", "gateway", "worker"])
def test_services(role: str) -> None:
    ended = subprocess.run([*service_command(role), "--help"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"laps {role}" in ended.stdout


@pytest.mark.usefixtures("cluttered")
def test_the_processes_of_a_shared_target(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[subprocess.CompletedProcess[str]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        assert command[0] == path
        ended.append(subprocess.run(command, capture_output=True, text=True, env=environment))

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["laps", "worker", "--help"])
    shards.launch(Settings(tensor_parallel=2))
    assert ended[0].returncode == 0, ended[0].stderr
    assert ended[0].stdout.count("laps worker") >= 2
