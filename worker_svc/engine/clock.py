"""Times of the phases of a step, on a CPU and on a GPU, where work is only queued when a call returns."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


class BusyClock:
    """Seconds in which the device worked for this thread.

    What one thread computes by itself is told by its CPU time: it is not to look dearer because another
    process, or another thread of this one, had the core or the interpreter's lock meanwhile. Everywhere else,
    and with others who share the work (`alone` False), it is the time that passes.
    """

    def __init__(self, device: torch.device, alone: bool = True) -> None:
        self.device = device
        by_itself = alone and device.type == "cpu" and torch.get_num_threads() == 1
        self.now_s = time.thread_time if by_itself else time.perf_counter


@dataclass(frozen=True, slots=True)
class Moment:
    """A mark on a CPU: the time that passes, and the thread's busy time."""

    passed_s: float
    busy_s: float


class PhaseClock:
    """Marks moments; `seconds` gives the time between two of them, once the device has passed both, and
    `busy_s` what of it was work.
    """

    def __init__(self, busy: BusyClock) -> None:
        self._device = busy.device
        self._cuda = busy.device.type == "cuda"
        self._busy_now_s = busy.now_s

    @property
    def waits(self) -> bool:
        """Whether `seconds` may have to wait for the device."""
        return self._cuda

    def mark(self) -> Moment | torch.cuda.Event:
        """Now; on a GPU, when the device has done what it was given so far."""
        if not self._cuda:
            return Moment(time.perf_counter(), self._busy_now_s())
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Else it is the thread's current device whose work is marked.
        event.record(torch.cuda.current_stream(self._device))
        return event

    def busy_s(self, start: Moment | torch.cuda.Event, end: Moment | torch.cuda.Event) -> float:
        """Seconds of work between two marks; on a GPU all that passed between them."""
        if isinstance(start, Moment) and isinstance(end, Moment):
            return end.busy_s - start.busy_s
        return self.seconds(start, end)

    def seconds(self, start: Moment | torch.cuda.Event, end: Moment | torch.cuda.Event) -> float:
        """Seconds between two marks. Waits for the device; raises TypeError for marks of two clocks."""
        if isinstance(start, torch.cuda.Event):
            if not isinstance(end, torch.cuda.Event):
                raise TypeError("marks of two clocks")
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        if isinstance(end, torch.cuda.Event):
            raise TypeError("marks of two clocks")
        return end.passed_s - start.passed_s
