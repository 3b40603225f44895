"""A user's logout that a node missed: its sockets without a session of that user are found by the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest
import websockets
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import Cluster, ClusterMiddleware, RealtimeConfig
from asgi_cluster.ids import Handle, bucket_of
from asgi_cluster.sessions.store import UserLogout
from asgi_cluster.sockets.closes import Closes
from asgi_cluster.sockets.socket import Socket
from tests.sessions.test_live_logout import SESSIONS, Place, cookies, place, sign_in
from tests.sessions.test_user_logout import anonymous, answers, connect, identify, token_is_user
from tests.support.nodes import Node, serve
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import eventually

WHO = ("identify", "token", "accept")


class Cut:
    """Two nodes. The second reaches the server through a proxy and can be cut off."""

    def __init__(self, url: str, prefix: str, proxy: Proxy) -> None:
        self.proxy = proxy
        options: dict[str, Any] = {
            "prefix": prefix,
            "sessions": SESSIONS,
            "identify": identify,
            "realtime": RealtimeConfig(connect=token_is_user),
        }
        self.far = Cluster(url, **options)
        self.near = Cluster(proxy.url, **options)
        self.nodes: list[Node] = []
        self.stack = AsyncExitStack()

    def app(self, cluster: Cluster) -> ClusterMiddleware:
        async def accepts(websocket: WebSocket) -> None:
            user = websocket.query_params["user"]
            async with cluster.accept(websocket, user_id=user) as connection:
                async for message in connection:
                    await connection.send(message)

        routes = [WebSocketRoute("/accept", accepts), Mount("/", Place().app())]
        return ClusterMiddleware(Starlette(routes=routes), cluster)

    async def browser(self, user: str | None = None) -> httpx.AsyncClient:
        """One that is signed in, or has an anonymous session."""
        found = await (anonymous(self.nodes[0]) if user is None else sign_in(self.nodes[0], user))
        return await self.stack.enter_async_context(aclosing(found))

    async def open(
        self, who: str, user: str, browser: httpx.AsyncClient | None = None
    ) -> websockets.ClientConnection:
        """A socket of ``user`` at the second node, with the cookie of ``browser``."""
        options: dict[str, Any] = {} if browser is None else {"cookie": cookies(browser)}
        match who:
            case "identify":
                opening = connect(self.nodes[1], user=user, **options)
            case "token":
                opening = connect(self.nodes[1], token=user, **options)
            case _:
                opening = connect(self.nodes[1], f"/accept?user={user}", **options)
        socket = await opening
        self.stack.push_async_callback(socket.close)
        return socket

    @asynccontextmanager
    async def off(self, fault: str = "cut") -> AsyncIterator[None]:
        """The second node is cut off meanwhile; when this begins it has given its connections up."""
        sockets = self.near.stats().realtime.connections
        getattr(self.proxy, fault)()
        await eventually(lambda: not self.near.stats().bus.connected, timeout=20)
        yield
        assert self.near.stats().realtime.connections >= sockets, "no push can have closed one"
        self.proxy.heal()


@pytest.fixture
async def cut(valkey: Server, prefix: str) -> AsyncIterator[Cut]:
    async with Proxy(valkey.url) as proxy:
        found = Cut(valkey.url, prefix, proxy)
        async with serve(found.app(found.far)) as far, serve(found.app(found.near)) as near:
            found.nodes = [far, near]
            async with found.stack:
                yield found


async def code(socket: websockets.ClientConnection) -> int | None:
    """What it is closed with: after the link is back, and after the verifier's pause between two tries."""
    await asyncio.wait_for(socket.wait_closed(), 20)
    return socket.close_code


async def is_open(socket: websockets.ClientConnection) -> bool:
    """Whether the app still reads it. (A close would have come before the answer.)"""
    if "/accept" in socket.request.path if socket.request else False:
        await socket.send("hello")
        return await socket.recv() == "hello"
    return await answers(socket)


@pytest.mark.parametrize("fault", ["cut", "blackhole"])
@pytest.mark.parametrize("cookie", ["no session", "anonymous session"])
async def test_logout_while_the_node_is_cut_off(cut: Cut, cookie: str, fault: str) -> None:
    """The sockets of that user close with 4501 when the node reaches the store again, wherever their user
    came from; those of another user stay.
    """
    browser = await cut.browser() if cookie == "anonymous session" else None
    ada = [await cut.open(who, "ada", browser) for who in WHO]
    bob = [await cut.open(who, "bob", browser) for who in WHO]
    async with cut.off(fault):
        await cut.far.user("ada").logout(timeout=0)
    assert [await code(socket) for socket in ada] == [4501] * 3
    assert all([await is_open(socket) for socket in bob])


async def test_logout_that_kept_a_session(cut: Cut) -> None:
    """The sockets of the kept session stay, also when it is not the user's; those of the user's own session
    do.
    """
    own, guest = await cut.browser("ada"), await cut.browser()
    kept = (await guest.get("/show")).json()["handle"]
    staying = await cut.open("token", "ada", guest)
    mine, gone = await cut.open("token", "ada", own), await cut.open("token", "ada")
    async with cut.off():
        await cut.far.user("ada").logout(exclude=kept, timeout=0)
    assert [await code(socket) for socket in (mine, gone)] == [4501] * 2
    assert await is_open(staying)

    own = await cut.browser("ada")
    kept = (await own.get("/show")).json()["handle"]
    mine, gone = await cut.open("token", "ada", own), await cut.open("token", "ada")
    async with cut.off():
        await cut.far.user("ada").logout(exclude=kept, timeout=0)
    assert [await code(socket) for socket in (staying, gone)] == [4501] * 2
    assert await is_open(mine)


