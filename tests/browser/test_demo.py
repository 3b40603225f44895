"""The demo as people see it: windows in a real browser, on different nodes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from playwright.async_api import Browser, BrowserContext, Error, Page, WebSocketRoute, expect

from tests.demo.running import Demo
from tests.support.waiting import eventually

# "connecting…" if the node closed the socket: it takes no new one without Redis.
NOT_LIVE = re.compile("no Redis|connecting…")
COMES_BACK = 60_000  # ms for a process to start and a client to try again, beside other work on two cores
pytestmark = pytest.mark.timeout(180)

_troubles: list[str] = []


@pytest.fixture(autouse=True)
async def empty_board(demo: Demo, context: BrowserContext) -> AsyncIterator[None]:
    """Each test has the board to itself, and no page may run into a script error or policy violation."""
    await all_answer(context, demo)
    _troubles.clear()
    yield
    await all_answer(context, demo)
    assert _troubles == []
    url = demo.node_url(1)
    await context.request.post(f"{url}/api/login", data={"name": "Janitor"})
    for note in (await (await context.request.get(f"{url}/api/board")).json())["notes"]:
        await context.request.delete(f"{url}/api/board/notes/{note['id']}")


async def all_answer(context: BrowserContext, demo: Demo) -> None:
    """A test may have killed a node: it is back before the next one begins."""

    async def healthy(number: int) -> bool:
        try:
            answer = await context.request.get(demo.node_url(number) + "/health")
        except Error:  # refused: it is being started
            return False
        return answer.ok

    for number in range(1, demo.nodes + 1):
        await eventually(partial(healthy, number), timeout=60)


async def window(context: BrowserContext, demo: Demo, number: int) -> Page:
    """A window on one node."""
    page = await context.new_page()
    page.on("pageerror", lambda error: _troubles.append(str(error)))
    page.on("console", lambda message: _note_violation(message.text))
    await page.goto(demo.node_url(number))
    return page


def _note_violation(text: str) -> None:
    if "Content Security Policy" in text:
        _troubles.append(text)


async def sign_in(page: Page, name: str) -> None:
    await page.get_by_label("Your name").fill(name)
    await page.get_by_role("button", name="Sign in", exact=True).click()
    await expect(page.locator("#connection")).to_have_text("live")


async def two_windows(context: BrowserContext, demo: Demo) -> tuple[Page, Page]:
    """One person, one session, two windows on two nodes."""
    one = await window(context, demo, 1)
    await sign_in(one, "Ada")
    two = await window(context, demo, 2)
    await expect(two.locator("#connection")).to_have_text("live")
    return one, two


@asynccontextmanager
async def another_device(chromium: Browser, demo: Demo, name: str) -> AsyncIterator[Page]:
    """A window in another browser, on the second node, that has signed in by itself."""
    device = await chromium.new_context()
    try:
        page = await window(device, demo, 2)
        await sign_in(page, name)
        yield page
    finally:
        await device.close()


async def put_up(page: Page, text: str) -> None:
    await page.get_by_role("button", name="Add note").click()
    await page.get_by_role("textbox", name="Text of the note").fill(text)
    await page.keyboard.press("Control+Enter")


async def test_note_appears_moves_changes_and_goes_in_the_other_window(
    context: BrowserContext, demo: Demo
) -> None:
    """Everything done to a note on one node is seen on the other, by mouse and by keyboard."""
    one, two = await two_windows(context, demo)
    await expect(one.locator("#socket-node")).to_have_text("node-1")
    await expect(two.locator("#socket-node")).to_have_text("node-2")

    await put_up(one, "<img src=x onerror=alert(1)> & hello")
    there = two.locator(".note")
    await expect(there).to_have_count(1)
    await expect(there.locator(".text")).to_have_text("<img src=x onerror=alert(1)> & hello")
    assert await two.locator(".note img").count() == 0

    here = one.locator(".note")
    box = await here.bounding_box()
    assert box is not None
    await one.mouse.move(box["x"] + 30, box["y"] + 20)
    await one.mouse.down()
    await one.mouse.move(300, 300, steps=5)
    await expect(there).to_have_attribute("data-holder", "Ada")
    await one.mouse.up()
    place = await here.evaluate(
        "(note) => [note.style.getPropertyValue('--x'), note.style.getPropertyValue('--y')]"
    )
    await expect(there).to_have_css("--x", re.compile(re.escape(place[0][:5])))
    await expect(there).not_to_have_attribute("data-holder", "Ada")

    await there.focus()
    await two.keyboard.press("Enter")
    await two.get_by_role("textbox", name="Text of the note").fill("changed there")
    await two.keyboard.press("Control+Enter")
    await expect(here.locator(".text")).to_have_text("changed there")

    await there.focus()
    await two.keyboard.press("c")
    await two.get_by_role("button", name="mint").click()
    await expect(here).to_have_attribute("data-colour", "mint")

    await there.focus()
    await two.keyboard.press("Delete")
    await expect(here).to_have_count(0)
    await expect(one.get_by_text("An empty board.")).to_be_visible()


@pytest.mark.parametrize("leave", ["Escape", "blur"])
async def test_new_note_without_a_text_is_none(context: BrowserContext, demo: Demo, leave: str) -> None:
    """Begun and left empty, a note is gone from this window, and never was on the board."""
    one, two = await two_windows(context, demo)
    await one.get_by_role("button", name="Add note").click()
    await one.get_by_role("button", name="Colour").click()  # does not count as leaving
    await one.get_by_role("button", name="mint").click()
    await expect(one.locator(".note[data-colour=mint] textarea")).to_be_focused()
    if leave == "Escape":
        await one.keyboard.press("Escape")
    else:
        await one.get_by_role("button", name="Cluster").click()
    await expect(one.locator(".note")).to_have_count(0)
    await expect(one.get_by_text("An empty board.")).to_be_visible()
    await put_up(one, "sentinel")
    await expect(two.locator(".note .text")).to_have_text(["sentinel"])
    board = await (await context.request.get(demo.node_url(1) + "/api/board")).json()
    assert board["notes"][0]["version"] == board["version"]
    assert [note["text"] for note in board["notes"]] == ["sentinel"]


@pytest.mark.parametrize("leave", ["Escape", "blur"])
async def test_typed_text_is_kept(context: BrowserContext, demo: Demo, leave: str) -> None:
    """Escape saves what was typed, as leaving the note by mouse does. Without a text the note goes."""
    one, two = await two_windows(context, demo)

    async def leave_note() -> None:
        if leave == "Escape":
            await one.keyboard.press("Escape")
        else:
            await one.get_by_role("button", name="Cluster").click()

    await one.get_by_role("button", name="Add note").click()
    await one.get_by_role("textbox", name="Text of the note").fill("typed")
    await leave_note()
    await expect(two.locator(".note .text")).to_have_text(["typed"])
    await expect(one.locator(".note[data-note-id] .text")).to_have_text(["typed"])  # it is stored
    await one.locator(".note[data-note-id]").focus()
    await one.keyboard.press("Enter")
    await one.get_by_role("textbox", name="Text of the note").fill("typed again")
    await leave_note()
    await expect(two.locator(".note .text")).to_have_text(["typed again"])
    await expect(one.locator(".note[data-note-id] .text")).to_have_text(["typed again"])
    await one.locator(".note[data-note-id]").focus()
    await one.keyboard.press("Enter")
    await one.get_by_role("textbox", name="Text of the note").fill("")
    await leave_note()
    await expect(two.locator(".note")).to_have_count(0)


async def test_new_note_is_one_whichever_comes_first(context: BrowserContext, demo: Demo) -> None:
    """The announcement may come after the answer to the request, or before it: the note is there once."""
    held: list[tuple[WebSocketRoute, str | bytes]] = []

    def hold_announcements(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()
        server.on_message(
            lambda frame: held.append((socket, frame)) if '"note"' in str(frame) else socket.send(frame)
        )

    await context.route_web_socket(re.compile("/realtime/websocket"), hold_announcements)
    page = await window(context, demo, 1)
    await sign_in(page, "Ada")
    await put_up(page, "once")
    await expect(page.locator(".note[data-note-id]")).to_have_count(1)
    await expect(page.locator(".note .text")).to_have_text(["once"])
    await eventually(lambda: held)
    for socket, frame in held:
        socket.send(frame)
    await page.get_by_role("button", name="Send everybody a heart").click()
    await expect(page.locator(".heart")).to_have_count(1)  # sent last
    await expect(page.locator(".note .text")).to_have_text(["once"])


async def test_typed_text_survives_a_dead_redis(context: BrowserContext, demo: Demo) -> None:
    """A note that cannot be saved stays in its editor, and can be saved when Redis is back."""
    one, two = await two_windows(context, demo)
    await one.get_by_role("button", name="Add note").click()
    await one.get_by_role("textbox", name="Text of the note").fill("precious")
    valkey = demo.valkey()
    valkey.suspend()
    try:
        await expect(one.locator("#connection")).to_have_text(NOT_LIVE, timeout=COMES_BACK)
        await one.keyboard.press("Escape")
        await expect(one.locator("#toasts")).to_contain_text("Please try again", timeout=COMES_BACK)
        await expect(one.get_by_role("textbox", name="Text of the note")).to_have_value("precious")
    finally:
        valkey.resume()
    for page in (one, two):
        await expect(page.locator("#connection")).to_have_text("live", timeout=COMES_BACK)
    await one.get_by_role("textbox", name="Text of the note").press("Escape")
    await expect(two.locator(".note .text")).to_have_text(["precious"])
    await expect(one.locator(".note .text")).to_have_text(["precious"])


async def test_signing_out_locks_the_other_windows(context: BrowserContext, demo: Demo) -> None:
    """The other windows of that session lock at once, say who it was, and come back by a new sign-in."""
    one, two = await two_windows(context, demo)
    three = await window(context, demo, 3)
    await expect(three.locator("#connection")).to_have_text("live")
    await one.get_by_role("button", name="Sign out everywhere").click()
    for page in (two, three):
        await expect(page.get_by_role("alertdialog")).to_be_visible()
        await expect(page.locator("#lock-text")).to_contain_text("Ada signed out on node-1, at ")
        await expect(page.locator("#page")).to_have_attribute("inert", "")
    await expect(one.get_by_text("Signed out: 3 sockets closed on 3 nodes")).to_be_visible()
    await expect(one.get_by_role("alertdialog")).to_be_hidden()

    await two.get_by_role("button", name="Sign in again").click()
    await sign_in(two, "Grace")
    # The third has the same cookies: it only has to ask.
    await three.get_by_role("button", name="Sign in again").click()
    await expect(three.locator("#connection")).to_have_text("live")
    await expect(three).to_have_title("Grace · The Board")


async def test_signing_out_locks_the_windows_on_other_devices(
    context: BrowserContext, chromium: Browser, demo: Demo
) -> None:
    """Another browser of the same user, with a session of its own, locks as well."""
    one = await window(context, demo, 1)
    await sign_in(one, "Ada")
    async with another_device(chromium, demo, "Ada") as two:
        await one.get_by_role("button", name="Sign out everywhere").click()
        await expect(two.get_by_role("alertdialog")).to_be_visible()
        await expect(two.locator("#lock-text")).to_contain_text("Ada signed out on node-1, at ")
        await expect(one.get_by_text("Signed out: 2 sockets closed on 3 nodes")).to_be_visible()


async def test_change_that_a_visitor_made_up_is_ignored(context: BrowserContext, demo: Demo) -> None:
    """People may publish in the room, and only the server's word changes the board."""
    one, two = await two_windows(context, demo)
    await put_up(one, "real")
    await expect(two.locator(".note .text")).to_have_text("real")
    await one.evaluate("""async () => {
      const { connect } = await import("/realtime/client.js");
      const client = connect();
      const id = document.querySelector(".note").dataset.noteId;
      await client.publish("board:lobby", { type: "gone", id, version: 1e6 });
      const note = { id, text: "fake", x: 0, y: 0, version: 1e6 };
      await client.publish("board:lobby", { type: "note", note });
      await client.publish("board:lobby", { type: "heart" });
      client.disconnect();
    }""")
    await expect(two.locator(".heart")).to_have_count(1)  # sent last: what came before has been seen
    await expect(two.locator(".note .text")).to_have_text("real")


