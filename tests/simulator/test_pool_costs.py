"""The costs that a pool tells of itself are those that it has."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from scheduler_svc.core.records import Request, Tick
from scheduler_svc.store.inspector import EventView
from simulator.mixes import make_mix
from simulator.pool_costs import Decoding, pool_costs, replay, served
from simulator.replay import Replay, simulate
from simulator.workload import Job, Workload, rescale

WORKER = {"slots": 2, "prefill_token_s": 0.0003, "switch_s": 0.001}


def record(**fields: Any) -> dict[str, Any]:
    """Of a request that got its slot at 1 s, with a prompt of one token."""
    usual = {
        "worker_id": "w",
        "preemptions": 0,
        "first_scheduled_s": 1.0,
        "prompt_tokens": 1,
        "cached_tokens": 0,
    }
    return usual | fields


def workload(*records: dict[str, Any]) -> Workload:
    return tuple(
        Job(
            each["first_scheduled_s"],
            (1,) * each["steps"],
            each["prompt_tokens"],
            "",
            None,
            each["cached_tokens"],
        )
        for each in records
    )


def test_one_alone_tells_its_step_and_its_start() -> None:
    # 40 tokens of prefill, 12 ms; then 11 steps of 20 ms, the first until 1.042 s.
    alone = record(first_token_s=1.042, finished_s=1.242, steps=11, prompt_tokens=51, cached_tokens=10)
    told = pool_costs([served(alone, [])], workload(alone), [WORKER])
    assert told is not None
    measured = (told.slots, told.step_ms, told.row_ms, told.prefill_ms, told.switch_ms, told.start_ms)
    assert measured == pytest.approx((2, 20.0, 0.0, 0.3, 1.0, 10.0))
    assert told.options() == (
        "--slots 2 --draft-ms 0 --verify-ms 20.000 --row-ms 0.000 --prefill-ms 0.3000 --switch-ms 1.000 "
        "--start-ms 10.000"
    )
    assert told.options(60.0) == told.options() + " --starvation-bound-s 60"


def test_the_prefill_of_others_is_no_part_of_a_step() -> None:
    """While the first does ten steps of 20 ms the second is prefilled for 15 ms, in two parts."""
    first = record(first_token_s=1.020, finished_s=1.235, steps=11)
    second = record(first_scheduled_s=1.1, first_token_s=1.155, finished_s=1.235, steps=5, prompt_tokens=51)
    told = pool_costs([served(first, []), served(second, [])], workload(first, second), [WORKER])
    assert told is not None
    assert told.step_ms == pytest.approx(20.0)
    assert told.start_ms == pytest.approx(0.0, abs=1e-3)


def test_an_outage_is_no_part_of_a_step_nor_of_a_start() -> None:
    """Of 20 requests, ten steps of 20 ms each, one stood still for a minute in the middle, and another one
    before its first token."""
    records = [
        record(first_scheduled_s=n, first_token_s=n + 0.03, finished_s=n + 0.23, steps=11)
        for n in range(1, 19)
    ]
    records.append(record(first_scheduled_s=20.0, first_token_s=20.03, finished_s=80.23, steps=11))
    records.append(record(first_scheduled_s=100.0, first_token_s=160.03, finished_s=160.23, steps=11))
    told = pool_costs([served(each, []) for each in records], workload(*records), [WORKER])
    assert told is not None
    assert (told.step_ms, told.row_ms, told.start_ms) == pytest.approx((20.0, 0.0, 10.0), abs=0.01)


def test_nothing_is_made_up() -> None:
    whole = record(first_token_s=1.1, finished_s=2.0, steps=9)
    for fields, workers in (
        (whole | {"preemptions": 1}, [WORKER]),
        (whole, []),
        (whole | {"finished_s": 1.1, "steps": 1}, [WORKER]),
    ):
        assert pool_costs([served(fields, [])], workload(fields), workers) is None


def test_a_step_of_two_is_told_from_a_step_of_one() -> None:
    """Alone for five steps of 10 ms, then together for five of 14, then alone again."""
    first = record(first_token_s=1.0, finished_s=1.17, steps=16, first_scheduled_s=0.99)
    second = record(first_token_s=1.05, finished_s=1.12, steps=6, first_scheduled_s=1.04)
    told = pool_costs([served(first, []), served(second, [])], workload(first, second), [WORKER])
    assert told is not None
    assert (told.step_ms, told.row_ms) == pytest.approx((10.0, 4.0), rel=0.01)


def test_a_preempted_request_decodes_while_it_holds_a_slot() -> None:
    """The store's clock is 5 s behind the leader's."""
    events = [
        EventView(-4.0, "submitted", "", ""),
        EventView(-4.0, "leased", "w", ""),
        EventView(-3.5, "preempted", "w", ""),
        EventView(-3.0, "leased", "v", ""),
        EventView(-2.0, "finished", "v", ""),
    ]
    fields = record(first_token_s=1.1, finished_s=3.0, steps=9, preemptions=1)
    assert list(served(fields, events).decoding) == [Decoding("w", 1.1, 1.5), Decoding("v", 2.0, 3.0)]
    assert not served(fields, events[3:]).decoding, "its first lease is not told any more"


@pytest.mark.parametrize(
    ("policy", "slots", "load", "prompts"),
    [
        ("fcfs", 2, 1.2, (1, 30)),
        ("fcfs", 8, 1.2, (1, 30, 300)),
        ("srpt", 2, 0.7, (60,)),
        ("srpt", 2, 1.2, (1, 30)),
    ],
)
def test_the_log_of_a_replay_foretells_that_replay(
    policy: str, slots: int, load: float, prompts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[Request] = []
    events: dict[str, list[EventView]] = defaultdict(list)
    send = Replay._send

    def watched(self: Replay, tick: Tick, decided_s: float) -> None:
        finished.extend(tick.commit.finished)
        for event in tick.commit.events:
            events[event.request_id].append(EventView(decided_s, event.kind, event.worker_id, event.detail))
        send(self, tick, decided_s)

    dice = random.Random(5)
    mix = make_mix(jobs=200, seed=5, length_error=0.3)
    mix = tuple(replace(job, prompt_tokens=dice.choice(prompts)) for job in mix)
    mix = rescale(mix, slots, load, 0.008)
    with monkeypatch.context() as watching:
        watching.setattr(Replay, "_send", watched)
        real = simulate(
            mix,
            policy,
            slots,
            None,
            draft_ms=0.0,
            verify_ms=6.0,
            row_ms=2.0,
            switch_ms=1.0,
            prefill_ms=0.3,
            start_ms=13.0,
            every_step=True,
        )
    names = (
        "preemptions",
        "first_scheduled_s",
        "first_token_s",
        "finished_s",
        "steps",
        "worker_id",
        "cached_tokens",
    )
    log = [
        served(
            {name: getattr(request, name) for name in names} | {"prompt_tokens": request.spec.prompt_tokens},
            events[request.request_id],
        )
        for request in sorted(finished, key=lambda request: request.arrival_seq)
    ]
    assert all(each.decoding for each in log if each.fields["steps"] > 1)
    told = pool_costs(log, mix, [WORKER | {"slots": slots}])
    assert told is not None
    assert told.step_ms + told.row_ms * (slots - 1) == pytest.approx(6.0 + 2.0 * (slots - 1), rel=0.02)
    # A record has an arrival's decision at the end of the step that it falls into, the replay at its arrival.
    assert told.start_ms == pytest.approx(13.0, abs=4.0)
    assert replay(mix, policy, told).mean_latency_s == pytest.approx(real.mean_latency_s, rel=0.02)
