from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator

import pytest
from playwright.async_api import Browser, BrowserContext, async_playwright, expect

from tests.demo.running import Demo, start_demo
from tests.support.machine import program

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP *.example.test 127.0.0.1",
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    """Three nodes with pages to look at."""
    with start_demo() as running:
        yield running


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    """The distribution's Chromium; the test is skipped, with ``CI`` set it fails, where there is none."""
    path = shutil.which("chromium-browser") or program("chromium")
    expect.set_options(timeout=20_000)  # ms; its default of 5 s is too short beside other work
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        await browser.close()


@pytest.fixture
async def context(chromium: Browser) -> AsyncIterator[BrowserContext]:
    """One person's browser, with cookies of its own."""
    made = await chromium.new_context(viewport={"width": 1100, "height": 760})
    made.set_default_timeout(20_000)
    yield made
    await made.close()
