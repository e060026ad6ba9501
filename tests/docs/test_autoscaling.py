"""The table of docs/kubernetes.md is of bench/results/autoscale.json, and that is of the code as it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from simulator import autoscale, code_hash

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "autoscale.json"
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
AGAIN = (
    "run: python -m simulator.autoscale --jobs 480 --seeds 5 --json bench/results/autoscale.json, "
    "and write the table of docs/kubernetes.md, and what is concluded below it, anew"
)


def test_the_page_shows_the_committed_figures() -> None:
    about, outcomes = autoscale.load(RESULTS)
    assert autoscale.table(outcomes) + "\n\n" in PAGE, AGAIN
    assert f"`--jobs {about['jobs']} --seeds {about['seeds']} --json" in PAGE
    assert [each.scaler for each in outcomes] == list(autoscale.SCALERS)
    assert all(len(each.traces) == about["seeds"] for each in outcomes)


def test_the_figures_are_of_this_code() -> None:
    about, _ = autoscale.load(RESULTS)
    assert about["code"] == autoscale.code(), AGAIN


def test_a_short_run_gives_the_committed_figures() -> None:
    """What the hash leaves out has not changed them either."""
    about, _ = autoscale.load(RESULTS)
    assert asdict(autoscale.short_run()) == about["short_run"], AGAIN


def test_the_hash_is_of_what_the_code_does(tmp_path: Path) -> None:
    path = tmp_path / "code.py"

    def of(text: str) -> str:
        path.write_text(text)
        return code_hash.code_hash([path])

    plain = of("def one(a):\n    return a + 1\n")
    assert of('"""Says."""\n\n# Why.\ndef one(a):\n    """Says."""\n    return a + 1\n') == plain
    assert of("def one(a):\n    return a + 2\n") != plain
