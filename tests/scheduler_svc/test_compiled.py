"""The compiled build: it runs where it fits, never where it does not, and decides as plain Python does."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from laps.cli import EXIT_FAILED, main
from laps.settings import COMPILED_ENV
from scheduler_svc import compiled
from scheduler_svc.compiled.build import build, compiled_modules, remove

ROOT = Path(__file__).parents[2]
SOURCE = "adder/hot.py"
needs_build = pytest.mark.skipif(not compiled.running().usable, reason="make test-compiled")


def where(root: Path, wish: str = "") -> str:
    """What a new process imports as `adder.hot`, and what that computes; or the error that it ends with."""
    code = (
        "import sys; from pathlib import Path; from scheduler_svc import compiled\n"
        f"import os; os.environ['{compiled.VARIABLE}'] = '{wish}'; sys.path.insert(0, '{root}')\n"
        f"compiled.install(Path('{root / 'built'}'), Path('{root}'))\n"
        "from adder import hot; print(Path(hot.__file__).suffix, hot.add(2, 3))"
    )
    environment = os.environ | {compiled.VARIABLE: "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_a_build_runs_until_something_differs(tmp_path: Path) -> None:
    source = tmp_path / SOURCE
    source.parent.mkdir()
    source.with_name("__init__.py").touch()
    source.write_text("def add(a: int, b: int) -> int:\n    return a + b\n")
    (tmp_path / "pyproject.toml").write_text("[tool.mypy]\nstrict = true\n")
    built = tmp_path / "built"

    assert compiled.examine(built, tmp_path) == compiled.Build("there is no compiled build")
    assert where(tmp_path) == ".py 5"
    assert where(tmp_path, wish="1").startswith("ImportError: LAPS_COMPILED is 1, but there is no compiled")

    build([SOURCE], tmp_path, built, optimization="0")
    assert compiled.examine(built, tmp_path).modules.keys() == {"adder.hot", "laps_scheduler__mypyc"}
    assert where(tmp_path) == where(tmp_path, wish="1") == ".so 5"
    assert where(tmp_path, wish="0") == ".py 5"

    source.write_text(source.read_text().replace("a + b", "a - b"))
    assert compiled.examine(built, tmp_path) == compiled.Build(
        f"{SOURCE} is not what was compiled", stale=True
    )
    assert where(tmp_path) == ".py -1"
    assert where(tmp_path, wish="1").startswith(f"ImportError: LAPS_COMPILED is 1, but {SOURCE} is not what")
    source.write_text(source.read_text().replace("a - b", "a + b"))
    assert compiled.examine(built, tmp_path).usable

    manifest = json.loads((built / compiled.MANIFEST).read_text())
    for damaged, why in (
        (json.dumps(manifest | {"suffix": ".cpython-27.so"}), "the compiled build is for .cpython-27.so"),
        (json.dumps(manifest | {"modules": ["adder.warm"]}), "the compiled build lacks adder.warm"),
        (json.dumps(manifest | {"sources": {"adder/gone.py": ""}}), "adder/gone.py is not what was"),
        ("{", "the manifest of the compiled build cannot be read"),
    ):
        (built / compiled.MANIFEST).write_text(damaged)
        assert compiled.examine(built, tmp_path).why.startswith(why)
        assert compiled.examine(built, tmp_path).stale
        assert where(tmp_path) == ".py 5"
    remove(built)
    assert not built.exists()


def test_what_is_compiled_is_there() -> None:
    assert compiled.VARIABLE == COMPILED_ENV
    names = compiled_modules()
    assert all((ROOT / name).is_file() for name in names)
    assert {"scheduler_svc/core/steps.py", "scheduler_svc/store/packing.py"} <= set(names)


def test_no_type_says_a_number_or_false() -> None:
    """Compiled, such a value is a number, and the store's functions tell False from 0."""
    told = [
        name
        for name in compiled_modules()
        if re.search(r"int \| bool|bool \| int", (ROOT / name).read_text())
    ]
    assert not told


def test_a_scheduler_that_must_run_compiled_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_import = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name == "scheduler_svc.main":
            compiled.install(built=Path("nowhere"))
        return plain_import(name)

    monkeypatch.setenv(compiled.VARIABLE, "1")
    monkeypatch.setattr(compiled, "_running", compiled.running())  # to be put back
    monkeypatch.setattr(importlib, "import_module", import_module)
    assert main(["scheduler"]) == EXIT_FAILED
    assert capsys.readouterr().err == (
        "laps: LAPS_COMPILED is 1, but there is no compiled build; `make compiled` makes it\n"
    )


def output(wish: str, *arguments: str) -> bytes:
    environment = os.environ | {compiled.VARIABLE: wish, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    assert done.stdout
    return done.stdout


PACKED = """
import hashlib, sys
from bench.core import Bed
bed = Bed(sys.argv[1], workers=4, queued=300)
packer, digest = bed._packer, hashlib.sha256()
class Digesting:
    def pack(self, commit, now_s):
        digest.update(packer.pack(commit, now_s))
bed._packer = Digesting()
bed.run(900, 3)
print(digest.hexdigest(), bed.core.counters)
"""


@needs_build
@pytest.mark.parametrize("policy", ["laps-sd", "laps-sd-paper", "fastserve", "fcfs", "las", "sjf", "srpt"])
def test_the_commits_are_the_same_bytes(policy: str) -> None:
    assert output("0", "-c", PACKED, policy) == output("1", "-c", PACKED, policy)


@needs_build
@pytest.mark.parametrize("seed", range(12))
def test_a_seed_of_faults_has_the_same_trace(seed: int) -> None:
    arguments = ("-m", "simulator.faults", "--seed", str(seed), "--trace")
    assert output("0", *arguments) == output("1", *arguments)
