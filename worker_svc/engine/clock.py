"""Times of the phases of a step, on a CPU and on a GPU, where work is only queued when a call returns."""

from __future__ import annotations

import time

import torch


class PhaseClock:
    """Marks moments; `seconds` gives the time between two of them, once the device has passed both."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    @property
    def waits(self) -> bool:
        """Whether `seconds` may have to wait for the device."""
        return self._cuda

    def mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(start, torch.cuda.Event):
            if not isinstance(end, torch.cuda.Event):
                raise TypeError("marks of two clocks")
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        if isinstance(end, torch.cuda.Event):
            raise TypeError("marks of two clocks")
        return end - start