async def test_other_people_stay_signed_in(context: BrowserContext, chromium: Browser, demo: Demo) -> None:
    """A sign-out ends the sessions of that user only; who is here is right before and after."""
    one = await window(context, demo, 1)
    await sign_in(one, "Ada")
    async with another_device(chromium, demo, "Grace") as two:
        for page in (one, two):
            await expect(page.locator("#people li")).to_have_count(2)
        await one.get_by_role("button", name="Sign out everywhere").click()
        await expect(two.locator("#people li")).to_have_count(1)
        await expect(two.locator("#people li")).to_have_attribute("title", "Grace (you)")
        await expect(two.locator("#connection")).to_have_text("live")


async def test_window_comes_back_when_its_node_was_killed(context: BrowserContext, demo: Demo) -> None:
    """kill -9 of a node: its window says so, finds the restarted node, and has what happened meanwhile."""
    one, two = await two_windows(context, demo)
    await put_up(one, "before")
    await expect(two.locator(".note")).to_have_count(1)
    os.kill(demo.node_pid(2), signal.SIGKILL)
    await expect(two.locator("#connection")).to_have_text("connecting…")
    await put_up(one, "meanwhile")
    await expect(two.locator("#connection")).to_have_text("live", timeout=COMES_BACK)
    await expect(two.locator(".note")).to_have_count(2)
    await put_up(two, "after")
    await expect(one.locator(".note")).to_have_count(3)


