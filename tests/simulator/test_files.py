"""A file that cannot be used ends a command with one line that names it, and its line where that is known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from simulator.cli import simulate
from simulator.mixes import make_mix
from simulator.workload import read_workload, write_workload
from simulator.workload_cli import workload

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\n"
LONG = "9" * 400


def complaint(command: click.Command, *arguments: str | Path) -> str:
    done = CliRunner().invoke(command, [str(each) for each in arguments])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    *_, last = done.stderr.splitlines()
    assert last.startswith("Error: "), done.stderr
    return last


def truncated(text: str) -> bytes:
    return gzip.compress(text.encode())[:-20]


def damaged(text: str) -> bytes:
    """Its deflate stream begins with a kind of block that there is not."""
    packed = bytearray(gzip.compress(text.encode(), mtime=0))
    packed[10] |= 0b110
    return bytes(packed)


@pytest.mark.parametrize("spoil", [truncated, damaged, lambda text: text.encode()])
def test_spoilt_compression(tmp_path: Path, spoil: object) -> None:
    assert callable(spoil)
    trace, answers, jobs = (tmp_path / name for name in ("t.csv.gz", "a.jsonl.gz", "w.jsonl.gz"))
    trace.write_bytes(spoil(HEAD + ROW * 2000))
    answers.write_bytes(spoil(json.dumps({"choices": [{"accept_lengths": [1]}]}) * 20))
    write_workload(tmp_path / "w.jsonl", make_mix(jobs=20))
    jobs.write_bytes(spoil((tmp_path / "w.jsonl").read_text()))
    out = tmp_path / "out.jsonl"
    assert f"{trace}: " in complaint(workload, "azure", trace, out)
    assert f"{answers}: " in complaint(workload, "spec-bench", answers, out)
    assert f"{jobs}: " in complaint(simulate, jobs)
    whole = tmp_path / "t.csv"
    whole.write_text(HEAD + ROW)
    told = complaint(workload, "azure", whole, out, "--acceptance", jobs)
    assert told.startswith(f"Error: {jobs}: "), "not the trace"
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{HEAD}{ROW}2023-11-16 18:15:47,1,{'9' * 200_000}\n", "t.csv: line 3: field larger than"),
        (f"{HEAD}{ROW}\n\n2023-11-16 18:15:47,1,\n", "t.csv: line 5: "),
        ("a,b\n", "t.csv: the first line must name"),
        (HEAD, "t.csv: no requests"),
    ],
)
def test_spoilt_traces(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert told in complaint(workload, "azure", tmp_path / "t.csv", tmp_path / "out.jsonl")


def test_a_trace_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes((HEAD + ROW).encode("utf-16"))
    assert "t.csv: 'utf-8' codec" in complaint(workload, "azure", tmp_path / "t.csv", tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    text = (HEAD + ROW).encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    arguments = ["azure", str(tmp_path / name), str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(workload, arguments)
    assert done.exit_code == 0, done.output
    assert [job.output_tokens for job in read_workload(tmp_path / "out.jsonl")] == [44]


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ("[1, 1e999]", "OverflowError"),
        ("[1, -2, 9]", "accept_lengths must be at least 0"),
        ("[-1]", "accept_lengths must be at least 0"),
        ("[" * 100_000, "RecursionError"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--accepted-only"]])
def test_spoilt_answers(tmp_path: Path, lengths: str, told: str, more: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"choices": [{"accept_lengths": [1]}]}\n{"choices": [{"accept_lengths": ' + lengths + "}]}\n"
    )
    last = complaint(workload, "spec-bench", path, tmp_path / "out.jsonl", *more)
    assert "a.jsonl: line 2: " in last
    assert told in last


@pytest.mark.parametrize(
    "entry",
    [
        '"prompt_tokens": 1e999',
        f'"predicted_output_tokens": {LONG}',
        '"cached_tokens": 1e999',
        '"task": ' + "[" * 100_000,
    ],
)
def test_numbers_beyond_any_use(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "w.jsonl"
    good = '{"arrival_s": 0, "emitted_per_step": [1]}\n'
    path.write_text(good + "\n" + '{"arrival_s": 1, "emitted_per_step": [1], ' + entry + "}\n" + good)
    assert "w.jsonl:3: " in complaint(simulate, path)


@pytest.mark.parametrize("unit", [1.0, 1e3])
def test_a_log_may_have_seconds_or_milliseconds_since_1970(tmp_path: Path, unit: float) -> None:
    figures = []
    for name, first in (("since.jsonl", unit * 1.7e9), ("plain.jsonl", 0.0)):
        path, out = tmp_path / name, tmp_path / f"{name}.json"
        # A burst, which that load stretches more than a hundred thousandfold.
        lines = [
            {"arrival_s": first + number / 1024, "emitted_per_step": [2] * (number + 30)}
            for number in range(20)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = CliRunner().invoke(simulate, [str(path), "--slots", "1", "--load", "0.01", "--json", str(out)])
        assert done.exit_code == 0, (done.output, done.exception)
        figures.append(json.loads(out.read_text()))
    assert figures[0] == figures[1]


def test_steps_that_no_scheduler_believes(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    good, longest, wrong = (
        json.dumps({"arrival_s": arrival_s, "emitted_per_step": [1, tokens]}) + "\n"
        for arrival_s, tokens in ((2, 1), (1, 1025), (0, 1026))
    )
    (tmp_path / "t.csv").write_text(HEAD + ROW)
    path.write_text(good + longest)
    done = CliRunner().invoke(simulate, [str(path)])
    assert done.exit_code == 0, (done.output, done.exception)
    path.write_text(good + "\n" + longest + wrong + good)
    told = f"{path}:4: emitted_per_step: a step emits 1025 tokens at most"
    assert told in complaint(simulate, path)
    assert told in complaint(
        workload, "azure", tmp_path / "t.csv", tmp_path / "out.jsonl", "--acceptance", path
    )


def test_arrivals_that_no_clock_reaches(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text("".join(f'{{"arrival_s": {at}, "emitted_per_step": [1]}}\n' for at in (0, 1e300)))
    told = f"{path}: as recorded the arrivals span 1e+300 s, too long to replay"
    assert told in complaint(simulate, path, "--as-recorded")
    done = CliRunner().invoke(simulate, [str(path)])
    assert done.exit_code == 0, "a load makes seconds of any unit"


def test_whole_numbers_that_no_time_can_be_made_of(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(
        '{"arrival_s": 0, "emitted_per_step": [1]}\n'
        '{"arrival_s": 1, "emitted_per_step": [1], "prompt_tokens": ' + LONG + "}\n"
    )
    assert "w.jsonl: a number in it is too large" in complaint(simulate, path, "--prefill-ms", "1")
