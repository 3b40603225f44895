"""``session.ended``: what a response that goes on for long awaits, to end with its session."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from asgi_cluster import (
    Cluster,
    ClusterMiddleware,
    CookieConfig,
    SessionConfig,
    SessionEnded,
    get_session,
)
from tests.sessions.app import make_app
from tests.sessions.test_live_logout import Place, sign_in
from tests.support.nodes import several
from tests.support.servers import Server
from tests.support.waiting import eventually

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"


async def ticks(request: Request) -> StreamingResponse:
    """Says hello, and goodbye when its session has ended."""
    session = get_session(request)

    async def body() -> AsyncIterator[bytes]:
        yield b"hello "
        await session.ended.wait()
        yield b"goodbye"

    return StreamingResponse(body())


@asynccontextmanager
async def site(url: str, prefix: str, count: int = 2, **options: Any) -> AsyncIterator[Place]:
    here = Place()

    def make(number: int) -> ClusterMiddleware:
        settings = {"idle_timeout": 7200.0, **options}
        cluster = Cluster(
            url,
            prefix=prefix,
            node_label=f"n{number}",
            sessions=SessionConfig(cookie=CookieConfig(secure=False), **settings),
        )
        here.clusters.append(cluster)
        return ClusterMiddleware(Starlette(routes=[Route("/ticks", ticks), Mount("/", make_app())]), cluster)

    async with several(count, make) as here.nodes:
        yield here


@asynccontextmanager
async def stream(
    url: str, browser: httpx.AsyncClient, path: str = "/ticks"
) -> AsyncIterator[AsyncIterator[str]]:
    """What the response brings, after its first chunk."""
    async with (
        httpx.AsyncClient(cookies=httpx.Cookies(browser.cookies), timeout=20) as client,
        client.stream("GET", f"{url}{path}") as response,
    ):
        chunks = response.aiter_text()
        assert await anext(chunks) == "hello "
        yield chunks


async def log_out(here: Place, browser: httpx.AsyncClient) -> None:
    await browser.post("/logout")


async def log_out_the_user(here: Place, browser: httpx.AsyncClient) -> None:
    assert (await here.clusters[0].user("ada").logout()).complete


async def log_out_by_handle(here: Place, browser: httpx.AsyncClient) -> None:
    handle = (await browser.get("/show")).json()["handle"]
    assert (await here.clusters[0].session(handle).logout()).complete


async def sign_in_again(here: Place, browser: httpx.AsyncClient) -> None:
    await browser.post("/login?user=ada")


@pytest.mark.parametrize("end", [log_out, log_out_the_user, log_out_by_handle, sign_in_again])
@pytest.mark.parametrize("where", [0, 1])
async def test_stream_ends_with_its_session(
    cluster_url: str, prefix: str, end: Callable[[Place, httpx.AsyncClient], Any], where: int
) -> None:
    """Wherever it ended, and however; another user's stream goes on, and no socket is counted."""
    async with site(cluster_url, prefix) as here:
        browser, other = await sign_in(here.nodes[0]), await sign_in(here.nodes[0], "bob")
        async with (
            stream(here.nodes[where].url, browser) as mine,
            stream(here.nodes[where].url, other) as theirs,
        ):
            await end(here, browser)
            assert [chunk async for chunk in mine] == ["goodbye"]
            assert sum(cluster.stats().realtime.connections for cluster in here.clusters) == 0
            receipt = await here.clusters[0].user("bob").logout()
            assert (receipt.sessions, receipt.sockets_closed, receipt.complete) == (1, 0, True)
            assert [chunk async for chunk in theirs] == ["goodbye"]
        for client in (browser, other):
            await client.aclose()


async def test_stream_of_a_kept_session_goes_on(cluster_url: str, prefix: str) -> None:
    """``exclude`` spares it; the user's other session's stream ends."""
    async with site(cluster_url, prefix) as here:
        kept, ended = await sign_in(here.nodes[0]), await sign_in(here.nodes[0])
        handle = (await kept.get("/show")).json()["handle"]
        async with stream(here.nodes[1].url, kept) as mine, stream(here.nodes[1].url, ended) as theirs:
            await here.clusters[0].user("ada").logout(exclude=handle)
            assert [chunk async for chunk in theirs] == ["goodbye"]
            await log_out(here, kept)
            assert [chunk async for chunk in mine] == ["goodbye"]
        for client in (kept, ended):
            await client.aclose()


async def test_stream_ends_when_its_session_expires(cluster_url: str, prefix: str) -> None:
    """Not used for its idle time: over, as for a socket."""
    async with site(cluster_url, prefix, 1, idle_timeout=1.0) as here:
        browser = await sign_in(here.nodes[0])
        async with stream(here.nodes[0].url, browser) as mine:
            assert [chunk async for chunk in mine] == ["goodbye"]
        await browser.aclose()


