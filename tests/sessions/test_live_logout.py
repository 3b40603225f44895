"""A session that ends on one node closes its sockets on all nodes, whoever serves them and however they got
there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import websockets
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, RealtimeConfig, SessionConfig, get_session
from tests.sessions.app import make_app
from tests.support.nodes import Node, several
from tests.support.waiting import eventually

SESSIONS = SessionConfig(cookie=CookieConfig(secure=False))


class Place:
    """Nodes that share a cluster, a browser that is signed in, and what the sockets of the app saw."""

    def __init__(self) -> None:
        self.clusters: list[Cluster] = []
        self.nodes: list[Node] = []
        self.seen: list[str] = []
        self.hold: asyncio.Event | None = None
        self.arrived = asyncio.Event()

    def app(self) -> Starlette:
        async def unaware(websocket: WebSocket) -> None:
            """Knows nothing of the cluster, and does not handle a disconnect."""
            if self.hold is not None:
                self.arrived.set()
                await self.hold.wait()
            await websocket.accept()
            while True:
                await websocket.receive_text()

        async def careful(websocket: WebSocket) -> None:
            """Handles a disconnect as anybody would, and says what it saw."""
            await websocket.accept()
            try:
                async for _ in websocket.iter_text():
                    pass
            finally:
                self.seen.append("left")

        async def raw(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            message = await receive()
            self.seen.append(f"{message['type']} {message.get('code')}")
            try:
                await send({"type": "websocket.send", "text": "too late"})
            except OSError:
                self.seen.append("OSError")

        async def sends(websocket: WebSocket) -> None:
            """Only ever sends, so it learns of the close from send."""
            await websocket.accept()
            while True:
                await websocket.send_text("tick")
                await asyncio.sleep(0.01)

        async def floods(websocket: WebSocket) -> None:
            await websocket.accept()
            while True:
                await websocket.send_bytes(bytes(65536))
                await asyncio.sleep(0.001)  # the client shares this loop

        async def saves(websocket: WebSocket) -> None:
            await websocket.accept()
            session = get_session(websocket)
            session["from the socket"] = True
            await websocket.send_json(await session.save())
            await websocket.receive_text()

        sockets = [WebSocketRoute(f"/ws/{f.__name__}", f) for f in (unaware, careful, sends, saves, floods)]
        return Starlette(routes=[*sockets, Mount("/ws/raw", raw), Mount("/", make_app())])


@asynccontextmanager
async def place(url: str, prefix: str, count: int = 3, **options: Any) -> AsyncIterator[Place]:
    found = Place()

    def make(number: int) -> ClusterMiddleware:
        cluster = Cluster(url, prefix=prefix, node_label=f"n{number}", **{"sessions": SESSIONS, **options})
        found.clusters.append(cluster)
        return ClusterMiddleware(found.app(), cluster)

    async with several(count, make) as found.nodes:
        yield found


async def sign_in(node: Node, user: str = "ada") -> httpx.AsyncClient:
    client = httpx.AsyncClient(base_url=node.url)
    assert (await client.post(f"/login?user={user}")).json()["user"] == user
    return client


def cookies(client: httpx.AsyncClient) -> dict[str, str]:
    return {"Cookie": "; ".join(f"{name}={value}" for name, value in client.cookies.items())}


async def closed(socket: websockets.ClientConnection) -> int | None:
    try:
        async with asyncio.timeout(5):
            while True:
                await socket.recv()
    except websockets.ConnectionClosed:
        return socket.close_code


@pytest.mark.parametrize("kind", ["unaware", "careful", "raw", "sends", "saves"])
async def test_logout_closes_sockets_of_any_app_on_all_nodes(
    cluster_url: str, prefix: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Code 4501 on three nodes; the app sees an ordinary disconnect, and nobody logs an exception."""
    caplog.set_level(logging.INFO)
    async with place(cluster_url, prefix) as here:
        client = await sign_in(here.nodes[0])
        sockets = [
            await websockets.connect(
                f"{node.ws_url}/ws/{kind}{'/' if kind == 'raw' else ''}", additional_headers=cookies(client)
            )
            for node in here.nodes
        ]
        await eventually(lambda: sum(c.stats().realtime.connections for c in here.clusters) == 3)
        receipt = (await client.post("/logout")).json()
        assert receipt == {"sessions": 1, "complete": True, "acked": 3}
        assert [await closed(socket) for socket in sockets] == [4501] * 3
        await eventually(lambda: sum(c.stats().realtime.connections for c in here.clusters) == 0)
        await client.aclose()
    if kind == "careful":
        assert here.seen == ["left"] * 3
    if kind == "raw":
        assert sorted(here.seen) == ["OSError"] * 3 + ["websocket.disconnect 4501"] * 3
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("where", [0, 1])
async def test_logout_during_the_handshake_is_not_missed(cluster_url: str, prefix: str, where: int) -> None:
    """A socket whose session ends between its first read and its accept is accepted and closed with 4501."""
    async with place(cluster_url, prefix, 2) as here:
        client = await sign_in(here.nodes[0])
        here.hold = asyncio.Event()
        opening = asyncio.create_task(
            websockets.connect(
                f"{here.nodes[where].ws_url}/ws/unaware", additional_headers=cookies(client)
            ).__aenter__()
        )
        await here.arrived.wait()
        await client.post("/logout")
        here.hold.set()
        assert await closed(await opening) == 4501
        await client.aclose()


