from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from simulator.cli import simulate
from simulator.mixes import make_mix
from simulator.workload import write_workload


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "w.jsonl.gz"
    write_workload(path, make_mix(jobs=40))
    return path


def test_it_writes_the_figures_of_the_contract(workload: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = (
        "--policies fcfs,srpt,laps-sd --slots 4 --load 0.9 --draft-tokens 4 --draft-ms 2 --verify-ms 24"
    )
    command = [str(workload), *arguments.split(), "--switch-ms", "1", "--seed", "0", "--json", str(out)]
    first = CliRunner().invoke(simulate, command)
    assert first.exit_code == 0, first.output
    figures = json.loads(out.read_text())["policies"]
    assert list(figures) == ["fcfs", "srpt", "laps-sd"]
    named = {"mean_latency_s", "p50_latency_s", "p90_latency_s", "p99_latency_s", "mean_slowdown", "switches"}
    assert named | {"makespan_s"} <= figures["fcfs"].keys()
    written = out.read_bytes()
    again = CliRunner().invoke(simulate, command)
    assert again.stdout == first.stdout
    assert out.read_bytes() == written


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--policies", "best"], "not a policy"),
        (["--slots", "0"], "slots"),
        (["--load", "-1"], "load"),
        (["--verify-ms", "0"], "verify-ms"),
        (["--load", "nan"], "'--load': nan is not in the range"),
        (["--load", "1e-320"], "'--load': 1e-320 is not in the range"),
        (["--load", "inf"], "'--load': inf is not in the range"),
        (["--verify-ms", "nan"], "'--verify-ms': nan is not in the range"),
        (["--verify-ms", "inf"], "'--verify-ms': inf is not in the range"),
        (["--draft-ms", "nan"], "'--draft-ms': nan is not in the range"),
        (["--switch-ms", "inf"], "'--switch-ms': inf is not in the range"),
        (["--prefill-ms", "inf"], "'--prefill-ms': inf is not in the range"),
        (["--row-ms", "nan"], "'--row-ms': nan is not in the range"),
        (["--start-ms", "inf"], "'--start-ms': inf is not in the range"),
        (["--start-ms", "nan"], "'--start-ms': nan is not in the range"),
        (["--length-error", "nan"], "'--length-error': nan is not in the range"),
        (["--length-error", "1e6"], "'--length-error': 1000000.0 is not in the range"),
        (["--starvation-bound-s", "inf"], "'--starvation-bound-s': inf is not in the range"),
        (["--draft-tokens", "1025"], "'--draft-tokens': 1025 is not in the range"),
        (["--verify-ms", "1e6", "--load", "1e-6"], "at load 1e-06 the arrivals span"),
    ],
)
def test_wrong_arguments_are_named(workload: Path, arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(simulate, [str(workload), *arguments])
    assert result.exit_code != 0
    assert complaint in result.output


def test_a_wrong_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text("nonsense\n")
    result = CliRunner().invoke(simulate, [str(path)])
    assert result.exit_code == 1
    assert "w.jsonl:1" in result.output


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_a_plot_without_matplotlib_says_what_to_install(workload: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(simulate, [str(workload), "--plot", str(tmp_path / "p.png")])
    assert result.exit_code == 1
    assert "laps[plot]" in result.output


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_plot_is_drawn(workload: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    result = CliRunner().invoke(simulate, [str(workload), "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_policies_that_rank_by_predictions_are_named_where_there_are_none(
    workload: Path, tmp_path: Path
) -> None:
    blind, out = tmp_path / "blind.jsonl", tmp_path / "out.json"
    jobs = make_mix(jobs=40)
    write_workload(blind, tuple(replace(job, predicted_output_tokens=None) for job in jobs))

    def said(path: Path, *arguments: str) -> str:
        done = CliRunner().invoke(simulate, [str(path), "--slots", "2", *arguments])
        assert done.exit_code == 0, done.output
        return done.stderr.strip()

    told = f"{blind}: no request has predicted_output_tokens: "
    assert said(blind, "--policies", "fcfs,sjf,srpt", "--json", str(out)) == (
        f"{told}sjf and srpt then rank as fcfs does; --length-error predicts"
    )
    figures = json.loads(out.read_text())["policies"]
    assert figures["sjf"] == figures["srpt"] == figures["fcfs"]
    assert said(blind, "--policies", "srpt") == (
        f"{told}srpt then ranks as fcfs does; --length-error predicts"
    )
    assert said(blind, "--policies", "fcfs,laps-sd") == ""
    assert said(blind, "--policies", "srpt", "--length-error", "0.3") == ""
    assert said(workload, "--policies", "srpt") == ""
    write_workload(blind, (replace(jobs[0], predicted_output_tokens=None), *jobs[1:]))
    assert said(blind, "--policies", "srpt") == ""
