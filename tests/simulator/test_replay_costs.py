"""What prefill and the way of a decision to the worker cost, computed by hand."""

from __future__ import annotations

from simulator.prefill import LEAST_TOKENS, SHARE, Prefill
from simulator.replay import simulate
from simulator.result import Result
from simulator.workload import Job, Workload, order
from worker_svc.engine import engine, prefill


def job(arrival_ms: float, steps: int, prompt_tokens: int = 1, cached_tokens: int = 0) -> Job:
    return Job(arrival_ms / 1000.0, (1,) * steps, prompt_tokens, "", float(steps), cached_tokens)


def replayed(jobs: Workload, policy: str = "fcfs", slots: int = 1, **costs_ms: float) -> Result:
    """With steps of 10 ms and returns of 1 ms."""
    return simulate(
        order(jobs),
        policy,
        slots,
        None,
        draft_ms=0.0,
        verify_ms=10.0,
        switch_ms=1.0,
        record_stays=True,
        **costs_ms,  # type: ignore[arg-type]
    )


def in_ms(seconds: list[float]) -> list[float]:
    return [round(1000.0 * each, 6) for each in seconds]


def test_a_prompt_is_computed_whole_where_nobody_decodes() -> None:
    # Five tokens before the last one, then two steps of which the first is the same step.
    result = replayed((job(0, 2, prompt_tokens=6),), prefill_ms=1.0)
    assert in_ms(result.latencies_s) == [25.0]
    assert result.steps == 2
    cached = replayed((job(0, 2, prompt_tokens=6, cached_tokens=3),), prefill_ms=1.0)
    assert in_ms(cached.latencies_s) == [22.0]


def test_a_prompt_is_computed_in_parts_beside_one_that_decodes() -> None:
    """30 tokens at 1 ms: 16, the least, in the step from 10 to 36 ms, and 14 in that from 36 to 60, of which
    the second request takes part."""
    result = replayed((job(0, 6), job(5, 3, prompt_tokens=31)), slots=2, prefill_ms=1.0)
    assert in_ms(result.latencies_s) == [90.0, 75.0]
    # At 0.2 ms a token the share of the step decides: 35 tokens in 7 ms, then 5 in 1 ms.
    result = replayed((job(0, 6), job(5, 3, prompt_tokens=41)), slots=2, prefill_ms=0.2)
    assert in_ms(result.latencies_s) == [68.0, 53.0]


def test_prompts_are_computed_in_order_of_entry() -> None:
    """Two wait and one decodes, so a step computes prompts for twice the share: 14 ms."""
    jobs = (job(0, 9), job(5, 1, prompt_tokens=21), job(6, 1, prompt_tokens=11))
    # From 10 to 36 ms 16 tokens of the first; then 4, and 10 of the second: 24 ms, and both take part.
    result = replayed(jobs, slots=3, prefill_ms=1.0)
    assert in_ms(result.latencies_s)[1:] == [55.0, 54.0]


def test_one_that_is_preempted_in_its_prompt_goes_on_where_it_was() -> None:
    """The first is in its prompt beside one that decodes until the third, shorter, takes its slot."""
    jobs = (job(0, 4), job(1, 8, prompt_tokens=21), job(11, 1))
    result = replayed(jobs, "srpt", slots=2, prefill_ms=1.0)
    # Steps end at 10, 36 (16 tokens), 46 (the third alone beside the first) and, after the return, at
    # 61 (1 + 4 + 10): the second has its first of eight tokens.
    assert in_ms(result.latencies_s) == [61.0, 130.0, 35.0]
    assert result.switches == 1


def test_a_slot_stands_empty_until_the_decision_has_arrived() -> None:
    result = replayed((job(0, 2), job(0, 2)), start_ms=25.0)
    assert in_ms(result.latencies_s) == [45.0, 90.0]
    assert in_ms(result.first_waits_s) == [25.0, 70.0]


def test_decisions_take_effect_between_steps_and_their_mean_is_kept() -> None:
    """Beside a long request: one enters in time at 35 ms, the next waits until 65 instead of 60, and the last
    is 5 ms early therefore."""
    jobs = (job(0, 20), job(20, 1), job(21, 1), job(22, 1))
    result = replayed(jobs, slots=2, start_ms=15.0)
    assert in_ms([stay.begin_s for stay in sorted(result.stays, key=lambda stay: stay.job)]) == [
        15,
        35,
        65,
        85,
    ]
    assert in_ms(result.latencies_s) == [215.0, 25.0, 54.0, 73.0]


def test_one_that_is_preempted_goes_on_until_its_worker_knows() -> None:
    """The second arrives at 25 ms, which the worker knows at 37 and acts on at 42. The first has done three
    steps then, and returns 7 ms after the end of the second: 12, less the 5 that were lost before."""
    result = replayed((job(0, 10), job(25, 2)), "srpt", start_ms=12.0)
    assert in_ms(result.latencies_s) == [140.0, 37.0]
    assert result.switches == 1


def test_what_costs_nothing_changes_nothing() -> None:
    jobs = (job(0, 4, prompt_tokens=99), job(3, 2, prompt_tokens=50), job(11, 1, prompt_tokens=7))
    assert in_ms(replayed(jobs, slots=2).latencies_s) == [40.0, 27.0, 29.0]


def test_the_engine_has_the_same_rules() -> None:
    assert engine._PREFILL_SHARE == SHARE
    assert prefill._LEAST_TOKENS == LEAST_TOKENS


def test_prefill_gets_on_in_every_step() -> None:
    class Prompt:
        prompt_left = 100

    for decoding, steps in ((0, 1), (1, 7), (5, 7)):
        waiting = Prefill(1.0)
        waiting.enter(Prompt())
        seconds = [waiting.compute(decoding, 0.001) for _ in range(7) if waiting]
        assert (sum(seconds), len(seconds)) == (100.0, steps)


def test_a_step_is_longer_for_each_further_request() -> None:
    # Together until 14 and 28 ms, then alone.
    result = replayed((job(0, 4), job(0, 2)), slots=2, row_ms=4.0)
    assert in_ms(result.latencies_s) == [48.0, 28.0]
