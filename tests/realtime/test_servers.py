"""Other ASGI servers: no direct writes, and a forced close all the same."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from asgi_cluster import (
    Cluster,
    ClusterMiddleware,
    CookieConfig,
    RealtimeConfig,
    RoomRule,
    SessionConfig,
    get_session,
)
from loadtest.ports import free_port
from tests.realtime.site import Node, Site
from tests.realtime.test_connection import handler
from tests.support.machine import LOCAL
from tests.support.nodes import Node as Served
from tests.support.waiting import eventually


@asynccontextmanager
async def hypercorn(app: Any) -> AsyncIterator[Served]:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    port = free_port()
    config.bind = [f"{LOCAL}:{port}"]
    config.graceful_timeout = 1
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(app, config, shutdown_trigger=stop.wait))
        await eventually(lambda: listens(port), timeout=10)
        try:
            yield Served(port)
        finally:
            stop.set()


@asynccontextmanager
async def granian(app: Any) -> AsyncIterator[Served]:
    from granian.constants import Interfaces
    from granian.server.embed import Server

    port = free_port()
    server = Server(app, address=LOCAL, port=port, interface=Interfaces.ASGI)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await eventually(lambda: listens(port), timeout=10)
        try:
            yield Served(port)
        finally:
            server.stop()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((LOCAL, port)) == 0


INSECURE = SessionConfig(cookie=CookieConfig(secure=False))

Serve = Callable[[Any], AbstractAsyncContextManager[Served]]


@pytest.mark.parametrize("serve", [hypercorn, granian], ids=["hypercorn", "granian"])
@pytest.mark.parametrize("kind", ["echo", "catch", "pour"])
async def test_user_disconnect_closes_socket(
    serve: Serve, kind: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A socket of an app that knows nothing of us is closed with the code; its pending receive wakes."""
    cluster = Cluster(f"memory://{prefix}", identify=lambda scope: "ada")
    app = ClusterMiddleware(Starlette(routes=[WebSocketRoute("/ws", handler(kind))]), cluster)
    async with serve(app) as served:
        node = Node(cluster, served)
        async with node.raw(path="/ws") as client:
            await eventually(lambda: cluster.stats().realtime.connections == 1)
            assert cluster.stats().realtime.direct == 0
            await client.ws.send("hallo")
            if kind != "catch":
                await client.ws.recv()
            for _ in range(20):
                await asyncio.sleep(0)  # now the app waits for the next message
            await cluster.user("ada").disconnect(4501, "bye")
            assert await client.drained() == (4501, "bye")
            # By itself: the client has not gone yet.
            await eventually(lambda: cluster.stats().realtime.connections == 0)
    assert not [record for record in caplog.records if record.name.startswith("asgi_cluster")]


@pytest.mark.parametrize("serve", [hypercorn, granian], ids=["hypercorn", "granian"])
async def test_endpoint(serve: Serve, prefix: str) -> None:
    """Rooms work there as well, in order, whatever their size."""
    rule = RoomRule("open", subscribe=True, publish=True)
    cluster = Cluster(f"memory://{prefix}", realtime=RealtimeConfig(rules=[rule]))
    async with serve(ClusterMiddleware(Starlette(), cluster)) as served:
        node = Node(cluster, served)
        async with node.client(max_size=None) as client:
            await client.call("subscribe", {"channel": "open"})
            sent = [str(number) + "x" * (50_000 if number % 9 == 8 else 5) for number in range(40)]
            for data in sent:
                await cluster.room("open").broadcast(data)
            assert [await client.pub() for _ in sent] == sent
            await client.ws.send("nonsense")
            assert await client.closed() == (3501, "bad request")


@pytest.mark.parametrize("logged_out", ["here", "there"])
@pytest.mark.parametrize("error", [Exception("refused"), RuntimeError("refused"), TypeError("int wanted")])
async def test_a_close_that_fails_is_not_counted(
    logged_out: str, error: Exception, cluster_url: str, prefix: str
) -> None:
    """``sockets_closed`` is what the server took, of this node and of another one. The app's receive ends."""
    cluster, other = (
        Cluster(cluster_url, prefix=prefix, identify=lambda scope: "ada", sessions=INSECURE) for _ in range(2)
    )
    ended: list[Any] = []

    async def served(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        ended.append(await receive())

    async def sign_in(scope: Any, receive: Any, send: Any) -> None:
        await get_session(scope).login("ada")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with cluster, other:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(ClusterMiddleware(sign_in, cluster)), base_url="http://test"
        ) as http:
            cookie = (await http.get("/")).headers["set-cookie"].partition(";")[0]
        received: asyncio.Queue[Any] = asyncio.Queue()
        received.put_nowait({"type": "websocket.connect"})
        accepted = asyncio.Event()

        async def send(message: Any) -> None:
            accepted.set()
            if message["type"] == "websocket.close":
                assert type(message["code"]) is int
                raise error

        scope = {"type": "websocket", "path": "/", "headers": [(b"cookie", cookie.encode())]}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ClusterMiddleware(served, cluster)(scope, received.get, send))
            await accepted.wait()
            handle = cookie.partition("=")[2].rpartition(".")[0]
            receipt = await (cluster if logged_out == "here" else other).session(handle).logout()
            assert (receipt.sessions, receipt.complete, receipt.sockets_closed) == (1, True, 0)
    assert ended == [{"type": "websocket.disconnect", "code": 4501, "reason": "logged out"}]


# uvicorn, as it is and as it might become


CURE = "uvicorn has changed: adapt asgi_cluster/compat/uvicorn.py. Until then sockets work, through ASGI send"


class _Changed(WebSocketsSansIOProtocol):
    """As if a later version kept the same fact in another form."""

    @property
    def close_sent(self) -> Any:
        return int(self.__dict__.get("close_sent", 0))

    @close_sent.setter
    def close_sent(self, value: Any) -> None:
        self.__dict__["close_sent"] = value


_Changed.__name__ = "WebSocketsSansIOProtocol"
_Changed.__module__ = WebSocketsSansIOProtocol.__module__


async def test_unknown_version_is_written_to_directly(
    lone_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is what it can do, not what it is called."""
    monkeypatch.setattr("uvicorn.__version__", "99.0")
    node = await lone_site.node(rules=[RoomRule("open", subscribe=True)])
    async with node.client():
        assert node.cluster.stats().realtime.direct == 1, CURE


async def test_changed_uvicorn_is_written_to_through_send(
    lone_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages and the close arrive all the same; one INFO line names the version and the attribute."""
    caplog.set_level(logging.INFO, "asgi_cluster")
    node = await lone_site.node(rules=[RoomRule("open", subscribe=True)], server={"ws": _Changed})
    async with node.client() as one, node.client() as two:
        stats = node.cluster.stats().realtime
        assert stats.direct == 0
        ((reason, count),) = stats.fallback.items()
        assert count == 2
        assert uvicorn.__version__ in reason
        assert "close_sent" in reason
        for client in (one, two):
            await client.call("subscribe", {"channel": "open"})
        await node.cluster.room("open").broadcast("hallo")
        assert [await one.pub(), await two.pub()] == ["hallo"] * 2
        await one.ws.send("nonsense")
        assert await one.closed() == (3501, "bad request")
    lines = [record for record in caplog.records if reason in record.getMessage()]
    assert [record.levelname for record in lines] == ["INFO"]
