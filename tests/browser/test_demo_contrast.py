"""The demo's page: text that can be read, light and dark, on a desktop and on a phone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import pytest
from playwright.async_api import Browser, Page, ViewportSize, expect
from websockets.asyncio.client import ClientConnection

from tests.demo.running import Demo
from tests.demo.visitors import ask, realtime, visitor

Scheme = Literal["light", "dark"]

CONTRAST = Path(__file__).with_name("contrast.js").read_text()
NAMES = ["Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ivy", "Joe", "Kim", "Lee"]
COLOURS = ["lemon", "mint", "sky", "rose", "lilac", "peach"]
SCREENS: dict[str, ViewportSize] = {
    "desktop": {"width": 1280, "height": 800},
    "phone": {"width": 390, "height": 844},
}


@pytest.fixture(scope="module")
async def crowd(demo: Demo) -> AsyncIterator[None]:
    """Eleven people, and six notes, one of each colour."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        readers = []
        for number, name in enumerate(NAMES):
            client = await stack.enter_async_context(visitor(demo, name))
            socket = await stack.enter_async_context(realtime(demo, 1 + number % 3, client))
            await ask(socket, 2, {"subscribe": {"channel": "board:lobby"}})
            readers.append(tasks.create_task(answer_pings(socket)))
            if number < len(COLOURS):
                place = {"x": 0.02 + 0.19 * number, "y": 0.1 + 0.12 * number, "colour": COLOURS[number]}
                text = "" if number == 5 else f"a note of {name}"
                await client.post("/api/board/notes", json={"text": text, **place})
        yield
        for reader in readers:
            reader.cancel()


async def answer_pings(socket: ClientConnection) -> None:
    async for frame in socket:
        if "{}" in str(frame).splitlines():
            await socket.send("{}")


async def page_of(stack: AsyncExitStack, chromium: Browser, demo: Demo, screen: str, scheme: Scheme) -> Page:
    # Moving things would be measured half transparent.
    context = await chromium.new_context(
        viewport=SCREENS[screen],
        color_scheme=scheme,
        reduced_motion="reduce",
        is_mobile=screen == "phone",
    )
    await stack.enter_async_context(context)
    page = await context.new_page()
    await page.goto(demo.node_url(1))
    await expect(page.locator("#gate-node")).to_have_text("node-1")
    return page


async def readable(page: Page, *expected: str) -> None:
    """Every text has a contrast of 4.5, and those expected are among them."""
    measured = await page.evaluate(CONTRAST)
    assert [each for each in measured if each["ratio"] < 4.5] == []
    assert set(expected) <= {each["text"] for each in measured}


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_has_contrast(
    chromium: Browser, demo: Demo, crowd: None, screen: str, scheme: Scheme
) -> None:
    """4.5 to 1 at least: signing in, notes, people, hearts, the panel, messages, the lock."""
    async with AsyncExitStack() as stack:
        page = await page_of(stack, chromium, demo, screen, scheme)
        await page.evaluate("document.querySelector('#gate-error').textContent = 'an error'")
        await readable(page, "Your name", "Ada", "Sign in", "an error", "node-1")

        await page.get_by_label("Your name").fill("Ada")
        await page.get_by_role("button", name="Sign in", exact=True).click()
        await expect(page.locator("#connection")).to_have_text("live")
        await expect(page.get_by_text("a note of Flo")).to_be_visible()
        await page.get_by_role("button", name="Cluster").click()
        await expect(page.get_by_role("complementary").get_by_text("Sockets per node")).to_be_visible()
        await page.evaluate("""() => {
          const note = document.querySelector(".note");
          note.dataset.holder = "Grace";
          note.style.setProperty("--hue", "90");
          const add = (where, tag, name, text) => {
            const made = Object.assign(document.createElement(tag), { className: name });
            made.append(text);
            document.querySelector(where).append(made);
            return made;
          };
          add("#toasts", "p", "", "a message");
          add("#board", "div", "heart", "").append(add("#board", "small", "", "you"));
        }""")
        rest = "+9" if screen == "phone" else "+4"
        await expect(page.locator("#people li").last).to_have_text(rest)
        shown = ["live", "a note of Bo", "Bo", "Empty note", rest, "Grace", "a message", "hits", "you"]
        await readable(page, *shown)
        for state in ("connecting", "stalled", "disconnected"):
            await page.locator("#connection").evaluate(
                "(pill, state) => { pill.dataset.state = state; }", state
            )
            await readable(page)
        await page.get_by_role("button", name="Add note").click()
        await page.get_by_role("textbox", name="Text of the note").fill("x" * 450)
        await readable(page, "50")
        for hue in range(0, 360, 30):
            await page.evaluate(
                """(hue) => {
                  const coloured = document.querySelectorAll("#people li, .note[data-holder], .node");
                  for (const each of coloured) each.style.setProperty("--hue", String(hue));
                }""",
                hue,
            )
            await readable(page, "Grace")

        await page.evaluate("document.querySelector('#lock').hidden = false")
        await readable(page, "This window is locked", "Sign in again")


@pytest.mark.parametrize(("screen", "rest"), [("desktop", 4), ("phone", 9)])
async def test_people_who_have_no_room_are_counted(
    chromium: Browser, demo: Demo, crowd: None, screen: str, rest: int
) -> None:
    """Twelve people: the last place says how many more, and who. Nothing is wider than the screen."""
    async with AsyncExitStack() as stack:
        page = await page_of(stack, chromium, demo, screen, "light")
        await page.get_by_label("Your name").fill("Ada")
        await page.get_by_role("button", name="Sign in", exact=True).click()
        last = page.locator("#people li").last
        await expect(last).to_have_text(f"+{rest}")
        await expect(last).to_be_in_viewport(ratio=1)
        await expect(last).to_have_attribute("title", f"{rest} more: {', '.join(NAMES[-rest:])}")
        await expect(page.locator("#people li").first).to_have_attribute("title", "Ada (you)")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # Turning the phone makes room.
        await page.set_viewport_size(SCREENS["desktop"])
        await expect(last).to_have_text("+4")
