"""Yesterday's traffic, replayed: a pool's log becomes a workload, and the workload is simulated."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from pathlib import Path

import pytest

from simulator.workload import read_workload
from tests.stack.conftest import StartStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]


async def laps(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "laps.cli", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_a_pools_log_is_replayed(start_stack: StartStack, prompts: list[str], tmp_path: Path) -> None:
    path, report = tmp_path / "pool.jsonl.gz", tmp_path / "report.json"
    async with start_stack(workers=1, slots=2) as (stack, client):
        made = await asyncio.gather(
            *(
                client.generate(text, max_tokens=10 + 5 * n, ignore_eos=True, predicted_output_tokens=20 + n)
                for n, text in enumerate(prompts[:6])
            )
        )
        told = await laps("workload", "pool", str(path), "--redis-url", stack.redis_url)
    assert "6 requests" in told
    jobs = read_workload(path)
    assert sorted(job.output_tokens for job in jobs) == sorted(len(each.token_ids) for each in made)
    assert sorted(job.steps for job in jobs) == sorted(each.speculation.num_steps for each in made)
    assert {job.predicted_output_tokens for job in jobs} == {20.0 + n for n in range(6)}
    command = shlex.split(next(line for line in told.splitlines() if line.startswith("laps simulate")))
    assert command[1:5] == ["simulate", str(path), "--as-recorded", "--slots"]
    await laps(*command[1:], "--policies", "fcfs,laps-sd", "--json", str(report))
    costs = json.loads(report.read_text())["costs"]
    # What a worker has measured and what its requests tell: all of it is there.
    assert 0.0 < costs["prefill_ms"] < 50.0
    assert 0.0 < costs["start_ms"] < 1000.0
    figures = json.loads(report.read_text())["policies"]
    assert all(figures[policy]["mean_latency_s"] > 0.0 for policy in ("fcfs", "laps-sd"))
