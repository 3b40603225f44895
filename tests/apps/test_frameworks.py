"""Every framework inside ``ClusterMiddleware``: real uvicorn on two nodes, and Starlette's TestClient."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

from asgi_cluster import Cluster, ClusterMiddleware, SessionConfig
from tests.apps.kit import CHUNKS, MakeApp, Seen, make_cluster
from tests.support.nodes import Node, serve, several
from tests.support.waiting import eventually


@asynccontextmanager
async def in_the_room(node: Node, **options: Any) -> AsyncIterator[ClientConnection]:
    """A socket that is in the room: the app reads after it has joined, and broadcasts what it reads."""
    async with connect(f"{node.ws_url}/room", **options) as socket:
        await socket.send("joined")
        assert await socket.recv() == "joined"
        yield socket


async def test_framework_session_login_and_live_logout_on_two_nodes(
    framework: str,
    make_app: MakeApp,
    scope_key: str | None,
    cluster_url: str,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Counted on one node, seen on the other; a logout there closes the sockets here, with no traceback."""
    seen = Seen()

    def node(_: int) -> ClusterMiddleware:
        cluster = make_cluster(cluster_url, prefix, scope_key=scope_key)
        return ClusterMiddleware(make_app(cluster, seen), cluster)

    async with (
        several(2, node) as (here, there),
        httpx.AsyncClient() as browser,
        httpx.AsyncClient() as stranger,
    ):
        assert (await browser.get(f"{here.url}/quiet")).headers.get("set-cookie") is None
        assert (await browser.post(f"{here.url}/visit")).json() == {"visits": 1}
        anonymous = browser.cookies["session"]
        await browser.post(f"{here.url}/login", params={"user": "ada"})
        assert browser.cookies["session"] != anonymous
        assert (await browser.post(f"{there.url}/visit")).json() == {"visits": 2}
        assert (await browser.get(f"{there.url}/me")).json() == {"user": "ada", "visits": 2}
        assert (await browser.get(f"{here.url}/stream")).text == "".join(CHUNKS)
        assert (await browser.get(f"{here.url}/me")).json() == {"user": "ada", "visits": 3}

        cookie = {"Cookie": f"session={browser.cookies['session']}"}
        async with (
            connect(f"{here.ws_url}/plain", additional_headers=cookie) as plain,
            in_the_room(here, additional_headers=cookie) as member,
            in_the_room(there) as guest,
        ):
            assert await member.recv() == "joined"  # the guest's
            await plain.send("echo")
            assert await plain.recv() == "echo"
            assert (await browser.get(f"{there.url}/background")).status_code == 200
            assert await member.recv() == await guest.recv() == "after the response"
            assert await eventually(lambda: seen.background) == ["ada"]
            await guest.send("hello")
            assert await member.recv() == "hello"

            assert (await browser.post(f"{there.url}/logout")).json() == {"closed": 2}
            for socket in (plain, member):
                with pytest.raises(ConnectionClosed) as closed:
                    await socket.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 4501
            assert await guest.recv() == "hello"
        if framework != "quart":  # it tells its handlers nothing
            await eventually(lambda: 4501 in seen.closes)
        nobody = {"user": None, "visits": 0}
        for node_url in (here.url, there.url):
            assert (await browser.get(f"{node_url}/me")).json() == nobody
            assert (await stranger.get(f"{node_url}/me", headers=cookie)).json() == nobody
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_framework_clear_is_a_logout(make_app: MakeApp, scope_key: str | None, prefix: str) -> None:
    """By the framework's own way to empty its session."""
    cluster = make_cluster(f"memory://{prefix}", prefix, scope_key=scope_key)
    app = ClusterMiddleware(make_app(cluster, Seen()), cluster)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as browser:
        await browser.post("/login", params={"user": "ada"})
        await browser.post("/visit")
        kept = dict(browser.cookies)
        await browser.post("/clear")
        assert "session" not in browser.cookies
        browser.cookies.update(kept)
        assert (await browser.get("/me")).json() == {"user": None, "visits": 0}


def test_framework_in_the_test_client(make_app: MakeApp, scope_key: str | None) -> None:
    """``memory://`` needs no start: the README's way to test, with the Secure cookie and wss."""
    cluster = Cluster(f"memory://{secrets.token_hex(4)}", sessions=SessionConfig(scope_key=scope_key))
    client = TestClient(ClusterMiddleware(make_app(cluster, Seen()), cluster), base_url="https://testserver")
    client.post("/login", params={"user": "ada"})
    assert client.post("/visit").json() == {"visits": 1}
    assert client.get("/me").json() == {"user": "ada", "visits": 1}
    with client.websocket_connect("wss://testserver/plain") as socket:
        socket.send_text("echo")
        assert socket.receive_text() == "echo"
        assert client.post("/logout").json() == {"closed": 1}
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 4501
    assert client.get("/me").json() == {"user": None, "visits": 0}


async def test_foreign_page_is_refused(
    make_app: MakeApp, scope_key: str | None, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """``cluster.accept`` answers a page of another origin with 403; to the framework that is no error."""
    cluster = make_cluster(f"memory://{prefix}", prefix, scope_key=scope_key)
    async with serve(ClusterMiddleware(make_app(cluster, Seen()), cluster)) as node:
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"{node.ws_url}/room", origin=Origin("https://evil.example"))
        assert refused.value.response.status_code == 403
        async with connect(f"{node.ws_url}/room", origin=Origin(node.url)):
            pass
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "Traceback" not in caplog.text
