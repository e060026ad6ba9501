"""Ports for children: free, and promised to nobody else."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from laps import ports
from laps.ports import free_ports, is_free


def test_ports_are_free_and_different() -> None:
    found = free_ports(20)
    assert len(set(found)) == 20
    assert all(map(is_free, found))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert not is_free(taken.getsockname()[1])


def test_ports_in_a_row_are_reserved_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight that are free, and reserved by nobody any more.
    base = free_ports(8, in_a_row=True)[0]
    for _ in range(8):
        ports._kept.pop().close()
    monkeypatch.setattr(ports, "_FIRST", base)
    monkeypatch.setattr(ports, "_LAST", base + 8)
    first = free_ports(3, in_a_row=True)
    assert first == list(range(first[0], first[0] + 3))
    # Five of eight are left; wherever the three lie, at least two of those stand side by side.
    second = free_ports(2, in_a_row=True)
    assert second == [second[0], second[0] + 1]
    with pytest.raises(OSError, match="no 4 free ports"):
        free_ports(4, in_a_row=True)
    # What could not be had as a row is still there one by one.
    assert sorted([*first, *second, *free_ports(3)]) == list(range(base, base + 8))


def test_two_processes_never_find_the_same_ports() -> None:
    """Also those on which nobody listens yet: here another process finds ports among few."""
    code = "from laps import ports; ports._FIRST, ports._LAST = 20_000, 20_200; "
    code += "print(*ports.free_ports(60), flush=True); input()"
    command = [sys.executable, "-c", code]
    found: list[str] = []
    with ExitStack() as stack:
        for _ in range(2):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            assert process.stdout is not None
            found += process.stdout.readline().split()
            stack.callback(process.communicate, "\n")
    assert len(found) == len(set(found)) == 120
