"""Where ``client.js`` connects to when it is given no URL, by where the browser loaded it from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse
from starlette.routing import Mount, Route

from asgi_cluster import Cluster, ClusterMiddleware, RealtimeConfig
from tests.support.machine import ROOT
from tests.support.nodes import serve

CONNECTED = """async (from) => {
  const { ClusterClient } = await import(from);
  const client = new ClusterClient(undefined, { minDelay: 20, maxDelay: 100 });
  const failed = new Promise((_, fail) => {
    setTimeout(() => fail(new Error(`no answer at ${client.url}`)), 10_000);
  });
  try {
    await Promise.race([client.connect().ready(), failed]);
    return client.url;
  } finally {
    client.disconnect();
  }
}"""


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse("<!doctype html><title>page</title>")


async def copy(request: Request) -> FileResponse:
    """The file of the package, as a bundler or a static directory serves it."""
    return FileResponse(ROOT / "asgi_cluster/centrifuge/js/client.js", media_type="text/javascript")


def app_with(path: str, *, root: str = "") -> Any:
    routes = [Route("/", page), Route("/deep/page", page), Route("/assets/{name}", copy)]
    app = ClusterMiddleware(
        Starlette(routes=routes), Cluster("memory://", realtime=RealtimeConfig(path=path))
    )
    return Starlette(routes=[Mount(root, app=app)]) if root else app


@pytest.fixture
async def visitor(chromium: Browser) -> AsyncIterator[BrowserContext]:
    made = await chromium.new_context()
    made.set_default_timeout(10_000)
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("path", "module", "socket"),
    [
        ("/realtime", "/realtime/client.js", "/realtime/websocket"),
        ("/live/v1", "/live/v1/client.js", "/live/v1/websocket"),
        ("/live/v1", "/live/v1/client.js?v=2#x", "/live/v1/websocket"),
        ("/realtime", "/assets/app-123.js", "/realtime/websocket"),
        ("/realtime", "/assets/client.js", "/realtime/websocket"),
    ],
)
async def test_default_url_follows_the_endpoint_or_the_page(
    visitor: BrowserContext, path: str, module: str, socket: str
) -> None:
    """Beside the module when the endpoint served it, whatever its path. A copy or a bundle connects to the
    page's ``/realtime/websocket``, whatever its name.
    """
    async with serve(app_with(path)) as node:
        for start in ("/", "/deep/page"):
            opened = await visitor.new_page()
            await opened.goto(node.url + start)
            assert await opened.evaluate(CONNECTED, module) == node.ws_url + socket


async def test_default_url_of_a_mounted_endpoint_is_below_the_mount(visitor: BrowserContext) -> None:
    """The path that the browser sees counts, which may be longer than the configured one."""
    async with serve(app_with("/realtime", root="/chat"), lifespan="off") as node:
        opened = await visitor.new_page()
        await opened.goto(f"{node.url}/chat/")
        url = await opened.evaluate(CONNECTED, "/chat/realtime/client.js")
        assert url == f"{node.ws_url}/chat/realtime/websocket"


async def test_default_url_without_an_origin_is_refused(visitor: BrowserContext) -> None:
    """A page of no origin, as ``about:blank`` or a file: there the URL has to be given."""
    opened = await visitor.new_page()
    source = (ROOT / "asgi_cluster/centrifuge/js/client.js").read_text()
    message = await opened.evaluate(
        """async (source) => {
          const file = new Blob([source], { type: "text/javascript" });
          const { ClusterClient } = await import(URL.createObjectURL(file));
          try { new ClusterClient(); } catch (error) { return error.message; }
        }""",
        source,
    )
    assert "pass the URL" in message


def test_bundler_finds_no_asset_to_resolve() -> None:
    """webpack and Vite read ``new URL("…", import.meta.url)`` as the name of a file to bundle, and fail when
    there is none.
    """
    source = (ROOT / "asgi_cluster/centrifuge/js/client.js").read_text()
    assert "import.meta.url)" not in source.replace(" ", "")
