"""Sockets on other event loops than the one that started the cluster."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_cluster import Cluster, ClusterMiddleware, RoomRule
from tests.realtime.site import Site

_ROUNDS = 20


@pytest.mark.quick
async def test_test_client_beside_another_loop(prefix: str) -> None:
    """Starlette's TestClient, on a thread and a loop of its own, works with a cluster that nobody started and
    that is used from here as well: its messages, broadcasts from here, and a close from here that its app
    sees.
    """
    cluster = Cluster(f"memory://{prefix}")
    ended: list[int | None] = []
    groups: list[bool] = []

    async def app(websocket: WebSocket) -> None:
        async with cluster.accept(websocket, user_id="ada") as connection:
            groups.append(connection.socket.tasks is cluster._parts.node.tasks)
            await connection.join("room")
            await connection.send("ready")
            async for message in connection:
                assert isinstance(message, str)
                await connection.send(f"echo {message}")
        ended.append(connection.socket.close_code)

    wrapped = ClusterMiddleware(Starlette(routes=[WebSocketRoute("/ws", app)]), cluster)
    joined, closing = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def visit() -> tuple[list[str], int]:
        heard = []
        with TestClient(wrapped).websocket_connect("/ws") as websocket:
            heard.append(websocket.receive_text())
            for number in range(_ROUNDS):
                websocket.send_text(str(number))
                heard.append(websocket.receive_text())
            loop.call_soon_threadsafe(joined.set)
            heard.append(websocket.receive_text())
            loop.call_soon_threadsafe(closing.set)
            try:
                websocket.receive_text()
            except WebSocketDisconnect as disconnect:
                return heard, disconnect.code
        return heard, 0

    async with asyncio.timeout(10):
        before = asyncio.all_tasks()
        visiting = asyncio.create_task(asyncio.to_thread(visit))
        await joined.wait()
        strangers = asyncio.all_tasks() - before - {visiting}
        await cluster.room("room").broadcast("from here")
        await closing.wait()
        assert cluster._parts.hub.close_user("ada", 4000, "enough") == 1
        heard, code = await visiting
    assert heard == ["ready", *(f"echo {number}" for number in range(_ROUNDS)), "from here"]
    assert code == 4000
    assert ended == [4000]
    assert groups == [False]
    assert not strangers


async def test_the_last_leave_of_a_socket_is_published_without_a_start(prefix: str) -> None:
    """Without a start a socket owns the tasks that publish its joins and leaves, and they end with it."""
    async with AsyncExitStack() as stack:
        site = Site(f"memory://{prefix}", prefix, stack)
        node = await site.node(
            server={"lifespan": "off"}, rules=[RoomRule("room", subscribe=True, join_leave=True)]
        )
        async with node.client() as stays:
            await stays.call("subscribe", {"channel": "room"})
            async with node.client() as goes:
                await goes.call("subscribe", {"channel": "room"})
            async with asyncio.timeout(5):
                pushes = [await stays.push() for _ in range(3)]
    assert [("join" in push, "leave" in push) for push in pushes] == [
        (True, False),
        (True, False),
        (False, True),
    ]
