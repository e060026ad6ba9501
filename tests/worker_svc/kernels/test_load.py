"""The compiled pass is made once, kept where it can be, and done without where it cannot be made."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from worker_svc.kernels import load


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    load.narrow_pass.cache_clear()
    yield
    load.narrow_pass.cache_clear()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was built; the code is that of the user's own cache, so that nothing is compiled here."""
    assert load.narrow_pass() is not None
    load.narrow_pass.cache_clear()
    code = load._read(load._folder() / load._key())
    assert code is not None
    calls: list[bytes] = []

    def build() -> bytes:
        calls.append(code)
        return code

    monkeypatch.setattr(load, "_built", build)
    return calls


def test_it_is_built_once_and_kept(
    built: list[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load.narrow_pass() is not None
    (kept,) = (tmp_path / "laps").iterdir()
    load.narrow_pass.cache_clear()
    assert load.narrow_pass() is not None
    assert len(built) == 1
    for spoil in (
        lambda: kept.write_bytes(kept.read_bytes()[:-1]),
        lambda: kept.write_bytes(b""),
        lambda: kept.chmod(0o666),
    ):
        spoil()
        load.narrow_pass.cache_clear()
        assert load.narrow_pass() is not None
    assert len(built) == 4


def test_without_a_folder_it_is_built_each_time(
    built: list[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    for count in (1, 2):
        assert load.narrow_pass() is not None
        assert len(built) == count
        load.narrow_pass.cache_clear()


def test_without_a_compiler_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    caplog.set_level(logging.INFO)
    assert load.narrow_pass() is None
    assert "numba is not installed" in caplog.text


def test_code_that_does_not_load_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = load._run

    def broken(module: str, given: bytes, limit_s: float) -> bytes:
        return b"narrow_pass\nno machine code" if module == "build" else run(module, given, limit_s)

    monkeypatch.setattr(load, "_run", broken)
    assert load.narrow_pass() is None
    assert "load ended with" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_worker_has_no_compiler_in_it() -> None:
    code = (
        "import sys; from worker_svc.kernels.load import narrow_pass; assert narrow_pass() is not None; "
        "sys.exit('numba' in sys.modules)"
    )
    environment: dict[str, Any] = {"cwd": Path(load.__file__).parents[2]}
    assert subprocess.run([sys.executable, "-c", code], **environment).returncode == 0


def test_what_lies_in_the_folder_is_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else a pass would be kept under the name of sources that it was not made of."""
    assert load.narrow_pass() is not None
    code = load._read(load._folder() / load._key())
    assert code is not None
    for name in ("llvmlite", "worker_svc"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    load._run("load", code, 60.0)
