"""What a replay measured."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Stay:
    """A request's stay in a slot, for pictures."""

    slot: int
    job: int
    """Position in the workload."""
    begin_s: float
    end_s: float
    preempted_because: str
    """Empty: it ended."""


@dataclass(slots=True)
class Result:
    """What a replay measured. Latencies by job, in the order of the workload; seconds."""

    policy: str
    latencies_s: list[float]
    slowdowns: list[float]
    """Latency over the seconds that the request's own steps take."""
    switches: int
    """Returns to a slot after a preemption."""
    makespan_s: float
    """From the first arrival to the last finish."""
    steps: int
    """Steps of the worker."""
    stays: list[Stay] = field(default_factory=list)
    first_waits_s: list[float] = field(default_factory=list)
    """Seconds from arrival to the first slot."""
    first_steps_s: list[float] = field(default_factory=list)
    """Seconds from the decision to give the first slot to the end of the first step in it."""

    @property
    def mean_latency_s(self) -> float:
        return sum(self.latencies_s) / len(self.latencies_s)

    def summary(self) -> dict[str, float | int]:
        """What the JSON of `laps simulate` holds for a policy."""
        ordered = sorted(self.latencies_s)
        return {
            "mean_latency_s": self.mean_latency_s,
            "p50_latency_s": percentile(ordered, 0.50),
            "p90_latency_s": percentile(ordered, 0.90),
            "p99_latency_s": percentile(ordered, 0.99),
            "max_latency_s": ordered[-1],
            "mean_slowdown": sum(self.slowdowns) / len(self.slowdowns),
            "max_slowdown": max(self.slowdowns),
            "switches": self.switches,
            "makespan_s": self.makespan_s,
        }


def percentile(ordered: list[float], share: float) -> float:
    """With linear interpolation between neighbours. `ordered` ascends and is not empty."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
