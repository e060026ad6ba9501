"""The pictures of docs/console.md are made here, in the folder that LAPS_SCREENSHOTS names."""

from __future__ import annotations

import asyncio

import pytest
from browser import PHONE, look, save
from fake_pool import STEP_S
from PIL import Image

from gateway.http.console.pictures import request

pytestmark = [pytest.mark.asyncio(loop_scope="session")]

MOST_BYTES = 200_000


def check(path):
    """A picture that shows something and is small."""
    assert path.stat().st_size < MOST_BYTES
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 40
    assert max(count for count, _ in colours) < 0.9 * sum(count for count, _ in colours)


async def test_pictures_for_the_docs(start_console, browser, pictures):
    console = await start_console(waiting=0, console_allow_cancel=True)
    pool, figures = console.pool, console.feed._figures
    told = len(pool.finished)
    for n, now_s in enumerate(pool.play(302.0, waiting=60)):
        if n % 5 == 0:
            figures.observe(now_s, len(pool.waiting), pool.running.values())
            figures.ended(now_s, pool.finished[told:])
            told = len(pool.finished)
    console.feed._told.update((info.request_id, info.finished_s) for info in pool.finished)
    console.feed._finished.extendleft(map(request, pool.finished[-30:]))
    for _ in range(180):
        pool.submit(age_s=pool.chance.uniform(0.1, 4.0))
    pool.commit()

    async def go_on():
        while True:
            await asyncio.sleep(STEP_S)
            pool.advance()

    going_on = asyncio.create_task(go_on())
    names = {"light": {}, "dark": {"color_scheme": "dark"}, "phone": PHONE}
    for name, options in names.items():
        async with look(browser, console.url, **options) as seen:
            await save(seen.page, pictures / f"console-{name}.png")
            check(pictures / f"console-{name}.png")
            assert seen.problems == []
    going_on.cancel()
    shown = max(pool.waiting, key=lambda info: (info.preemptions, info.num_steps))
    for name, options in {"request": {}, "request-phone": PHONE}.items():
        async with look(browser, f"{console.url}#/request/{shown.request_id}", **options) as seen:
            await seen.page.get_by_role("heading", name="Life").wait_for()
            await seen.page.evaluate("document.activeElement.blur()")
            await save(seen.page, pictures / f"console-{name}.png")
            check(pictures / f"console-{name}.png")
