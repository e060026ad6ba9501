"""The reference pages say what the code says, and links in the documentation lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "models" / "tiny" / "README.md"]


def test_reference_pages_are_current() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_every_reason_that_a_page_lists_is_given_somewhere() -> None:
    folders = ("gateway", "laps", "scheduler_svc", "worker_svc")
    sources = {file for folder in folders for file in (ROOT / folder).rglob("*.py")}
    # The scheduler's core knows them by their names alone.
    given = {
        reason
        for file in sources - {ROOT / "laps" / "reasons.py"}
        for reason in re.findall(r'(?:\bReason\.|")([A-Z_]+)\b', file.read_text(encoding="utf-8"))
    }
    listed = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs" / "errors.md").read_text(), flags=re.M)
    assert listed
    assert not set(listed) - given


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_into_pages_lead_to_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            there = (page.parent / target) if target else page
            assert anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: small letters, without punctuation, with dashes for blanks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    """Paths in backquotes that begin with a folder of ours."""
    folders = "laps|gateway|scheduler_svc|worker_svc|simulator|models|bench|tests|deploy|docs|protos"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
