"""The example of docs/engine.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_the_example_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/engine.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    exec(compile(example, "docs/engine.md", "exec"), namespace)
    output = namespace["output"]
    assert isinstance(output, list)
    assert 1 <= len(output) <= 32


def test_the_page_names_settings_that_exist() -> None:
    from worker_svc.engine import Engine, EngineConfig, EngineRequest, StepResult

    page = (ROOT / "docs/engine.md").read_text()
    known = {*EngineConfig.__slots__, *EngineRequest.__slots__, *StepResult.__slots__, *dir(Engine)}
    named = set(re.findall(r"`([a-z_]+)(?:=\w+|\(\))?`", page)) - {"generate", "seed"}
    assert named <= known
