"""A request's way through the gateway, and what may break on it."""

from __future__ import annotations

from typing import Any

from calls import collect, generate_request


async def test_transcript_is_the_stored_output(harness: Any, backend: Any) -> None:
    harness.scheduler.auto_tokens = 3
    result = await collect(harness.inference.Generate(generate_request(request_id="r1")))
    stored = harness.scheduler.requests["r1"]
    assert result.tokens == stored.planned
    assert result.text == backend.decode(stored.planned, skip_special_tokens=True)
    assert result.complete == stored.complete
    assert result.request_id == "r1"
