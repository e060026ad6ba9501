"""How much memory there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worker_svc.engine import memory

GIB = 1 << 30
CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container with a limit of 8 GiB on a machine of 64."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_system_bytes", lambda: 64 * GIB)
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{7 * GIB}\n")
    return tmp_path


def test_what_a_container_has_read_from_files_is_free(group: Path) -> None:
    """As is the case when the weights have just been read."""
    stat = f"anon {4 * GIB}\nfile {3 * GIB}\nshmem {GIB}\ninactive_file {GIB}\nactive_file {GIB}\n"
    (group / "memory.stat").write_text(stat)
    assert memory.available_bytes(CPU) == 3 * GIB
    (group / "memory.current").write_text(str(GIB))
    assert memory.available_bytes(CPU) == 8 * GIB, "the two files are not read at one instant"


def test_a_container_that_tells_less(group: Path) -> None:
    assert memory.available_bytes(CPU) == GIB
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes(CPU) == 64 * GIB
    (group / "memory.current").unlink()
    assert memory.available_bytes(CPU) == 64 * GIB
