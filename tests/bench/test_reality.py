from __future__ import annotations

from pathlib import Path

import pytest

from bench.reality import KINDS, POLICIES, fill, ratio, text


def report() -> dict[str, object]:
    means = {"fcfs": (2.0, 2.1, 2.1, 2.2), "srpt": (1.0, 0.95, 1.3, 1.1), "laps-sd": (0.8, 0.8, 0.9, 0.9)}
    rows = {
        policy: {f"{kind}_mean_latency_s": mean for kind, mean in zip(KINDS, means[policy], strict=True)}
        for policy in POLICIES
    }
    told = {"mean": 0.8, "within_factor": 1.1}
    ratios = [{"of": "laps-sd", "to": "srpt", "real": told, "foretold": told}]
    return {"requests": 9, "rounds": 2, "slots": 2, "loads": {"1.3": {"policies": rows, "ratios": ratios}}}


def test_the_tables_say_by_how_much_it_was_wrong() -> None:
    made = text(report())
    assert "| srpt | 1.000 | 0.950 | -5.0% | 1.300 | +30.0% | 1.100 |" in made
    assert "Order, best first: real laps-sd, srpt, fcfs; foretold laps-sd, srpt, fcfs." in made
    assert "laps-sd / srpt: real 0.80 (within a factor of 1.10)" in made


def test_the_page_has_a_place_for_them(tmp_path: Path) -> None:
    page = tmp_path / "policies.md"
    page.write_text((Path(__file__).parents[2] / "docs" / "policies.md").read_text())
    before = page.read_text()
    for _ in range(2):
        fill(page, text(report()))
        assert page.read_text().count("| srpt | 1.000 |") == 1
    assert page.read_text().splitlines()[0] == before.splitlines()[0]
    assert page.read_text().splitlines()[-1] == before.splitlines()[-1]
    (tmp_path / "other.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match="no place"):
        fill(tmp_path / "other.md", "")


def test_a_ratio_is_told_with_its_error() -> None:
    assert ratio([1.0, 4.0], [2.0, 8.0]) == {"mean": pytest.approx(0.5), "within_factor": pytest.approx(1.0)}
    assert ratio([1.0, 4.0], [1.0, 1.0])["mean"] == pytest.approx(2.0)
