"""docs/openai.md says what the code does."""

from __future__ import annotations

from pathlib import Path

from gateway.http.errors import HTTP_STATUS
from gateway.http.parameters import PARAMETERS, Endpoint, Fate

PAGE = Path(__file__).resolve().parents[3] / "docs" / "openai.md"
_SHORT = {Endpoint.CHAT: "chat", Endpoint.COMPLETIONS: "completions"}


def rows(fate: Fate) -> str:
    return "\n".join(
        f"| `{each.name}` | {', '.join(_SHORT[endpoint] for endpoint in each.endpoints)} | {each.note} |"
        for each in PARAMETERS
        if each.fate is fate
    )


def test_the_tables_of_parameters() -> None:
    page = PAGE.read_text()
    for fate in Fate:
        assert rows(fate) in page, f"the table of what is {fate.value} should be:\n{rows(fate)}"


def test_the_table_of_statuses() -> None:
    page = PAGE.read_text()
    by_status: dict[int, list[str]] = {}
    for name, status in HTTP_STATUS.items():
        by_status.setdefault(status, []).append(f"`{name}`")
    for status, names in by_status.items():
        row = f"| {status} | {', '.join(names)} |"
        assert row in page, f"missing: {row}"
