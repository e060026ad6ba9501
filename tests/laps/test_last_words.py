from __future__ import annotations

import pytest

from laps.last_words import describe_exit, explain

INFO = '{"event": "call", "level": "info", "code": "OK"}'
WARNING = '{"event": "scheduler not reachable", "level": "warning", "because": "connection refused"}'
ERROR = '{"error": "target: cannot be\\nloaded", "event": "cannot start", "level": "error"}'
STORE = "26920:M 21 Nov 2026 23:03:17.351 # Short write while writing to the AOF file"
STORE_READY = "26920:M 21 Nov 2026 23:03:17.351 * Ready to accept connections tcp"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ""),
        ([INFO, "\n"], ""),
        ([WARNING, INFO, "\n"], "scheduler not reachable: connection refused"),
        ([WARNING, ERROR + "\n"], "cannot start: target: cannot be loaded"),
        ([ERROR, "laps worker: no such model\n"], "laps worker: no such model"),
        ([STORE + "\n"], "Short write while writing to the AOF file"),
        ([STORE_READY], ""),
        (['{"not": "an event"}', INFO], '{"not": "an event"}'),
        (['["cut'], '["cut'),
    ],
)
def test_the_last_trouble_of_a_log_is_told_in_one_line(lines: list[str], said: str) -> None:
    assert explain(lines) == said


def test_an_exit_code_is_told_as_a_person_knows_it() -> None:
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-99) == "killed by signal 99"
