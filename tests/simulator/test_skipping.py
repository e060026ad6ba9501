"""Skipping steps in which nothing can be decided gives the very results of reporting every one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.core.policies import policies
from simulator.mixes import make_mix
from simulator.replay import simulate


@pytest.mark.parametrize("policy", list(policies()))
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    slots=st.integers(1, 5),
    load=st.sampled_from((0.6, 1.0, 1.4)),
    switch_ms=st.sampled_from((0.0, 2.0, 30.0)),
    bound_s=st.sampled_from((None, None, 3.0)),
    prefill_ms=st.sampled_from((0.0, 0.0, 0.3, 4.0)),
    row_ms=st.sampled_from((0.0, 0.0, 3.0)),
    start_ms=st.sampled_from((0.0, 0.0, 5.0, 80.0)),
)
def test_skipped_steps_change_nothing(
    policy: str,
    seed: int,
    slots: int,
    load: float,
    switch_ms: float,
    bound_s: float | None,
    prefill_ms: float,
    row_ms: float,
    start_ms: float,
) -> None:
    mix = make_mix(jobs=40, seed=seed, length_error=0.6)
    lengths = random.Random(seed)
    mix = tuple(replace(job, prompt_tokens=lengths.choice((1, 20, 300))) for job in mix)

    def replay(every_step: bool) -> object:
        return simulate(
            mix,
            policy,
            slots,
            load,
            switch_ms=switch_ms,
            prefill_ms=prefill_ms,
            row_ms=row_ms,
            start_ms=start_ms,
            starvation_bound_s=bound_s,
            record_stays=True,
            every_step=every_step,
        )

    assert replay(False) == replay(True)