async def test_window_on_the_shared_port_moves_to_another_node(context: BrowserContext, demo: Demo) -> None:
    """Where any node answers, losing one is a matter of a moment."""
    page = await context.new_page()
    await page.goto(demo.url)
    await sign_in(page, "Ada")
    lost = await page.locator("#socket-node").text_content()
    assert lost is not None
    os.kill(demo.node_pid(int(lost.removeprefix("node-"))), signal.SIGKILL)
    await expect(page.locator("#socket-node")).to_have_text(re.compile(r"node-\d"), timeout=COMES_BACK)
    await expect(page.locator("#connection")).to_have_text("live")
    await put_up(page, "still here")
    await expect(page.locator(".note .text")).to_have_text("still here")


async def test_window_is_not_live_while_redis_is_dead(context: BrowserContext, demo: Demo) -> None:
    """The socket to the node stays open, and the window says all the same that Redis does not answer."""
    one, two = await two_windows(context, demo)
    await put_up(one, "before")
    valkey = demo.valkey()
    valkey.suspend()
    try:
        for page in (one, two):
            await expect(page.locator("#connection")).to_have_text(NOT_LIVE, timeout=COMES_BACK)
    finally:
        valkey.resume()
    for page in (one, two):
        await expect(page.locator("#connection")).to_have_text("live", timeout=COMES_BACK)
    await put_up(one, "after")
    await expect(two.locator(".note")).to_have_count(2)