async def test_logouts_that_kept_different_sessions(cut: Cut) -> None:
    """A kept session's sockets close when an earlier one of the missed logouts did not keep it."""
    guests = [await cut.browser() for _ in range(2)]
    handles = [(await guest.get("/show")).json()["handle"] for guest in guests]
    sockets = [await cut.open("token", "ada", guest) for guest in guests]
    async with cut.off():
        for handle in (handles[0], handles[1], handles[1]):
            await cut.far.user("ada").logout(exclude=handle, timeout=0)
    assert [await code(socket) for socket in sockets] == [4501] * 2


@pytest.mark.parametrize("before", ["nothing", "a logout", "an epoch that expired"])
async def test_login_elsewhere_is_no_logout(cut: Cut, valkey: Server, prefix: str, before: str) -> None:
    """A login of the user on another node meanwhile, also one that finds no epoch any more, closes nothing;
    nor does a logout from before the socket.
    """
    if before != "nothing":
        await cut.browser("ada")
        await cut.far.user("ada").logout()
    ada = [await cut.open(who, "ada") for who in WHO]
    witness = await cut.open("token", "eve")
    async with cut.off():
        if before == "an epoch that expired":
            with valkey.client() as client:
                assert client.delete(*client.keys(f"{prefix}:*:e:ada"))
        await cut.browser("ada")
        await cut.far.user("eve").logout(timeout=0)
    assert await code(witness) == 4501
    assert all([await is_open(socket) for socket in ada])


async def test_socket_that_came_right_after_the_logout(cut: Cut) -> None:
    """A node that has processed the logout closes no socket from after it, however soon it came."""
    witness = await cut.open("token", "eve")
    await cut.far.user("ada").logout()
    ada = await cut.open("token", "ada")
    async with cut.off():
        await cut.far.user("eve").logout(timeout=0)
    assert await code(witness) == 4501
    assert await is_open(ada)


async def test_socket_that_came_while_the_store_did_not_answer(cut: Cut) -> None:
    """It is accepted as ever, and closes with a logout that comes afterwards."""
    async with cut.off():
        sockets = [await cut.open(who, "ada") for who in WHO]
        await cut.far.user("ada").logout(timeout=0)
    assert [await code(socket) for socket in sockets] == [4501] * 3


@pytest.mark.parametrize("kind", ["memory", "valkey", "sentinel_set", "redis_cluster"])
async def test_lost_message_on_every_backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, prefix: str
) -> None:
    """A node that never gets the message finds the logout in the store."""
    url = f"memory://{prefix}" if kind == "memory" else request.getfixturevalue(kind).url
    async with place(url, prefix, 2, realtime=RealtimeConfig(connect=token_is_user)) as here:
        ada, bob = [await connect(here.nodes[1], token=user) for user in ("ada", "bob")]
        near = here.clusters[1]
        lost: list[bytes] = []
        with monkeypatch.context() as patch:
            patch.setattr(near._parts.dispatch, "session_message", lost.append)
            assert (await here.clusters[0].user("ada").logout(timeout=0)).sockets_closed == 0
            await eventually(lambda: lost)
        near._parts.revalidator.wake()
        assert await code(ada) == 4501
        assert await answers(bob)
        await bob.close()


async def test_socket_is_judged_by_its_age(cut: Cut) -> None:
    """Older than the logout: 4501. Younger by less than clocks may differ: 3011, which lets the client ask
    again. Else, or when the node has processed that logout, it stays.
    """
    hub, now, closed = cut.near._parts.hub, 1000.0, dict[str, int]()

    async def judged(sockets: dict[str, tuple[float, str | None, str | None]], logout: UserLogout) -> None:
        closed.clear()
        async with asyncio.TaskGroup() as tasks:
            made = []
            for name, (since, handle, owner) in sockets.items():

                async def send(message: Any, name: str = name) -> None:
                    closed[name] = message["code"]

                socket = Socket(
                    {}, send, tasks=tasks, crosses_loops=False, close_timeout=1.0, closes=Closes()
                )
                socket.user, socket.since, socket.handle, socket.owner = "ada", since, handle, owner
                hub.register(socket)
                socket.opened()
                made.append(socket)
            before = None if logout.before is None else now - logout.before
            hub.close_logged_out("ada", logout.id, at=now - logout.ago, keep=logout.keep, before=before)
            for socket in made:
                hub.unregister(socket)

    ages = {
        "old": (890.0, None, None),
        "unclear": (900.5, None, None),
        "new": (902.0, None, None),
        "own": (890.0, f"{bucket_of('ada'):02x}.x", "ada"),
        "kept": (890.0, "00.kept", None),
        "kept long": (790.0, "00.kept", "bob"),
    }
    logout = UserLogout(id="one", ago=100.0, keep=None, before=None)
    await judged(ages, logout)
    assert closed == {"old": 4501, "unclear": 3011, "kept": 4501, "kept long": 4501}
    kept = UserLogout(id="one", ago=100.0, keep=Handle("00.kept"), before=200.0)
    await judged(ages, kept)
    assert closed == {"old": 4501, "unclear": 3011, "kept long": 4501}
    hub.logouts.record("ada", "00.kept", "one")
    await judged(ages, kept)
    assert closed == {"kept long": 4501}
    await judged(ages, logout)
    assert closed == {}
