"""Between host and device without making either wait more often than it must.

On a GPU, a tensor made from a list is copied from pageable memory, and such a copy waits until the device has
caught up. From pinned memory it does not; and what a step has to read back is read all at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of nested lists of numbers, on the device. The host does not wait for the copy."""
    if device.type != "cuda" or not values:
        return torch.tensor(values, dtype=dtype, device=device)
    # The allocator of pinned memory keeps the block until the stream has passed the copy.
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def fetch(*tensors: Tensor) -> list[Any]:
    """The tensors as nested lists. The host waits once for all of them."""
    if not any(tensor.is_cuda for tensor in tensors):
        return [tensor.tolist() for tensor in tensors]
    held = []
    for tensor in tensors:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        held.append(host.copy_(tensor, non_blocking=True))
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [host.tolist() for host in held]