async def test_window_has_everything_after_valkey_was_killed(context: BrowserContext, demo: Demo) -> None:
    """kill -9 of the embedded Valkey: signed in as before, the notes are there, and changes travel again."""
    one, two = await two_windows(context, demo)
    await put_up(one, "before")
    await expect(two.locator(".note")).to_have_count(1)
    returns = demo.log().count("Valkey is back")
    demo.valkey().kill()
    await eventually(lambda: demo.log().count("Valkey is back") > returns, timeout=60)

    async def has_redis(number: int) -> bool:
        stats = await context.request.get(demo.node_url(number) + "/api/stats")
        return bool((await stats.json())["bus"]["lease_remaining"] > 0)

    for number in (1, 2, 3):
        await eventually(partial(has_redis, number), timeout=60)
    for page in (one, two):
        await expect(page.locator("#connection")).to_have_text("live", timeout=COMES_BACK)
    await put_up(one, "after")
    await expect(two.locator(".note")).to_have_count(2)
    await two.reload()
    await expect(two.locator("#connection")).to_have_text("live")
    await expect(two.locator(".note .text")).to_have_text(["before", "after"])
    await expect(two).to_have_title("Ada · The Board")


async def test_bad_name_is_explained(context: BrowserContext, demo: Demo) -> None:
    """What the server says is shown where the person looks."""
    page = await window(context, demo, 1)
    await page.get_by_label("Your name").fill("   ")
    await page.get_by_role("button", name="Sign in", exact=True).click()
    await expect(page.get_by_role("alert")).to_contain_text("A name has 1 to 32")


async def test_statistics_show_every_node(context: BrowserContext, demo: Demo) -> None:
    """The panel opens, fills itself, and closes with Escape."""
    page = await window(context, demo, 3)
    await sign_in(page, "Ada")
    await page.get_by_role("button", name="Cluster").click()
    for number in (1, 2, 3):
        await expect(
            page.get_by_role("complementary").get_by_text(f"node-{number}", exact=True)
        ).to_be_visible(timeout=COMES_BACK)
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("complementary")).to_be_hidden()


async def test_page_fits_a_phone(chromium: Browser, demo: Demo) -> None:
    """Nothing is wider than the screen, and a note can be put up and dragged with a finger."""
    phone = await chromium.new_context(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    try:
        page = await phone.new_page()
        await page.goto(demo.node_url(1))
        await sign_in(page, "Ada")
        await put_up(page, "small")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        box = await page.locator(".note").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    finally:
        await phone.close()
