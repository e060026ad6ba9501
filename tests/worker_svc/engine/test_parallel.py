"""A target in two shards on two processes says what it says in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from worker_svc.engine import Engine, EngineError, load_pair

HERE = Path(__file__).resolve().parent
PROMPTS = [[7], [5, 9, 11, 2, 3], list(range(2, 40)), [*range(2, 64), *range(30, 50)]]


def test_two_shards_equal_one_model(tools: Any, folders: Any, tmp_path: Path) -> None:
    (tmp_path / "requests.json").write_text(json.dumps(PROMPTS))
    arguments = [folders.target, folders.draft, tmp_path / "result.json", tmp_path / "requests.json"]
    ran = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(HERE / "shared_target.py"), *map(str, arguments),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])},
        capture_output=True,
        text=True,
        timeout=360,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads((tmp_path / "result.json").read_text())
    whole = replace(load_pair(folders.target, None), eos_token_ids=(1 << 30,))
    assert told["outputs"] == [tools.greedy_reference(whole, prompt, 12) for prompt in PROMPTS]
    assert {"host", "slot"} <= set(told["places"])
    # Each process holds one of the two key heads: the cache is shared, not repeated.
    assert told["key_heads"] == 1


def test_only_a_follower_follows(folders: Any) -> None:
    with pytest.raises(EngineError, match="only a process of a group"):
        Engine(load_pair(folders.target, None)).follow()
