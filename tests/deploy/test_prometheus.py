"""A real Prometheus (Debian's) scrapes a real stack, and every panel of the dashboards has data."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import monitoring
import pytest
import yaml

from laps.client import AsyncClient
from laps.ports import free_ports
from laps.settings import Settings
from laps.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> Any:
        url = f"{self._url}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def result(self, expression: str) -> list[Any]:
        return list(self.get("/api/v1/query", query=expression)["result"])


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    config = yaml.safe_load((monitoring.RULES.parent / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(monitoring.RULES)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                monitoring.tool("prometheus"),
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(90)


async def until(what: str, condition: Any, timeout_s: float = 150.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            missing = await asyncio.to_thread(condition)
        except OSError as error:
            missing = error
        if not missing:
            return
        assert time.monotonic() < deadline_s, f"{what}: {missing}"
        await asyncio.sleep(0.5)


async def test_the_dashboards_show_a_running_stack(tmp_path: Path) -> None:
    monitoring.tool("prometheus")
    # The stack counts on from the port: gateway, scheduler, one worker.
    port, *_ = free_ports(3, in_a_row=True)
    settings = Settings(data_dir=tmp_path / "stack", workers=1, slots=2, drain_s=2.0, metrics_port=port)
    async with Stack(settings, any_ports=True) as stack, AsyncClient(stack.gateway_address) as client:
        with prometheus(tmp_path, [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]) as running:
            await until("to scrape both", lambda: not_up(running))
            load = asyncio.create_task(keep_busy(client))
            await until("data in every panel", lambda: panels_without_data(running))
            load.cancel()
            firing = {alert["labels"]["alertname"] for alert in running.get("/api/v1/alerts")["alerts"]}
            assert not firing
            rules = running.get("/api/v1/rules")["groups"][0]["rules"]
            assert {rule["health"] for rule in rules} == {"ok"}


async def keep_busy(client: AsyncClient) -> None:
    while True:
        await asyncio.gather(*(client.generate("import os", max_tokens=64) for _ in range(4)))


def not_up(running: Prometheus) -> list[Any]:
    up = running.result("up")
    return [] if len(up) == 2 and all(each["value"][1] == "1" for each in up) else up or ["nothing"]


def panels_without_data(running: Prometheus) -> list[str]:
    return [
        where
        for where, expression in monitoring.panel_expressions()
        if not running.result(monitoring.with_values(expression))
    ]
