"""The README's example in a browser: the page that a person opens who has saved it and started two nodes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.async_api import BrowserContext, Page, expect

from tests.support.machine import ROOT
from tests.support.nodes import Node, serve_process
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(180)

EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


async def opened(context: BrowserContext, node: Node, errors: list[str]) -> Page:
    page = await context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    await page.goto(f"http://localhost:{node.port}/")
    return page


async def test_readme_app_in_two_tabs_on_two_nodes(
    context: BrowserContext, tmp_path: Path, redis_url: str, prefix: str
) -> None:
    """Signed in on one node and on the other too, a message in both tabs, and one sign-out for both."""
    found = EXAMPLE.search((ROOT / "README.md").read_text())
    assert found is not None
    # The prefix keeps this run apart from other tests on the same server; everything else is as it stands.
    code = found[1].replace("cluster = Cluster(\n", f"cluster = Cluster(\n    prefix={prefix!r},\n", 1)
    assert prefix in code
    (tmp_path / "app.py").write_text(code)
    errors: list[str] = []
    environment = {"ASGI_CLUSTER_URL": redis_url}
    async with serve_process("app:app", 2, env=environment, args=("--app-dir", str(tmp_path))) as nodes:
        one = await opened(context, nodes[0], errors)
        await one.get_by_role("button", name="Sign in as Ada").click()
        await expect(one.locator("#visits")).to_have_text("1")
        two = await opened(context, nodes[1], errors)
        await expect(two.locator("#visits")).to_have_text("2")

        async def in_both_tabs() -> bool:
            await one.get_by_placeholder("Message").fill("hello")
            await one.get_by_role("button", name="Send").click()
            return 0 not in [await page.locator("#list li").count() for page in (one, two)]

        # The first messages may be sent before a tab has subscribed.
        await eventually(in_both_tabs, timeout=20)
        await expect(two.locator("#list li").first).to_have_text("hello")

        await two.get_by_role("button", name="Sign out").click()
        for page in (one, two):
            await expect(page.get_by_role("button", name="Sign in as Ada")).to_be_visible()
    assert errors == []
