from __future__ import annotations

from pathlib import Path

import pytest

from simulator.mixes import make_mix
from simulator.workload import WorkloadError, read_workload, rescale, with_length_error, write_workload


@pytest.mark.parametrize("name", ["w.jsonl", "w.jsonl.gz"])
def test_a_workload_survives_its_file(tmp_path: Path, name: str) -> None:
    workload = make_mix(jobs=20)
    write_workload(tmp_path / name, workload)
    read = read_workload(tmp_path / name)
    assert [job.emitted_per_step for job in read] == [job.emitted_per_step for job in workload]
    assert [job.task for job in read] == [job.task for job in workload]
    write_workload(tmp_path / f"again-{name}", read)
    assert (tmp_path / f"again-{name}").read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", ":1:"),
        ("[]", "JSON object"),
        ('{"arrival_s": 1}', "emitted_per_step is missing"),
        ('{"arrival_s": 1, "emitted_per_step": []}', "at least one"),
        ('{"arrival_s": 1, "emitted_per_step": [-1]}', "at least 0"),
        ('{"arrival_s": -1, "emitted_per_step": [1]}', "arrival_s"),
        ('{"arrival_s": NaN, "emitted_per_step": [1]}', "arrival_s"),
        ('{"arrival_s": 1, "emitted_per_step": [1], "predicted_output_tokens": -3}', "predicted"),
        ("", "no requests"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(WorkloadError, match=complaint):
        read_workload(path)


def test_a_file_that_is_no_gzip(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl.gz"
    path.write_text("{}")
    with pytest.raises(WorkloadError):
        read_workload(path)


def test_rescaling_gives_the_asked_load() -> None:
    workload = rescale(make_mix(jobs=50), slots=4, load=0.8, step_s=0.032)
    work_s = sum(job.steps for job in workload) * 0.032
    assert work_s / (4 * (workload[-1].arrival_s - workload[0].arrival_s)) == pytest.approx(0.8)
    with pytest.raises(WorkloadError, match="same instant"):
        rescale(workload[:1], 1, 1.0, 0.032)


def test_length_error_of_zero_is_exact() -> None:
    workload = with_length_error(make_mix(jobs=10, length_error=1.0), 0.0, seed=5)
    assert all(job.predicted_output_tokens == job.output_tokens for job in workload)
