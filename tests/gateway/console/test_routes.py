"""The console's routes without a browser: headers, bounds, permissions, one reading for many viewers."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, suppress

import aiohttp
import pytest
import pytest_asyncio

from gateway.http.console import feed as feeds
from gateway.http.console.feed import Feed

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def http():
    async with aiohttp.ClientSession() as session:
        yield session


async def until(condition):
    async with asyncio.timeout(90):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def next_picture(response):
    async with asyncio.timeout(90):
        while True:
            line = await response.content.readuntil(b"\n\n")
            if line.startswith(b"data: "):
                return json.loads(line[6:])


async def test_pages_are_strict_and_cached_by_their_content(start_console, http):
    console = await start_console()
    async with http.get(console.url) as page:
        text = await page.text()
        policy = page.headers["Content-Security-Policy"]
        tag = page.headers["ETag"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert "style=" not in text
    assert "<script>" not in text
    assert "//" not in text.replace("http://www.w3.org", "").replace("<!--", "")
    async with http.get(console.url, headers={"If-None-Match": tag}) as again:
        assert again.status == 304
    root = console.url.removesuffix("console")
    async with http.get(root, allow_redirects=False) as start:
        assert (start.status, start.headers["Location"]) == (302, "/console")
    for name, kind in (
        ("main.js", "text/javascript"),
        ("console.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
    ):
        async with http.get(f"{console.url}/static/{name}") as found:
            assert (found.status, found.content_type) == (200, kind)
            assert found.headers["X-Content-Type-Options"] == "nosniff"
    for name in ("..%2Froutes.py", "nothing.js", "__init__.py"):
        async with http.get(f"{console.url}/static/{name}") as found:
            assert found.status == 404
    async with http.get(f"{console.url}/api/session") as session:
        assert session.headers["Cache-Control"] == "no-store"
        body = await session.json()
    assert (body["may_cancel"], body["shows_text"]) == (False, False)


async def test_it_can_be_left_out(start_console, http):
    console = await start_console(console=False)
    for path in ("", "/static/main.js", "/api/session", "/api/watch"):
        async with http.get(console.url + path) as found:
            assert found.status == 404


async def test_many_viewers_cost_one_watch(start_console, http):
    console = await start_console()
    pool = console.pool
    async with AsyncExitStack() as stack:
        seen = [await stack.enter_async_context(http.get(f"{console.url}/api/watch")) for _ in range(20)]
        pictures = await asyncio.gather(*map(next_picture, seen))
        assert {picture["pools"][0]["waiting"] for picture in pictures} == {40}
        pool.submit()
        pool.commit()

        async def follow(response):
            while (await next_picture(response))["pools"][0]["waiting"] != 41:
                pass

        await asyncio.gather(*map(follow, seen))
        assert pool.calls["Watch"] == console.feed.watches == 1

        async def window():
            async with http.get(f"{console.url}/api/queue?level=0&offset=0") as found:
                return await found.text()

        before = pool.calls.get("ListQueues", 0)
        assert len(set(await asyncio.gather(*(window() for _ in range(20))))) == 1
        assert pool.calls["ListQueues"] - before == 1


async def test_pictures_hold_no_texts_and_little(start_console, http):
    console = await start_console(waiting=3000)
    async with http.get(f"{console.url}/api/watch") as response:
        picture = await next_picture(response)
    assert "head" not in json.dumps(picture["pools"])
    assert len(json.dumps(picture)) < 60_000


async def test_windows_are_in_running_order(start_console, http):
    console = await start_console(waiting=300)
    pool = console.pool
    wanted = [info.request_id for info in pool.waiting if info.level == 1]
    rows = []
    for offset in range(0, len(wanted), feeds.WINDOW_ROWS):
        async with http.get(f"{console.url}/api/queue?level=1&offset={offset}") as found:
            rows += [row["request_id"] for row in (await found.json())["rows"]]
    assert rows == wanted
    for query in ("level=0&offset=7", "level=-1", "level=0&offset=1e3", "level=x", f"level={'9' * 30}"):
        async with http.get(f"{console.url}/api/queue?{query}") as found:
            assert found.status == 400, query


async def test_texts_only_where_the_setting_allows(start_console, http):
    console = await start_console()
    name = console.pool.finished[0].request_id
    async with http.get(f"{console.url}/api/requests/{name}/text") as found:
        assert found.status == 403
    assert "ReadRequest" not in console.pool.calls
    async with http.get(f"{console.url}/api/requests/nobody") as found:
        assert found.status == 404
    console = await start_console(console_show_text=True)
    async with http.get(f"{console.url}/api/requests/{name}/text") as found:
        assert set(await found.json()) == {"prompt", "output"}


@pytest.mark.parametrize(
    ("allowed", "headers", "status"),
    [
        (False, {"Content-Type": "application/json"}, 403),
        (True, {"Content-Type": "text/plain"}, 415),
        (True, {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}, 403),
        (True, {"Content-Type": "application/json", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
async def test_who_may_cancel(start_console, http, allowed, headers, status):
    console = await start_console(console_allow_cancel=allowed)
    name = console.pool.waiting[0].request_id
    async with http.post(f"{console.url}/api/requests/{name}/cancel", data="{}", headers=headers) as found:
        assert found.status == status
    assert console.pool.cancelled == ([name] if status == 200 else [])


async def test_the_watch_ends_a_while_after_the_last_viewer(start_console):
    console = await start_console()
    feed = Feed(console.gateway.link, linger_s=0.05)
    first, second = feed.join(), feed.join()
    assert b'"waiting":40' in await first.take()
    feed.leave(first)
    feed.leave(second)
    again = feed.join()
    assert b'"waiting":40' in await again.take()
    # Nothing is left that would end it.
    assert (feed.watches, feed._stopping) == (1, None)
    feed.leave(again)
    await until(lambda: feed._task is None)
    assert b'"waiting":40' in await feed.join().take()
    assert feed.watches == 2
    await feed.close()


async def test_one_who_reads_slowly_gets_the_newest_picture(start_console):
    console = await start_console()
    feed = Feed(console.gateway.link)
    slow, quick = feed.join(), feed.join()
    await slow.take()
    for _ in range(3):
        console.pool.submit()
        console.pool.commit()
        while json.loads(await quick.take())["pools"][0]["commit_seq"] != console.pool.commit_seq:
            pass
    assert json.loads(await slow.take())["pools"][0]["waiting"] == 43
    await feed.close()


async def test_who_was_shown_a_change_reads_what_is_no_older(start_console, http):
    """Also within the time for which an answer is shared: a page asks once for each change."""
    console = await start_console()
    pool, name = console.pool, console.pool.waiting[0].request_id

    async def state():
        async with http.get(f"{console.url}/api/requests/{name}") as found:
            return (await found.json())["request"]["state"]

    async def first_row():
        async with http.get(f"{console.url}/api/queue?level=0&offset=0") as found:
            return (await found.json())["rows"][0]["request_id"]

    async with http.get(f"{console.url}/api/watch") as response:
        await next_picture(response)
        before = await first_row()
        assert await state() in ("queued", "preempted")
        pool.run(pool.find(name))
        front = pool.submit("the-new-one")
        front.level, front.priority = 0, 9
        pool.commit()
        while (await next_picture(response))["pools"][0]["commit_seq"] != pool.commit_seq:
            pass
        assert await state() == "running"
        assert before != await first_row() == "the-new-one"


async def test_who_cancels_sees_it(start_console, http):
    console = await start_console(console_allow_cancel=True)
    name = console.pool.waiting[0].request_id
    url = f"{console.url}/api/requests/{name}"
    async with http.get(url) as found:
        assert (await found.json())["request"]["state"] != "finished"
    async with http.post(f"{url}/cancel", json={}) as done:
        assert done.status == 200
    async with http.get(url) as found:
        assert (await found.json())["request"]["state"] == "finished"


async def test_viewers_are_bounded(start_console, monkeypatch, http):
    monkeypatch.setattr(feeds, "MAX_VIEWERS", 1)
    console = await start_console()
    async with http.get(f"{console.url}/api/watch") as first:
        await next_picture(first)
        async with http.get(f"{console.url}/api/watch") as second:
            assert second.status == 429
            assert second.headers["Retry-After"] == "5"


async def test_viewers_do_not_keep_a_gateway_from_stopping(start_console, http):
    console = await start_console()
    async with http.get(f"{console.url}/api/watch") as response:
        await next_picture(response)
        async with asyncio.timeout(90):
            await console.stop()
            with suppress(aiohttp.ClientError):
                while await response.content.readany():
                    pass
