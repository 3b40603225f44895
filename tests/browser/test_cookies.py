"""What a browser lets another host of the same domain do to the session cookie."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, Page
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from asgi_cluster import Cluster, ClusterMiddleware, get_session
from tests.support.machine import self_signed
from tests.support.nodes import Node, serve

APP, SIBLING = "app.example.test", "evil.example.test"


async def login(request: Request) -> JSONResponse:
    await get_session(request).login(request.query_params["user"])
    return JSONResponse("ok")


async def me(request: Request) -> JSONResponse:
    """Who is signed in, and what the browser sent."""
    return JSONResponse({"user": get_session(request).user_id, "cookie": request.headers.get("cookie", "")})


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse("<!doctype html><title>page</title>")


@pytest.fixture(scope="module")
async def node(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Node]:
    """One app on https, under whatever name it is asked for."""
    certificate, key = self_signed(tmp_path_factory.mktemp("tls"), "DNS:*.example.test")
    routes = [Route("/login", login), Route("/me", me), Route("/", page)]
    app = ClusterMiddleware(Starlette(routes=routes), Cluster("memory://cookies"))
    async with serve(app, ssl_certfile=certificate, ssl_keyfile=key) as served:
        yield served


@pytest.fixture
async def visitor(chromium: Browser) -> AsyncIterator[BrowserContext]:
    made = await chromium.new_context(ignore_https_errors=True)
    made.set_default_timeout(10_000)
    yield made
    await made.close()


async def opened(context: BrowserContext, node: Node, host: str) -> Page:
    made = await context.new_page()
    await made.goto(f"https://{host}:{node.port}/")
    return made


async def asked(page: Page, path: str) -> Any:
    return await page.evaluate("async (path) => (await fetch(path)).json()", path)


async def session_of(chromium: Browser, node: Node, user: str) -> str:
    """The whole ``name=value`` of a living session, as its owner's browser shows it."""
    context = await chromium.new_context(ignore_https_errors=True)
    own = await opened(context, node, APP)
    await asked(own, f"/login?user={user}")
    cookie: str = (await asked(own, "/me"))["cookie"]
    await context.close()
    assert cookie.startswith("__Host-session=")
    return cookie


@pytest.mark.parametrize("separator", [" ", ", "])
async def test_sibling_host_cannot_plant_its_session(
    chromium: Browser, visitor: BrowserContext, node: Node, separator: str
) -> None:
    """A script on another host of the domain sets a cookie whose value reads like the session cookie. The
    browser sends it first, since its path is longer, and the visitor stays who they are.
    """
    theirs = await session_of(chromium, node, "attacker")
    sibling = await opened(visitor, node, SIBLING)
    planted = f"zz=1{separator}{theirs}"
    await sibling.evaluate("(c) => { document.cookie = `${c}; Domain=example.test; Path=/me`; }", planted)
    app = await opened(visitor, node, APP)
    before = await asked(app, "/me")
    assert before == {"user": None, "cookie": planted}
    await asked(app, "/login?user=victim")
    after = await asked(app, "/me")
    assert after["cookie"].startswith(f"{planted}; __Host-session=")
    assert after["user"] == "victim"


async def test_sibling_host_cannot_set_the_cookie_itself(
    chromium: Browser, visitor: BrowserContext, node: Node
) -> None:
    """The browser refuses the prefix for a cookie with a domain, without a name, and in other spellings."""
    theirs = await session_of(chromium, node, "attacker")
    sibling = await opened(visitor, node, SIBLING)
    forms = (theirs, f"={theirs}", f" {theirs}", f"\t{theirs}", theirs.replace("=", " =", 1))
    for form in (*forms, "sentinel=1"):
        attributes = "Secure; Domain=example.test; Path=/me"
        await sibling.evaluate("(c) => { document.cookie = c; }", f"{form}; {attributes}")
    app = await opened(visitor, node, APP)
    assert await asked(app, "/me") == {"user": None, "cookie": "sentinel=1"}
