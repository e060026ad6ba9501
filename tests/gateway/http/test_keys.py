"""API keys on the HTTP port, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from laps.security.access import ROUTES
from laps.security.keys import new_key

ACME, SLOW = new_key("acme"), new_key("slow")


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.toml"
    path.write_text("\n".join([ACME.line, SLOW.line, "tenants.slow = { requests_per_s = 0.001 }"]))
    return str(path)


async def test_openais_client_with_and_without_key(start_http: Callable[..., Any], keys_file: str) -> None:
    http = await start_http(api_keys_file=keys_file)
    http.scheduler.auto_tokens = 3
    with pytest.raises(openai.AuthenticationError) as caught:
        await http.client.completions.create(model="tiny", prompt="the end", max_tokens=3)
    assert caught.value.code == "invalid_api_key"
    assert not http.scheduler.requests
    client = http.new_client(api_key=ACME.key)
    answer = await client.completions.create(model="tiny", prompt="the end", max_tokens=3)
    (stored,) = http.scheduler.requests
    assert stored.startswith("acme:")
    assert "acme" not in answer.id
    assert [model.id async for model in await client.models.list()] == ["tiny"]


async def test_raw_answers(start_http: Callable[..., Any], keys_file: str) -> None:
    http = await start_http(api_keys_file=keys_file)
    http.scheduler.auto_tokens = 3
    refused = await http.raw("GET", "/v1/models")
    assert refused.status == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.error["code"] == "invalid_api_key"
    assert (await http.raw("GET", "/v1/models", authorization="Bearer nonsense")).status == 401
    assert (await http.raw("GET", "/health")).status == 200
    assert (await http.raw("GET", "/ready")).status == 200
    assert (await http.raw("GET", "/nothing")).status == 404
    body = {"prompt": "the end", "max_tokens": 3}
    bearer = f"Bearer {SLOW.key}"
    assert (await http.post("/v1/completions", body, authorization=bearer)).status == 200
    late = await http.post("/v1/completions", body, authorization=bearer)
    assert late.status == 429
    assert late.error["code"] == "rate_limit_exceeded"
    assert int(late.headers["retry-after"]) > 1


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[", ""])
async def test_without_keys_it_answers_to_its_machines_own_names_alone(
    start_http: Callable[..., Any], host: str
) -> None:
    """A page's name may be pointed at 127.0.0.1 after it was loaded: to the browser it is then one origin."""
    http = await start_http()
    http.scheduler.auto_tokens = 3
    body = {"prompt": "the end", "max_tokens": 3}
    refused = await http.post("/v1/completions", body, host=host)
    assert refused.status in (400, 403)
    for route in ("/v1/models", "/console/api/session"):
        assert (await http.raw("GET", route, host=host)).status in (400, 403)
    assert not http.scheduler.requests
    for own in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert (await http.raw("GET", "/v1/models", host=own)).status == 200


async def test_with_keys_or_where_it_is_told_to_it_answers_to_any_name(
    start_http: Callable[..., Any], keys_file: str
) -> None:
    bearer = f"Bearer {ACME.key}"
    http = await start_http(api_keys_file=keys_file)
    answer = await http.raw("GET", "/v1/models", host="laps.example", authorization=bearer)
    assert answer.status == 200
    http = await start_http(allow_unauthenticated=True)
    assert (await http.raw("GET", "/v1/models", host="laps.example")).status == 200


async def test_every_route_stands_in_the_table(start_http: Callable[..., Any]) -> None:
    http = await start_http()
    app: web.Application = http.gateway._http._runner.app
    routes = {resource.canonical for resource in app.router.resources()}
    assert routes == set(ROUTES), "say in laps/security/access.py who may call what"
