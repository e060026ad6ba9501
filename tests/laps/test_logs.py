from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
from typing import Any

import pytest

from laps.logs import bind_context, configure_logging, get_logger


class FullDisk(io.StringIO):
    """As a file on a disk that is full at times: half a line still fits."""

    full = False

    def write(self, text: str) -> int:
        if not self.full:
            return super().write(text)
        super().write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def out() -> FullDisk:
    stream = FullDisk()
    configure_logging("gateway", pool="default", stream=stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_who_and_about_what(out: io.StringIO) -> None:
    with bind_context(request_id="r1", epoch=3, trace_id="t"):
        get_logger().info("accepted", prompt_tokens=5)
    get_logger().debug("not logged at this level")
    (line,) = lines(out)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "accepted", "level": "info", "service": "gateway", "pool": "default", "request_id": "r1",
        "epoch": 3, "trace_id": "t", "prompt_tokens": 5,
    }  # fmt: skip


def test_nothing_that_a_user_wrote_is_logged(out: io.StringIO) -> None:
    def fail(prompt: str) -> None:
        raise ValueError("bad")

    get_logger().warning("refused", text="secret words", token_ids=[1, 2], prompt="secret words")
    logging.getLogger("library").warning("seen", extra={"prompt": "secret words"})
    try:
        fail("secret" + " words")
    except ValueError:
        get_logger().exception("failed")
    assert "secret words" not in out.getvalue()
    assert lines(out)[2]["exception"][0]["exc_type"] == "ValueError"


def test_libraries_log_in_the_same_form(out: io.StringIO) -> None:
    logging.getLogger("some.library").warning("careful with %s", "that")
    logging.getLogger("some.library").info("chatter")
    assert [(line["event"], line["service"]) for line in lines(out)] == [("careful with that", "gateway")]


async def test_context_stays_with_its_task(out: io.StringIO) -> None:
    async def one(request_id: str, first: asyncio.Event, second: asyncio.Event) -> None:
        with bind_context(request_id=request_id):
            first.set()
            await second.wait()
            get_logger().info("done", mine=request_id)

    a, b = asyncio.Event(), asyncio.Event()
    await asyncio.gather(one("a", a, b), one("b", b, a))
    assert [line["request_id"] for line in lines(out)] == [line["mine"] for line in lines(out)]


def test_a_log_that_cannot_be_written_harms_nobody(out: FullDisk) -> None:
    get_logger().info("before")
    out.full = True
    get_logger().error("lost")
    logging.getLogger("some.library").error("lost as well")
    out.full = False
    get_logger().info("after")
    kept = out.getvalue().splitlines()
    assert json.loads(kept[0])["event"] == "before"
    assert json.loads(kept[-1])["event"] == "after"
    out.close()
    get_logger().error("lost")