async def test_other_sessions_stay(cluster_url: str, prefix: str) -> None:
    """Logging out one session of a user touches neither the user's other sessions nor anybody else's."""
    async with place(cluster_url, prefix, 2) as here:
        laptop, phone = await sign_in(here.nodes[0]), await sign_in(here.nodes[1])
        other = await sign_in(here.nodes[1], "bob")
        sockets = [
            await websockets.connect(f"{here.nodes[1].ws_url}/ws/careful", additional_headers=cookies(client))
            for client in (laptop, phone, other)
        ]
        await laptop.post("/logout")
        assert await closed(sockets[0]) == 4501
        await phone.get("/show")
        assert sockets[1].close_code is None
        assert sockets[2].close_code is None
        receipt = await here.clusters[0].user("ada").logout()
        assert receipt.sockets_closed == 1
        assert await closed(sockets[1]) == 4501
        assert sockets[2].close_code is None
        await sockets[2].close()
        for client in (laptop, phone, other):
            await client.aclose()


async def test_log_out_everywhere_but_here_keeps_this_sessions_sockets(cluster_url: str, prefix: str) -> None:
    """``exclude`` spares the session that asks, and its sockets."""
    async with place(cluster_url, prefix, 2) as here:
        laptop, phone = await sign_in(here.nodes[0]), await sign_in(here.nodes[1])
        mine, theirs = [
            await websockets.connect(f"{here.nodes[1].ws_url}/ws/careful", additional_headers=cookies(client))
            for client in (laptop, phone)
        ]
        handle = (await laptop.get("/show")).json()["handle"]
        receipt = await here.clusters[1].user("ada").logout(exclude=handle)
        assert (receipt.sessions, receipt.sockets_closed, receipt.complete) == (1, 1, True)
        assert await closed(theirs) == 4501
        assert mine.close_code is None
        await mine.close()
        await laptop.aclose()
        await phone.aclose()


async def test_login_makes_sockets_of_the_old_session_come_back(cluster_url: str, prefix: str) -> None:
    """3011 asks clients to reconnect, with the cookie of the new session."""
    async with place(cluster_url, prefix, 2) as here:
        client = httpx.AsyncClient(base_url=here.nodes[0].url)
        await client.post("/put", json={"cart": 1})
        socket = await websockets.connect(
            f"{here.nodes[1].ws_url}/ws/careful", additional_headers=cookies(client)
        )
        await client.post("/login?user=ada")
        assert await closed(socket) == 3011
        await client.aclose()


async def test_sockets_close_when_their_session_expires(cluster_url: str, prefix: str) -> None:
    """4502 when nobody has used it; a request in time keeps the socket open."""
    sessions = SessionConfig(cookie=CookieConfig(secure=False), idle_timeout=1.0, absolute_timeout=60)
    async with place(cluster_url, prefix, 2, sessions=sessions) as here:
        idle, busy = await sign_in(here.nodes[0]), await sign_in(here.nodes[1], "bob")
        lone = await websockets.connect(
            f"{here.nodes[1].ws_url}/ws/careful", additional_headers=cookies(idle)
        )
        kept = await websockets.connect(
            f"{here.nodes[0].ws_url}/ws/careful", additional_headers=cookies(busy)
        )

        async def lone_is_closed() -> bool:
            await busy.get("/show")
            return lone.close_code is not None

        await eventually(lone_is_closed, interval=0.2)
        assert await closed(lone) == 4502
        assert kept.close_code is None
        await kept.close()
        await idle.aclose()
        await busy.aclose()


async def test_identified_sockets_close_on_logout_of_their_user(cluster_url: str, prefix: str) -> None:
    """An app with users of its own (Django, JWT): its sockets have no session of ours, and are found by user
    all the same.
    """

    def identify(scope: Any) -> str | None:
        return HTTPConnection(scope).headers.get("x-user")

    async with place(cluster_url, prefix, 2, identify=identify) as here:
        ada, bob = [
            await websockets.connect(
                f"{here.nodes[1].ws_url}/ws/careful", additional_headers={"X-User": user}
            )
            for user in ("ada", "bob")
        ]
        await eventually(lambda: here.clusters[1].stats().realtime.connections == 2)
        receipt = await here.clusters[0].user("ada").logout()
        assert (receipt.sessions, receipt.sockets_closed) == (0, 1)
        assert await closed(ada) == 4501
        assert bob.close_code is None
        await bob.close()


async def test_socket_can_save_and_its_session_is_seen_by_requests(cluster_url: str, prefix: str) -> None:
    """``save()`` on a WebSocket stores; after the logout it answers False and stores nothing."""
    async with place(cluster_url, prefix, 2) as here:
        client = await sign_in(here.nodes[0])
        socket = await websockets.connect(
            f"{here.nodes[1].ws_url}/ws/saves", additional_headers=cookies(client)
        )
        assert await socket.recv() == "true"

        async def seen() -> bool:
            return bool((await client.get("/show")).json()["data"] == {"from the socket": True})

        await eventually(seen)
        await socket.close()
        await client.aclose()


async def test_client_that_never_reads_is_cut_off(cluster_url: str, prefix: str) -> None:
    """A logout does not wait for a peer whose buffers are full: it is cut off after ``close_timeout``."""
    realtime = RealtimeConfig(close_timeout=0.5)
    async with place(cluster_url, prefix, 2, realtime=realtime) as here:
        client = await sign_in(here.nodes[0])
        socket = await websockets.connect(
            f"{here.nodes[1].ws_url}/ws/floods", additional_headers=cookies(client), max_queue=1
        )
        await asyncio.sleep(0.5)  # until every buffer on the way is full
        assert (await client.post("/logout")).json()["complete"]
        await eventually(lambda: here.clusters[1].stats().realtime.connections == 0, timeout=3)
        assert here.clusters[0].stats().realtime.connections == 0
        socket.transport.abort()
        await socket.wait_closed()
        await client.aclose()
