from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from laps.cli import main
from simulator.convert import from_azure, from_spec_bench
from simulator.mixes import make_mix
from simulator.pool_log import steps_of
from simulator.workload import WorkloadError, read_workload, write_workload
from simulator.workload_cli import workload as command

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
2023-11-16 18:15:51.2305900,879,0
2023-11-16 18:16:46.6805900,91,16
"""


def test_the_azure_trace_gives_arrivals_and_lengths() -> None:
    made = from_azure(TRACE.splitlines())
    assert [job.arrival_s for job in made] == pytest.approx([0.0, 4.25, 60.0])
    assert [job.output_tokens for job in made] == [44, 109, 16], "a request without output is left out"
    assert [job.prompt_tokens for job in made] == [374, 396, 91]
    assert made == from_azure(TRACE.splitlines())
    # Nor does it count as one of those that are asked for.
    assert [job.output_tokens for job in from_azure(TRACE.splitlines(), limit=3)] == [44, 109, 16]
    assert [job.output_tokens for job in from_azure(TRACE.splitlines(), limit=2)] == [44, 109]


def test_the_azure_trace_takes_the_acceptance_that_is_asked_for() -> None:
    rows = "".join(f"2023-11-16 18:15:{second:02}.0,10,2000\n" for second in range(30))
    trace = ("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows).splitlines()
    made = from_azure(trace, tokens_per_step=3.0, draft_tokens=4)
    assert sum(job.output_tokens for job in made) / sum(job.steps for job in made) == pytest.approx(3.0, 0.02)
    donors = make_mix(jobs=5, seed=1)
    followed = from_azure(trace, acceptance=donors)
    beginnings = [donor.emitted_per_step for donor in donors]
    assert all(any(job.emitted_per_step[:4] == steps[:4] for steps in beginnings) for job in followed)
    assert all(job.output_tokens == 2000 for job in followed)
    with pytest.raises(ValueError, match="between 1 and 5"):
        from_azure(trace, tokens_per_step=6.0)


def test_timestamps_with_and_without_fractions_and_zones() -> None:
    """Azure's traces of 2023 have seven decimals and no zone, those of 2024 six or none, and a zone."""
    stamps = [
        "2024-05-10 00:00:00.009930+00:00",
        "2024-05-10 00:00:01+00:00",
        "2024-05-10 00:00:02.0",
        "2024-05-10 00:00:03",
        "2024-05-10T00:00:04.25Z",
        "2024-05-10 02:00:05.5000000+02:00",
        "2024-05-09 19:30:06.123456789-0430",
        " 2024-05-10 00:00:07.0099300",
    ]
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", *(f"{stamp},10,5" for stamp in stamps)]
    arrivals_s = [job.arrival_s for job in from_azure(lines)]
    assert arrivals_s == pytest.approx([0.0, 0.99007, 1.99007, 2.99007, 4.24007, 5.49007, 6.113526, 7.0])


@pytest.mark.parametrize(
    "stamp", ["yesterday", "", "1715299200", "2024-05-10 25:00:00", "0001-01-01 00:00:00+01:00", "x" * 1000]
)
def test_another_timestamp_is_named_with_its_line(stamp: str) -> None:
    lines = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2024-05-10 00:00:01+00:00,10,5",
        f"{stamp},10,5",
    ]
    with pytest.raises(WorkloadError, match=r"^line 3: TIMESTAMP must be a date and a time, not .{2,42}$"):
        from_azure(lines)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2", "TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
    ],
)
def test_a_wrong_trace_is_named(text: str, complaint: str) -> None:
    with pytest.raises(WorkloadError, match=complaint):
        from_azure(text.splitlines())


def answer(**more: object) -> str:
    return json.dumps({"question_id": 81, "category": "writing", "choices": [{"index": 0, **more}]})


def test_spec_bench_answers_give_acceptance_by_turn() -> None:
    lines = [
        answer(accept_lengths=[1, 3, 2, 4, 1], decoding_steps=[2, 3]),
        answer(accept_lengths=[2, 2]),
    ]
    made = from_spec_bench(lines)
    assert sorted(job.emitted_per_step for job in made) == [(1, 3), (2, 2), (2, 4, 1)]
    assert {job.task for job in made} == {"writing"}
    assert made[0].arrival_s == 0.0
    added = from_spec_bench(lines, accepted_only=True)
    assert sorted(job.emitted_per_step for job in added) == [(2, 4), (3, 3), (3, 5, 2)]
    with pytest.raises(WorkloadError, match="line 2"):
        from_spec_bench([lines[0], answer()])


