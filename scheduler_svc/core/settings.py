"""What an operator can set about a pool's scheduling. Checked where it is built."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Bounds and durations of one pool. Raises ValueError naming the field that is out of range."""

    draft_tokens: int = 4
    """Tokens that a worker drafts per step at most."""
    step_credit: int = 64
    """Steps that a worker may do beyond the last one that the scheduler acknowledged."""
    lease_duration_s: float = 10.0
    session_timeout_s: float = 5.0
    """A worker that said nothing for so long is lost."""
    max_queued_requests: int = 10_000
    """Waiting requests beyond which new ones are refused."""
    max_queued_tokens: int = 16_000_000
    """Prompt tokens of all waiting requests beyond which new ones are refused."""
    retention_s: float = 600.0
    """How long a finished request can still be read and joined by its id."""
    max_retained: int = 10_000
    """Finished requests kept at most, the oldest go first."""
    starvation_bound_s: float | None = None
    """Seconds after its arrival from which no request of the same priority that arrived later
    gets a slot before it; under a preemptive policy it then takes the slot of a younger one,
    and is preempted no more. None: no bound."""
    record_interval_s: float = 0.25
    """A running request's record is written anew at most so often."""
    learnt_interval_s: float = 1.0
    """What the policy has learnt is stored at most so often."""

    def __post_init__(self) -> None:
        for name in (
            "draft_tokens",
            "max_queued_tokens",
            "max_queued_requests",
            "max_retained",
            "step_credit",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
            least = 0 if name == "max_retained" else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name.endswith("_s") and value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{entry.name} must be a positive number of seconds, not {value!r}")
        if self.lease_duration_s < self.session_timeout_s:
            raise ValueError(
                f"lease_duration_s ({self.lease_duration_s}) must not be below session_timeout_s "
                f"({self.session_timeout_s}): a silent worker is given up before its leases run out"
            )
