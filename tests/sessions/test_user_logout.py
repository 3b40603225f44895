"""A user's logout reaches everything that acts as that user, whatever session it carries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
import websockets
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import Cluster, ClusterMiddleware, ConnectRequest, RealtimeConfig
from asgi_cluster.sockets.logouts import RecentLogouts
from tests.sessions.app import Gate
from tests.sessions.test_live_logout import SESSIONS, Place, closed, cookies, place, sign_in
from tests.support.nodes import Node, serve
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import eventually


def identify(scope: Mapping[str, Any]) -> str | None:
    return HTTPConnection(dict(scope)).headers.get("x-user")


def token_is_user(request: ConnectRequest) -> str | None:
    return request.token or None


async def anonymous(node: Node) -> httpx.AsyncClient:
    """A browser with a session that nobody has signed in to."""
    client = httpx.AsyncClient(base_url=node.url)
    assert (await client.post("/put", json={"cart": 1})).status_code == 200
    return client


async def connect(
    node: Node,
    path: str = "/realtime/websocket",
    *,
    cookie: Mapping[str, str] = {},
    token: str = "",
    user: str = "",
) -> websockets.ClientConnection:
    """An open socket; at the endpoint one that has connected."""
    headers = {**cookie, **({"X-User": user} if user else {})}
    socket = await websockets.connect(f"{node.ws_url}{path}", additional_headers=headers)
    if path == "/realtime/websocket":
        await socket.send(json.dumps({"id": 1, "connect": {"token": token} if token else {}}))
        assert '"connect"' in str(await socket.recv())
    return socket


async def open_sockets(here: Place, count: int) -> None:
    await eventually(lambda: sum(c.stats().realtime.connections for c in here.clusters) == count)


async def answers(socket: websockets.ClientConnection) -> bool:
    """Whether the endpoint still serves this client."""
    await socket.send('{"id":9,"rpc":{"method":"x"}}')
    return '"id":9' in str(await socket.recv())


@pytest.mark.parametrize("how", ["identify", "token"])
@pytest.mark.parametrize("where", ["here", "there"])
async def test_user_that_is_not_the_sessions_user(
    cluster_url: str, prefix: str, how: str, where: str
) -> None:
    """The user comes from ``identify`` or a token, the cookie from an anonymous session: a logout of the user
    closes the socket, here and on another node, counts it, and leaves another user's alone.
    """
    options: dict[str, Any] = (
        {"identify": identify} if how == "identify" else {"realtime": RealtimeConfig(connect=token_is_user)}
    )
    async with place(cluster_url, prefix, 2, **options) as here:
        browsers = [await anonymous(here.nodes[0]) for _ in range(2)]
        ada, bob = [
            await connect(
                here.nodes[1],
                cookie=cookies(browser),
                token=user if how == "token" else "",
                user=user if how == "identify" else "",
            )
            for browser, user in zip(browsers, ("ada", "bob"), strict=True)
        ]
        await open_sockets(here, 2)
        receipt = await here.clusters[1 if where == "here" else 0].user("ada").logout()
        assert (receipt.sessions, receipt.complete, receipt.sockets_closed) == (0, True, 1)
        assert await closed(ada) == 4501
        assert await answers(bob)
        await bob.close()
        for browser in browsers:
            await browser.aclose()


async def test_token_user_with_the_session_of_another(cluster_url: str, prefix: str) -> None:
    """Signed in as one and connected as another: a logout of either closes the socket."""
    realtime = RealtimeConfig(connect=token_is_user)
    async with place(cluster_url, prefix, 2, realtime=realtime) as here:
        for user in ("ada", "robot"):
            browser = await sign_in(here.nodes[0])
            socket = await connect(here.nodes[1], cookie=cookies(browser), token="robot")
            receipt = await here.clusters[0].user(user).logout()
            assert (receipt.complete, receipt.sockets_closed) == (True, 1)
            assert await closed(socket) == 4501
            await browser.aclose()


@pytest.mark.parametrize("where", ["here", "there"])
async def test_session_user_overridden_by_accept(cluster_url: str, prefix: str, where: str) -> None:
    """``cluster.accept(user_id=)`` names another user than the session's: the session's user's logout ends
    the session, and so closes the socket; a message to that user does not reach it.
    """
    clusters: list[Cluster] = []

    async def overridden(websocket: WebSocket) -> None:
        cluster: Cluster = websocket.app.state.cluster
        async with cluster.accept(websocket, user_id="robot") as connection:
            async for _ in connection:
                pass

    here = Place()

    def app(number: int) -> ClusterMiddleware:
        cluster = Cluster(cluster_url, prefix=prefix, node_label=f"n{number}", sessions=SESSIONS)
        clusters.append(cluster)
        inner = Starlette(routes=[WebSocketRoute("/ws", overridden), Mount("/", here.app())])
        inner.state.cluster = cluster
        return ClusterMiddleware(inner, cluster)

    async with serve(app(0)) as first, serve(app(1)) as second:
        browser = await sign_in(first)
        socket = await connect(second, "/ws", cookie=cookies(browser))
        await eventually(lambda: clusters[1].stats().realtime.connections == 1)
        await clusters[0].user("ada").send("to ada")
        await clusters[0].user("robot").send("to robot")
        assert await socket.recv() == "to robot"
        receipt = await clusters[1 if where == "here" else 0].user("ada").logout()
        assert (receipt.sessions, receipt.complete, receipt.sockets_closed) == (1, True, 1)
        assert await closed(socket) == 4501
        await browser.aclose()


@pytest.mark.parametrize("user", ["session", "token"])
async def test_kept_session_keeps_its_sockets_whoever_they_are(
    cluster_url: str, prefix: str, user: str
) -> None:
    """``exclude`` spares the sockets of that session: one that is the user by its session, and one that is
    the user by a token and carries an anonymous session.
    """
    async with place(cluster_url, prefix, 2, realtime=RealtimeConfig(connect=token_is_user)) as here:
        browsers = [
            await (sign_in(here.nodes[0]) if user == "session" else anonymous(here.nodes[0]))
            for _ in range(2)
        ]
        token = "ada" if user == "token" else ""
        kept, ended = [
            await connect(here.nodes[1], cookie=cookies(browser), token=token) for browser in browsers
        ]
        handle = (await browsers[0].get("/show")).json()["handle"]
        receipt = await here.clusters[0].user("ada").logout(exclude=handle)
        assert (receipt.complete, receipt.sockets_closed) == (True, 1)
        assert await closed(ended) == 4501
        assert await answers(kept)
        await kept.close()
        for browser in browsers:
            await browser.aclose()


@pytest.mark.parametrize("where", ["here", "there"])
@pytest.mark.parametrize("ends", ["the user", "the session"])
async def test_logout_while_the_connect_hook_waits(
    cluster_url: str, prefix: str, where: str, ends: str
) -> None:
    """The hook names the user only at its end; a logout of that user, or of the session, that came meanwhile
    closes the client with 4501, and its connect is not answered.
    """
    gate = Gate()
    connected: list[str | None] = []

    async def hook(request: ConnectRequest) -> str | None:
        await gate.pass_through()
        return request.token

    async def on_connect(connection: Any) -> None:
        connected.append(connection.user_id)

    realtime = RealtimeConfig(connect=hook, on_connect=on_connect)
    async with place(cluster_url, prefix, 2, realtime=realtime) as here:
        browser = await anonymous(here.nodes[0])
        socket = await websockets.connect(
            f"{here.nodes[1].ws_url}/realtime/websocket", additional_headers=cookies(browser)
        )
        await socket.send('{"id":1,"connect":{"token":"ada"}}')
        await gate.reached.wait()
        origin = here.clusters[1 if where == "here" else 0]
        if ends == "the user":
            assert (await origin.user("ada").logout()).complete
        else:
            handle = (await browser.get("/show")).json()["handle"]
            assert (await origin.session(handle).logout()).complete
        gate.open.set()
        with pytest.raises(websockets.ConnectionClosed):  # and no reply before it
            await asyncio.wait_for(socket.recv(), 5)
        assert socket.close_code == 4501
        assert connected == []
        # The next decision is a new one.
        again = await connect(here.nodes[1], cookie=cookies(browser), token="ada")
        assert connected == ["ada"]
        await again.close()
        await browser.aclose()


@pytest.mark.parametrize("where", ["here", "there"])
async def test_logout_while_identify_waits(cluster_url: str, prefix: str, where: str) -> None:
    """A slow ``identify`` names a user who was logged out meanwhile: accepted, and closed with 4501."""
    gate = Gate()

    async def slowly(scope: Mapping[str, Any]) -> str | None:
        await gate.pass_through()
        return "ada"

    async with place(cluster_url, prefix, 2, identify=slowly) as here:
        opening = asyncio.create_task(websockets.connect(f"{here.nodes[1].ws_url}/ws/careful").__aenter__())
        await gate.reached.wait()
        assert (await here.clusters[1 if where == "here" else 0].user("ada").logout()).complete
        gate.open.set()
        assert await closed(await opening) == 4501
        again = await connect(here.nodes[1], "/ws/careful")
        await here.clusters[0].user("bob").logout()
        assert again.close_code is None
        await again.close()


@pytest.mark.parametrize("accepted", ["by the cluster", "by the app before"])
async def test_logout_while_the_app_decides_who_it_is(cluster_url: str, prefix: str, accepted: str) -> None:
    """An app that looks a user up and then calls ``cluster.accept(user_id=)``: 4501 when the lookup is part
    of the handshake; 3011, which lets the client ask again, when the socket was open before.
    """
    gate = Gate()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)
        if accepted == "by the app before":
            await websocket.accept()
        await gate.pass_through()
        async with cluster.accept(websocket, user_id="ada") as connection:
            async for message in connection:
                await connection.send(message)

    cluster = Cluster(cluster_url, prefix=prefix, sessions=SESSIONS)
    other = Cluster(cluster_url, prefix=prefix, sessions=SESSIONS)

    async def visit(url: str) -> int | None:
        opening = asyncio.create_task(websockets.connect(url).__aenter__())
        await gate.reached.wait()
        await other.user("ada").logout()
        await other.user("bob").logout()
        gate.open.set()
        return await closed(await opening)

    async with other, serve(ClusterMiddleware(app, cluster)) as node:
        assert await visit(node.ws_url) == (4501 if accepted == "by the cluster" else 3011)
        async with websockets.connect(node.ws_url) as again:
            await again.send("hello")
            assert await again.recv() == "hello"


@pytest.mark.parametrize("who", ["session user", "token user"])
async def test_sockets_are_counted_when_the_nodes_own_message_comes_first(
    valkey: Server, prefix: str, who: str
) -> None:
    """The logout's message closes the socket before the reply to the logout is read: counted once all the
    same.
    """
    async with Proxy(valkey.url) as proxy:
        realtime = RealtimeConfig(connect=token_is_user)
        async with place(proxy.url, prefix, 1, realtime=realtime) as here:
            browser = await (sign_in if who == "session user" else anonymous)(here.nodes[0])
            token = "ada" if who == "token user" else ""
            socket = await connect(here.nodes[0], cookie=cookies(browser), token=token)
            proxy.stall("down", only=b"EVALSHA")
            logout = asyncio.create_task(here.clusters[0].user("ada").logout())
            assert await closed(socket) == 4501
            proxy.heal()
            receipt = await logout
            assert (receipt.complete, receipt.sockets_closed) == (True, 1)
            await browser.aclose()


async def test_receipt_counts_a_socket_that_the_message_did_not_name(valkey: Server, prefix: str) -> None:
    """A session that the index has lost is ended and not named: a node answers when it has looked, so that a
    complete receipt has its socket, too.
    """
    async with place(valkey.url, prefix, 2) as here:
        browser = await sign_in(here.nodes[0])
        handle = (await browser.get("/show")).json()["handle"]
        socket = await connect(here.nodes[1], cookie=cookies(browser))
        with valkey.client() as client:
            (index,) = client.keys(f"{prefix}:{{{handle[:2]}}}:i:ada")
            assert client.zrem(index, handle[3:]) == 1
        receipt = await here.clusters[0].user("ada").logout()
        assert (receipt.complete, receipt.sockets_closed) == (True, 1)
        assert await closed(socket) == 4501
        await browser.aclose()


def test_recent_logouts_are_bounded_and_know_what_they_forgot() -> None:
    """A logout counts for those who began before it; the kept session is spared by its own logout only; when
    more users were logged out than are remembered, the answer is "not known".
    """
    recent = RecentLogouts(limit=2)
    recent.record("ada", None, "one")
    began = recent.last
    assert recent.since(0, "ada", None) is True
    assert recent.since(began, "ada", None) is False
    recent.record("ada", "kept")
    assert recent.has("ada", "one")
    assert not recent.has("ada", "two")
    assert not recent.has("zoe", "one")
    assert recent.since(began, "ada", "kept") is False
    assert recent.since(began, "ada", "other") is True
    assert recent.since(0, "ada", "kept") is True
    recent.record("ada", "other")
    assert recent.since(began, "ada", "kept") is True
    assert recent.since(began, "ada", "other") is True
    assert recent.since(recent.last - 1, "ada", "other") is False
    for user in ("bob", "eve"):
        recent.record(user, None)
    assert recent.since(began, "zoe", None) is None
    assert recent.since(recent.last, "zoe", None) is False