@pytest.mark.parametrize(
    "more",
    [
        {"decoding_steps": [2, 1], "new_tokens": [9, 5]},
        {"idxs": [2, 1], "new_tokens": [9, 5]},
        {"decoding_steps": [3, 2], "new_tokens": [9, 5]},
        {"decoding_steps": [8, 4], "new_tokens": [9, 5]},
        {"new_tokens": [9, 5]},
        {"decoding_steps": [3, 2]},
        {"decoding_steps": [2, 1]},
        # With the token that prefill gave, which is no step's.
        {"idxs": [2, 1], "new_tokens": [10, 6]},
        {"turns": ["a", "b"], "decoding_steps": [3, 2], "new_tokens": None},
    ],
)
def test_turns_are_told_apart_whatever_the_method_writes_of_its_steps(more: dict[str, object]) -> None:
    said: list[str] = []
    made = from_spec_bench([answer(accept_lengths=[3, 4, 2, 4, 1], **more)], warn=said.append)
    assert sorted(job.emitted_per_step for job in made) == [(3, 4, 2), (4, 1)]
    assert not said
    less = answer(accept_lengths=[2, 3, 1, 3, 0], **more)
    added = from_spec_bench([less], accepted_only=True)
    assert sorted(job.emitted_per_step for job in added) == [(3, 4, 2), (4, 1)]


def test_steps_without_a_token_at_the_end_of_a_turn_stay_in_it_where_steps_are_counted() -> None:
    lengths = [3, 0, 2, 0]
    counted = from_spec_bench([answer(accept_lengths=lengths, decoding_steps=[2, 2], new_tokens=[3, 2])])
    assert sorted(job.emitted_per_step for job in counted) == [(2, 0), (3, 0)]
    guessed = from_spec_bench([answer(accept_lengths=lengths, new_tokens=[3, 2])])
    assert sorted(job.emitted_per_step for job in guessed) == [(0, 2, 0), (3,)]
    empty = from_spec_bench([answer(accept_lengths=lengths, new_tokens=[0, 3, 0, 2])])
    assert sorted(job.emitted_per_step for job in empty) == [(0, 2, 0), (3,)]


def test_turns_that_nothing_tells_apart_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, out = tmp_path / "answers.jsonl", tmp_path / "out.jsonl"
    one, two = ["a"], ["a", "b"]
    answers.write_text(
        "\n".join(
            [
                # PLD, whose last step was cut at the limit.
                answer(accept_lengths=[3, 4, 2, 4], turns=two, decoding_steps=[8, 2], new_tokens=[9, 3]),
                answer(accept_lengths=[3, 4], turns=two, decoding_steps="?"),
                answer(accept_lengths=[3, 4], turns=one, decoding_steps=[9], new_tokens=[8]),
                answer(accept_lengths=[3, 4]),
            ]
        )
    )
    assert main(["workload", "spec-bench", str(answers), str(out)]) == 0
    assert capsys.readouterr().err == (
        f"{answers}: 2 answers of several turns became one request each: "
        "neither new_tokens nor decoding_steps tells their turns apart\n"
    )
    assert sorted(job.emitted_per_step for job in read_workload(out)) == [(3, 4)] * 3 + [(3, 4, 2, 4)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_steps_of_a_merged_log_add_up(accepted: list[int], undrafted: int) -> None:
    histogram = [accepted.count(count) for count in range(5)]
    steps, tokens = len(accepted) + undrafted, sum(accepted) + len(accepted) + undrafted
    made = steps_of("r", steps, tokens, histogram, [tokens])
    assert sum(made) == tokens
    if steps > 1:
        assert len(made) == steps
        assert sorted(made) == sorted([count + 1 for count in accepted] + [1] * undrafted)
    cut = steps_of("r", steps, max(1, tokens - 1), histogram, [])
    assert sum(cut) == max(1, tokens - 1)


def test_the_command_makes_files_that_can_be_read(tmp_path: Path) -> None:
    trace, donors, out = tmp_path / "trace.csv.gz", tmp_path / "donors.jsonl", tmp_path / "out.jsonl.gz"
    trace.write_bytes(gzip.compress(TRACE.encode()))
    write_workload(donors, make_mix(jobs=3))
    arguments = ["azure", str(trace), str(out), "--acceptance", str(donors), "--limit", "2"]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "2 requests in 4.2 s, 153 tokens" in done.output
    assert [job.output_tokens for job in read_workload(out)] == [44, 109]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("{}\n")
    failed = CliRunner().invoke(command, ["spec-bench", str(answers), str(out)])
    assert failed.exit_code == 1
    assert "line 1" in failed.output
