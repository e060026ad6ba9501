"""Bodies that nobody should send: each is refused with its parameter, none is a defect."""

from __future__ import annotations

import asyncio
import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway.http import body
from gateway.http.errors import error_body, http_status, to_json
from gateway.http.parameters import PARAMETERS, Endpoint, Fate
from gateway.http.requests import Asked, read_request
from gateway.validation import Bounds, check_before_tokenizing
from laps.errors import LapsError

from .conftest import read_head, read_response

TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the end"}
BOUNDS = Bounds(model_name="tiny", vocabulary_size=360, context_tokens=1000, default_max_tokens=40)
NAMES = [parameter.name for parameter in PARAMETERS]


@pytest.mark.parametrize(
    ("data", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"[]", None, "invalid_json"),
        (b"null", None, "invalid_json"),
        (b'{"prompt": "\xff"}', None, "invalid_json"),
        (b'{"prompt": "a" // why\n}', None, "invalid_json"),
        (b"\xef\xbb\xbf{}", None, "invalid_json"),
        (b'{"prompt": ' + b"[" * 100_000, None, "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", None, "invalid_json"),
        (b'{"prompt": "a", "temperature": 1, "temperature": 2}', "temperature", "invalid_value"),
        (b'{"laps": {"priority": 1, "priority": 1}}', "priority", "invalid_value"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature", "invalid_value"),
        (b'{"prompt": "a", "temperature": -Infinity}', "temperature", "invalid_value"),
        (b'{"prompt": "a", "metadata": {"x": [1, NaN]}}', "metadata.x[1]", "invalid_value"),
        (b'{"metadata": {"y": [[], {}, [2]], "x": [{"z": [NaN]}]}}', "metadata.x[0].z[0]", "invalid_value"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature", "invalid_value"),
        (b'{"prompt": "a", "\\ud800": 1}', "\ud800", "unknown_parameter"),
    ],
    ids=range(17),
)
async def test_malformed(http: Any, data: bytes, param: str | None, code: str) -> None:
    answered = await http.post("/v1/completions", data)
    assert answered.status == 400
    assert (answered.error["param"], answered.error["code"]) == (param, code)
    assert not http.scheduler.requests


def test_what_is_said_of_a_body_takes_no_more_than_the_body() -> None:
    """Many values deep down: a path for each of them would take gigabytes."""
    deep, name = 300, b'{"' + b"a" * 64 + b'":'
    data = name * deep + b"[" + b"0," * 20_000 + b"NaN]" + b"}" * deep
    tracemalloc.start()
    try:
        with pytest.raises(LapsError) as caught:
            body.parse(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()
    assert len(json.dumps(error_body(caught.value))) < 2000


@pytest.mark.parametrize("given", [{}, {"prompt": None}])
async def test_a_prompt_that_is_missing_is_asked_for_in_openais_terms(http: Any, given: Any) -> None:
    answered = await http.post("/v1/completions", {"max_tokens": 5} | given)
    assert (answered.status, answered.error["param"], answered.error["code"]) == (
        400,
        "prompt",
        "prompt_empty",
    )
    assert answered.error["message"] == "prompt: must be given: a string or a list of token ids"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer laps_secret\x00\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: laps_secret\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nlaps_secret",
    ],
)
async def test_of_what_is_no_request_nothing_is_logged(
    http: Any, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with capture_logs() as lines:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        writer.write(data)
        assert (await read_head(reader))[0] == 400
        writer.close()
    assert [(line["event"], line["because"]) for line in lines] == [("call refused", "it is no HTTP request")]
    assert "laps_secret" not in caplog.text + str(lines)
    assert not caplog.records


@pytest.mark.parametrize(
    ("data", "status", "problem"),
    [
        (b"laps_secret\r\n\r\n", 400, "what came is no valid HTTP request"),
        (b"\x16\x03\x01\x02\x00\x01\x00laps_secret\r\n\r\n", 400, "what came is no valid HTTP request"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: laps_secret\r\nContent-Length: 2\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n{}",
            400,
            "what came is no valid HTTP request",
        ),
        (
            b"GET /v1/models HTTP/1.1\r\nX: " + b"laps_secret" * 1000 + b"\r\n\r\n",
            400,
            "a line of the request's head is too long",
        ),
        (
            b"GET /" + b"laps_secret" * 1000 + b" HTTP/1.1\r\n\r\n",
            400,
            "a line of the request's head is too long",
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: laps_secret\r\n"
            b"Content-Length: 0\r\nConnection: close\r\n\r\n",
            417,
            "Expect may only be 100-continue",
        ),
        (
            b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nExpect: laps_secret\r\nConnection: close\r\n\r\n",
            417,
            "Expect may only be 100-continue",
        ),
    ],
)
async def test_what_is_no_request_gets_the_usual_error(
    http: Any, data: bytes, status: int, problem: str
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
    writer.write(data)
    answered = await read_response(reader)
    writer.close()
    assert (answered.status, answered.error["message"]) == (status, problem)
    assert answered.error["type"] == "invalid_request_error"
    assert answered.headers["server"] == "laps"
    assert answered.headers["content-type"] == "application/json"
    assert b"laps_secret" not in answered.body


async def test_a_defect_is_told_in_the_usual_form(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.gateway._http, "_is_ready", lambda: 1 // 0)
    answered = await http.raw("GET", "/ready")
    assert (answered.status, answered.error["code"]) == (500, "internal")
    assert answered.headers["server"] == "laps"


async def test_a_long_body_is_read_aside(http: Any) -> None:
    answered = await http.post("/v1/completions", {"prompt": [*["a" * 5000] * 20, 7]})
    assert (answered.status, answered.error["param"]) == (400, "prompt[20]")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": json_values, "content": json_values, "name": json_values, "x": json_values}
    ),
    max_size=3,
)


def judge(data: bytes, endpoint: Endpoint) -> Asked | LapsError:
    """As the gateway does before it tokenizes. Whatever is wrong is a LapsError that can be told."""
    asked = None
    try:
        asked = read_request(body.parse(data), endpoint, "")
        for index in range(asked.outputs):
            check_before_tokenizing(asked.output(index), BOUNDS)
    except LapsError as caught:
        error = caught
    else:
        return asked
    assert http_status(error) in (400, 404)
    told = error_body(error, asked.param_of if asked else str)["error"]
    assert told["message"]
    assert told["code"]
    json.loads(to_json(told))
    return error


@given(
    st.dictionaries(st.sampled_from(NAMES), json_values, max_size=5),
    st.sampled_from(Endpoint),
    messages | json_values,
)
def test_any_values(values: dict[str, Any], endpoint: Endpoint, turns: Any) -> None:
    prompt = {"messages": turns} if endpoint is Endpoint.CHAT else {"prompt": values.get("prompt", "a")}
    asked = judge(json.dumps(values | prompt).encode(), endpoint)
    if isinstance(asked, LapsError):
        return
    # What was taken was taken as it was written.
    sampling = asked.requests[0].sampling
    temperature = values.get("temperature")
    assert math.isclose(
        sampling.temperature, 1.0 if temperature is None else temperature, rel_tol=1e-6, abs_tol=1e-40
    )
    for parameter in PARAMETERS:
        if parameter.fate is Fate.REFUSED:
            assert values.get(parameter.name) in (None, *parameter.harmless)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    judge(data, Endpoint.COMPLETIONS)


@given(st.data())
def test_a_body_that_is_damaged(data: st.DataObject) -> None:
    given_ = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stop": ["a"], "seed": 5}
    raw = bytearray(json.dumps(given_).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    judge(bytes(raw), Endpoint.CHAT)


def test_null_is_called_null() -> None:
    with pytest.raises(LapsError, match="must be a string, not null"):
        read_request({"messages": [{"role": "user", "content": None}]}, Endpoint.CHAT, "")
