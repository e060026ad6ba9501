"""The contracts: style, no breaking change, current stubs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
BUF = Path(sys.executable).parent / "buf"


def buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *arguments], capture_output=True, text=True, check=False)


def test_buf_finds_nothing_against_its_standard_rules() -> None:
    linted = buf("lint", PROTOS)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_nothing_breaks_clients_of_the_released_contract() -> None:
    compared = buf("breaking", PROTOS, "--against", PROTOS / "released.binpb")
    assert compared.returncode == 0, compared.stdout + compared.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("optional float temperature = 1;", "optional float temperature = 9;"),
        ("string matched_stop = 2;", "bytes matched_stop = 2;"),
        ("FINISH_REASON_DEADLINE = 4;", ""),
    ],
)
def test_a_breaking_change_is_found(tmp_path: Path, before: str, after: str) -> None:
    changed = tmp_path / "protos"
    shutil.copytree(PROTOS, changed)
    path = changed / "laps" / "v1" / "generation.proto"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    assert buf("breaking", changed, "--against", PROTOS / "released.binpb").returncode != 0


def test_stubs_are_current() -> None:
    checked = subprocess.run(
        [sys.executable, PROTOS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
