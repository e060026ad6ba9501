"""What workers report of their steps: what is taken over, and what is refused."""

from __future__ import annotations

import pytest

from scheduler_svc.core.records import (
    FinishReason,
    RevokeReason,
    RowFinish,
    StepReport,
)

from .house import FakeWorker, pack, running, scheduler, spec


def test_an_engine_error_fails_the_request() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    request, _ = core.submit(spec("a"), 0.0)
    assert request is not None
    running(core, fake)
    core.report(StepReport("w", errors={request.lease_id: "out of memory"}), 0.1)
    assert request.finish_reason is FinishReason.ERROR
    assert request.error == "out of memory"


@pytest.mark.parametrize(
    ("offset", "emitted", "drafted", "accepted"),
    [(1, 1, 4, 0), (0, 3, 4, 1), (0, 21, 30, 20), (0, 1, 0, 1), (0, 1, 4, -1), (-1, 1, 4, 0)],
)
def test_rows_that_contradict_the_store_are_refused(
    offset: int, emitted: int, drafted: int, accepted: int
) -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    request, _ = core.submit(spec("a"), 0.0)
    assert request is not None
    running(core, fake)
    for attempt in range(1, 4):
        core.report(
            StepReport(
                "w",
                [request.lease_id],
                [offset],
                [emitted],
                [drafted],
                [accepted],
                token_ids=pack(*range(emitted)),
            ),
            0.1,
        )
        assert core.counters.rows_refused == attempt
        assert request.output_tokens == 0
        if attempt < 3:
            tick = core.tick(0.1)
            assert [revoke.reason for revoke in tick.revokes] == [RevokeReason.ENDED]
            assert [grant.has_context for grant in tick.grants] == [True]
            core.check_invariants()
    assert request.finish_reason is FinishReason.ERROR


def test_what_is_emitted_tells_of_its_steps_whatever_rows_are_left_out() -> None:
    core, fake = scheduler(), FakeWorker("w", 3)
    for name in "abc":
        core.submit(spec(name), 0.0)
    running(core, fake)
    report = fake.step({"a": 3, "b": 0, "c": 2}, step_s=0.05)
    report.drafted_counts, report.accepted_counts = [4, 3, 2], [2, 0, 1]
    core.report(report, 0.1)
    [emitted] = core.tick(0.1).commit.emitted
    assert list(emitted.request_ids) == ["a", "c"]
    assert (list(emitted.drafted), list(emitted.accepted), emitted.step_s) == ([4, 2], [2, 1], 0.05)
    core.report(fake.step(1), 0.2)
    [emitted] = core.tick(0.2).commit.emitted
    assert len(emitted.drafted) == len(emitted.accepted) == len(emitted.request_ids) == 3


def test_columns_that_do_not_fit_together_are_refused() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    request, _ = core.submit(spec("a"), 0.0)
    assert request is not None
    running(core, fake)
    lease = request.lease_id
    core.report(StepReport("w", [lease], [0], [2], [4], [1], token_ids=pack(1)), 0.1)
    assert core.counters.reports_refused == 1
    core.tick(0.1)
    lease = request.lease_id
    core.report(StepReport("w", [lease, lease], [0, 1], [1, 1], [4, 4], [0, 0], token_ids=pack(1, 2)), 0.1)
    assert core.counters.reports_refused == 2
    assert request.output_tokens == 0
    core.check_invariants()


def test_a_repeated_report_changes_nothing() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    request, _ = core.submit(spec("a"), 0.0)
    assert request is not None
    running(core, fake)
    report = fake.step(2)
    core.report(report, 0.1)
    core.report(report, 0.1)
    assert request.output_tokens == 2
    assert core.counters.rows_stale == 1
    assert core.counters.rows_refused == 0


def test_several_steps_in_one_tick_make_one_log_entry_unless_they_carry_logprobs() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    core.submit(spec("a"), 0.0)
    running(core, fake)
    core.report(fake.step(2), 0.1)
    core.report(fake.step(1), 0.1)
    with_logprobs = fake.step(1)
    with_logprobs.logprobs = {0: b"x"}
    core.report(with_logprobs, 0.1)
    core.report(fake.step(1), 0.1)
    commit = core.tick(0.2).commit
    rows = [(each.offsets, each.counts) for each in commit.emitted]
    assert rows == [([0], [2]), ([2], [1]), ([3], [1]), ([4], [1])]
    assert commit.logprobs == {2: b"x"}
    appended = commit.appended
    assert [(entry.entry, entry.offset, len(entry.token_ids) // 4, entry.logprobs) for entry in appended] == [
        (1, 0, 3, b""),
        (2, 3, 1, b"x"),
        (3, 4, 1, b""),
    ]


def test_steps_without_tokens_are_steps() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    request, _ = core.submit(spec("a"), 0.0)
    assert request is not None
    running(core, fake)
    core.report(fake.step(0), 0.1)
    assert request.steps == 1
    assert request.first_token_s is None
    assert not core.tick(0.1).commit.emitted


def test_a_stop_carries_what_matched() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    request, _ = core.submit(spec("a"), 0.0)
    assert request is not None
    running(core, fake)
    report = fake.step(1)
    report.finishes = {0: RowFinish(FinishReason.STOP, "END", 7)}
    core.report(report, 0.1)
    assert (request.finish_reason, request.matched_stop, request.matched_stop_token_id) == (
        FinishReason.STOP,
        "END",
        7,
    )


def test_a_running_record_is_written_now_and_then() -> None:
    core, fake = scheduler(record_interval_s=0.25), FakeWorker("w", 1)
    core.submit(spec("a", max_tokens=500), 0.0)
    running(core, fake)
    written = 0
    for step in range(1, 101):
        core.report(fake.step(1), step * 0.01)
        written += len(core.tick(step * 0.01).commit.changed)
    assert written == 4


def test_cached_prompt_tokens_are_those_of_the_first_row() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    request, _ = core.submit(spec("a", prompt_tokens=9), 0.0)
    assert request is not None
    running(core, fake)

    def report(offset: int, cached: int) -> None:
        core.report(
            StepReport(
                "w",
                [request.lease_id],
                [offset],
                [1],
                [0],
                [0],
                pack(100 + offset),
                cached_tokens={0: cached},
            ),
            0.1,
        )

    report(0, 5)
    report(1, 8)
    assert request.cached_tokens == 5
