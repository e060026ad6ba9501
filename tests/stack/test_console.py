"""The console over a real stack: a real scheduler, worker and store, looked at in a real browser."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gateway" / "console"))

from browser import find_chromium, look, open_browser

pytestmark = pytest.mark.stack


async def test_the_console_shows_what_the_stack_does(start_stack):
    """The worker is frozen while something is looked at that would be over when it went on."""
    path = find_chromium()
    if path is None:
        pytest.skip("no chromium on PATH: install Debian's chromium, or set LAPS_CHROMIUM to one")
    settings = {"workers": 1, "slots": 1, "console_allow_cancel": True, "console_show_text": True}
    async with start_stack(**settings, patient=True) as (stack, client), open_browser(path) as browser:
        url = f"http://127.0.0.1:{stack.http_port}/console"
        async with look(browser, url) as seen:
            page, worker = seen.page, stack.children["worker-0"]
            worker.signal(signal.SIGSTOP)
            prompts = [f"def f{n}(x):" for n in range(6)]
            asked = []
            for n, text in enumerate(prompts):
                request = client.generate(text, max_tokens=160, ignore_eos=True, request_id=f"console-{n}")
                asked.append(asyncio.create_task(request))
                if n == 0:
                    # It has the slot before the others come, which then wait, whatever their order.
                    await page.locator("#slots").get_by_role("button", name="console-0").wait_for()
            row = page.locator("#queue .row", has=page.get_by_role("gridcell", name="console-5", exact=True))
            await row.wait_for()
            worker.signal(signal.SIGCONT)
            await page.evaluate("location.hash = '#/request/console-5'")
            panel = page.locator("#request")
            await panel.get_by_text("finished: length").wait_for(timeout=150_000)
            done = [await each for each in asked]
            told = await panel.inner_text()
            # All of its tokens are in the drawing, and its text is what the client got.
            detail = await client.get("console-5", include_output=True)
            assert f"{detail.request.output_tokens} of at most 160" in told
            pre = panel.locator("pre")
            await pre.nth(1).wait_for()
            assert await pre.nth(0).text_content() == prompts[5]
            assert await pre.nth(1).text_content() == done[5].text
            kinds = await panel.locator("table[aria-label=Events] td:nth-child(2)").all_inner_texts()
            assert kinds[0] == "submitted"
            assert kinds[-1] == "finished"
            assert kinds.count("leased") == 1 + kinds.count("preempted") + kinds.count("requeued")
            await page.keyboard.press("Escape")
            await page.locator("#finished tr", has_text="console-0").wait_for()
            assert await seen.count_of("Waiting") == 0

            worker.signal(signal.SIGSTOP)
            endless = asyncio.create_task(client.generate("x", max_tokens=2000, request_id="endless"))
            await page.locator("#slots").get_by_role("button", name="endless").click()
            page.on("dialog", lambda dialog: dialog.accept())
            async with page.expect_response(lambda response: response.request.method == "POST"):
                await page.get_by_role("button", name="Cancel request").click()
            worker.signal(signal.SIGCONT)
            await panel.get_by_text("finished: cancelled").wait_for()
            assert (await endless).finish_reason == "cancelled"
            assert seen.problems == []
