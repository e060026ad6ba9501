"""Memory: how much there is, and tensors whose pages exist only where something was written."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

# Linux gives a private anonymous mapping its pages at the first write, and takes them back on request.
HAS_LAZY_PAGES = sys.platform == "linux"
_MAP_NORESERVE = 0x4000
_CGROUP = Path("/sys/fs/cgroup")


class LazyTensor:
    """A zeroed CPU tensor of `shape` that costs no memory until it is written, page by page."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count = 1
        for size in shape:
            count *= size
        # NORESERVE: room for the longest context in every slot is promised to none of them.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._pages = mmap.mmap(-1, max(count * dtype.itemsize, mmap.PAGESIZE), flags=flags)
        # A huge page would cost 2 MiB for one token.
        self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.tensor: Tensor = torch.frombuffer(self._pages, dtype=dtype, count=count).view(shape)

    def release(self, first: int, count: int) -> None:
        """Makes elements first .. first + count - 1 zero, and gives their pages back; those that reach beyond
        these elements stay.
        """
        size = self.tensor.element_size()
        begin, end = first * size, (first + count) * size
        first_page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end_page = end // mmap.PAGESIZE * mmap.PAGESIZE
        if first_page >= end_page:
            self._pages[begin:end] = bytes(end - begin)
            return
        self._pages[begin:first_page] = bytes(first_page - begin)
        self._pages[end_page:end] = bytes(end - end_page)
        self._pages.madvise(mmap.MADV_DONTNEED, first_page, end_page - first_page)


def pinned_bytes(size_bytes: int) -> int:
    """Bytes of pinned host memory that a tensor takes: torch rounds it up to a power of two."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes > 0 else 0


def available_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on a device now. On a CPU the limit of the control group counts too."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_system_bytes(), *_cgroup_bytes()])


def _system_bytes() -> int:
    """What the machine has left; where it does not say, all that it has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _cgroup_bytes() -> list[int]:
    """What is left of a container's memory, where it has a limit (cgroup v2)."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        # Files that were read, such as the weights', count as used until somebody needs the memory.
        used -= _cgroup_files_bytes()
    except (OSError, ValueError):
        return []
    return [] if limit == "max" else [max(int(limit) - max(used, 0), 0)]


def _cgroup_files_bytes() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    entries = dict(line.split() for line in lines)
    return sum(int(entries.get(name, 0)) for name in ("inactive_file", "active_file"))