@pytest.mark.quick
async def test_session_that_had_ended_before_it_was_asked(cluster_url: str, prefix: str) -> None:
    """Read from the cache, ended elsewhere, and only then waited for: registered, then read, so that it is
    seen.
    """
    gate, reached = asyncio.Event(), asyncio.Event()

    async def late(request: Request) -> JSONResponse:
        session = get_session(request)
        assert session.user_id == "ada"
        reached.set()
        await gate.wait()
        async with asyncio.timeout(10):
            await session.ended.wait()
        return JSONResponse(session.ended.is_set())

    cluster = Cluster(cluster_url, prefix=prefix)
    app = ClusterMiddleware(Starlette(routes=[Route("/late", late), Mount("/", make_app())]), cluster)
    transport = httpx.ASGITransport(app)
    async with cluster, httpx.AsyncClient(transport=transport, base_url="https://test") as browser:
        await browser.post("/login?user=ada")
        asking = asyncio.create_task(browser.get("/late"))
        await reached.wait()
        await cluster.user("ada").logout()
        gate.set()
        assert (await asking).json() is True


async def test_what_waits_is_forgotten_with_its_request(cluster_url: str, prefix: str) -> None:
    """A client that leaves, a response that ends, and a request that looked and did not wait leave
    nothing.
    """
    seen: list[Any] = []

    async def looks(request: Request) -> Response:
        seen.append(get_session(request).ended)
        return Response()

    cluster = Cluster(cluster_url, prefix=prefix)
    app = ClusterMiddleware(Starlette(routes=[Route("/looks", looks), Mount("/", make_app())]), cluster)
    async with (
        cluster,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://test") as browser,
    ):
        await browser.post("/login?user=ada")
        for _ in range(3):
            await browser.get("/looks")
        assert list(cluster._parts.hub.handles()) == []
        await cluster.user("ada").logout()
        assert [ended.is_set() for ended in seen] == [False] * 3
    async with site(cluster_url, prefix, 1) as here:
        client = await sign_in(here.nodes[0])
        async with stream(here.nodes[0].url, client):
            assert len(list(here.clusters[0]._parts.hub.handles())) == 1
        await eventually(lambda: list(here.clusters[0]._parts.hub.handles()) == [])
        await client.aclose()


async def test_requests_that_do_not_wait_pay_nothing(cluster_url: str, prefix: str) -> None:
    """No read of the store, and no object: only ``ended`` makes one."""
    async with site(cluster_url, prefix, 1) as here:
        browser = await sign_in(here.nodes[0])
        await browser.get("/show")
        before = here.clusters[0].stats().cache
        for _ in range(5):
            await browser.get("/show")
        after = here.clusters[0].stats().cache
        assert (after.hits - before.hits, after.misses - before.misses) == (5, 0)
        gc.collect()
        assert not [found for found in gc.get_objects() if type(found) is SessionEnded]
        await browser.aclose()


async def test_logout_that_the_bus_lost_ends_a_stream(valkey: Server, prefix: str) -> None:
    """Ended by hand, so that no message says so: found with the sockets' sessions, after a gap."""
    async with site(valkey.url, prefix, 1) as here:
        browser = await sign_in(here.nodes[0])
        handle = (await browser.get("/show")).json()["handle"]
        async with stream(here.nodes[0].url, browser) as mine:
            with valkey.client() as client:
                client.delete(f"{prefix}:{{{handle[:2]}}}:s:{handle[3:]}")
            here.clusters[0]._parts.revalidator.wake()
            assert [chunk async for chunk in mine] == ["goodbye"]
        await browser.aclose()


@pytest.mark.quick
def test_session_that_is_not_stored() -> None:
    """A visitor without a session has none that could end; one that logs out in the request has."""

    async def visitor(request: Request) -> JSONResponse:
        session = get_session(request)
        before = session.ended.is_set()
        try:
            async with asyncio.timeout(0.05):
                await session.ended.wait()
        except TimeoutError:
            pass
        await session.login("ada")
        ended = session.ended
        assert not ended.is_set()
        await session.logout()
        await ended.wait()
        return JSONResponse([before, ended.is_set()])

    app = ClusterMiddleware(Starlette(routes=[Route("/", visitor)]), Cluster("memory://"))
    assert TestClient(app, base_url="https://testserver").get("/").json() == [False, True]


async def test_documented_pattern(cluster_url: str, prefix: str) -> None:
    """The endpoint of docs/security.md, as it stands: events while the session lives, and the end with it."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "session.ended" in block]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/security.md", "exec"), names)
    queue: asyncio.Queue[str] = asyncio.Queue(10)
    names["queue"] = queue
    cluster = Cluster(cluster_url, prefix=prefix, sessions=SessionConfig(cookie=CookieConfig(secure=False)))
    app = ClusterMiddleware(
        Starlette(routes=[Route("/events", names["events"]), Mount("/", make_app())]), cluster
    )
    async with several(1, lambda _: app) as (node,):
        browser = await sign_in(node)
        async with browser.stream("GET", "/events") as response:
            lines = response.aiter_lines()
            for number in range(3):
                await queue.put(str(number))
                assert (await anext(lines), await anext(lines)) == (f"data: {number}", "")
            await cluster.user("ada").logout()
            assert [line async for line in lines] == ["event: logout", "data:", ""]
        await browser.aclose()
        await eventually(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "waits for events"])
