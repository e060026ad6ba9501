"""What a seed decides before anything runs: sizes, rates, settings, and which faults there will be."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from scheduler_svc.core.policies import servable_policies
from scheduler_svc.core.settings import SchedulerSettings


@dataclass(frozen=True)
class Knobs:
    seed: int
    policy: str
    core: SchedulerSettings
    schedulers: int
    workers: int
    gateways: int
    slots: int
    spare_slots: int
    host_rows: int
    clients: int
    arrival_s: float
    """Clients come within this time."""
    faults_s: float
    """From this instant on nothing new goes wrong."""
    fault_interval_s: float
    """Mean time between two faults."""
    tick_interval_s: float
    report_interval_s: float
    leader_ttl_s: float
    gateway_grace_s: float
    disconnect_grace_s: float
    latency_s: float
    slow_share: float
    store_latency_s: float
    store_lost_share: float
    store_fails_after_share: float
    store_late_share: float
    store_detour_share: float
    max_streams: int
    stream_buffer_tokens: int
    pending_bytes: int
    """What the scheduler keeps for a gateway that does not read."""
    mean_length_tokens: int
    window_messages: int
    clock_skew_s: float
    ending: str
    """`rollback` or `damage`: how the store loses something in the end, which only an alarm can answer."""
    at_once: str
    """What happens in the same moment: `` nothing, or `leader` or `schedulers` (all of them) crash."""
    liars: int
    """Workers that sometimes report what is not so."""
    kinds: tuple[str, ...] = field(default=())
    """Faults that this seed has."""


KINDS = (
    "crash scheduler",
    "crash worker",
    "crash gateway",
    "freeze scheduler",
    "freeze worker",
    "freeze gateway",
    "break links",
    "cut links",
    "store down",
    "store hangs",
    "clock jumps",
    "store clock jumps",
    "stop scheduler",
    "stop worker",
    "stop gateway",
    "store full",
)


def knobs_of(seed: int) -> Knobs:
    rng = random.Random(f"{seed} knobs")
    workers = rng.randint(1, 3)
    slots = rng.randint(1, 4)
    clients = rng.randint(5, 22)
    faults_s = rng.uniform(2.0, 9.0)
    session_timeout_s = rng.choice((1.0, 2.0, 5.0))
    kinds = rng.sample(KINDS, rng.randint(0, len(KINDS)))
    ending = rng.choices(("", "rollback", "damage"), (0.86, 0.08, 0.06))[0]
    rough = rng.random() < 0.6
    if rng.random() < 0.1:
        # Quiet: no excuse for anything that is late.
        kinds, rough, ending = [], False, ""
    return Knobs(
        seed=seed,
        policy=rng.choice(servable_policies()),
        core=SchedulerSettings(
            draft_tokens=rng.randint(1, 6),
            step_credit=rng.choice((1, 2, 8, 64)),
            lease_duration_s=session_timeout_s * rng.choice((1.0, 2.0)),
            session_timeout_s=session_timeout_s,
            max_queued_requests=rng.choice((3, 10, 1000, 1000, 1000)),
            max_queued_tokens=rng.choice((60, 1_000_000, 1_000_000)),
            retention_s=rng.choice((2.0, 10.0, 600.0)),
            max_retained=rng.choice((2, 10_000)),
            starvation_bound_s=rng.choice((None, 2.0, 10.0)),
        ),
        schedulers=rng.randint(1, 3),
        workers=workers,
        gateways=rng.randint(1, 3),
        slots=slots,
        spare_slots=rng.randint(0, 4),
        host_rows=rng.choice((0, 3, 100)),
        clients=clients,
        arrival_s=faults_s * rng.uniform(0.2, 1.0),
        faults_s=faults_s,
        fault_interval_s=rng.choice((0.4, 1.0, 2.0)),
        tick_interval_s=rng.choice((0.0, 0.002, 0.02)),
        report_interval_s=random.Random(f"{seed} reports").choice((0.0, 0.0, 0.025, 0.2)),
        leader_ttl_s=rng.choice((1.0, 2.0, 3.0)),
        gateway_grace_s=session_timeout_s,
        disconnect_grace_s=rng.choice((0.5, 3.0)),
        latency_s=rng.choice((0.0002, 0.002, 0.02)),
        slow_share=rng.choice((0.0, 0.01)) if rough else 0.0,
        store_latency_s=rng.choice((0.0005, 0.004, 0.03)),
        store_lost_share=rng.choice((0.0, 0.01, 0.05)) if rough else 0.0,
        store_fails_after_share=rng.choice((0.0, 0.01, 0.05)) if rough else 0.0,
        store_late_share=rng.choice((0.0, 0.003)) if rough else 0.0,
        store_detour_share=random.Random(f"{seed} detours").choice((0.0, 0.0, 0.02)) if rough else 0.0,
        max_streams=rng.choice((4, 1000, 1000, 1000)),
        stream_buffer_tokens=rng.choice((20, 4096)),
        pending_bytes=rng.choice((256, 8 << 20)),
        mean_length_tokens=rng.choice((15, 60, 200)),
        window_messages=rng.choice((1, 4, 64)),
        clock_skew_s=rng.choice((0.0, 0.3, 5.0)),
        ending=ending,
        at_once=random.Random(f"{seed} at once").choice(("", "leader", "leader", "schedulers"))
        if ending == "rollback"
        else "",
        liars=int(bool(kinds) and random.Random(f"{seed} liars").random() < 0.2),
        kinds=tuple(kinds),
    )
