"""A real browser: the system's chromium, driven by playwright."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    return os.environ.get("LAPS_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@asynccontextmanager
async def open_browser(path: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        # Root, as in a container, may not have a sandbox.
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = await playwright.chromium.launch(executable_path=path, args=args)
        yield browser
        await browser.close()


class Look:
    """One page, and everything that went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.problems.append(str(error)))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.text} ({message.location})")

    async def count_of(self, label: str) -> int:
        """The big number under a figure's title."""
        figure = self.page.locator(".figure", has=self.page.get_by_role("heading", name=label))
        return int((await figure.locator(".value").inner_text()).split()[0].replace(",", ""))

    async def until(self, script: str) -> None:
        """Waits for a JavaScript expression to be true. By asking: the page's policy forbids `eval` in it."""
        async with asyncio.timeout(90):
            while not await self.page.evaluate(script):  # noqa: ASYNC110
                await asyncio.sleep(0.03)


@asynccontextmanager
async def look(browser: Browser, url: str, *, until_live: bool = True, **options: Any) -> AsyncIterator[Look]:
    """Opens `url` in a context of its own and waits for the first picture."""
    given: dict[str, Any] = {"viewport": {"width": 1360, "height": 860}, "reduced_motion": "reduce"}
    context = await browser.new_context(**(given | options))
    context.set_default_timeout(90_000)
    looking = Look(await context.new_page())
    await looking.page.goto(url)
    if until_live:
        await looking.page.locator("#live[data-state=live]").wait_for()
        await looking.until("document.querySelector('#queue .body .id')?.textContent !== '…'")
    yield looking
    await context.close()


PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 740},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}


async def axe_violations(page: Page, axe: str, *rules: str) -> list[str]:
    """What axe-core finds wrong on the page, by these rules, or by all that are not experimental."""
    if await page.evaluate("!globalThis.axe"):
        await page.evaluate(axe)
    only = {"runOnly": {"type": "rule", "values": rules}} if rules else {}
    found = await page.evaluate(
        "options => axe.run(document, options)", {"resultTypes": ["violations"], **only}
    )
    assert len(found["passes"]) >= (len(rules) or 20)
    return [f"{each['id']}: {node['html'][:160]}" for each in found["violations"] for node in each["nodes"]]


async def save(page: Page, path: Path, **options: Any) -> int:
    """A screenshot as a PNG of 256 colours. Returns its size in bytes."""
    from PIL import Image

    image = Image.open(io.BytesIO(await page.screenshot(**options))).convert("RGB")
    image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    return os.path.getsize(path)  # noqa: ASYNC240
