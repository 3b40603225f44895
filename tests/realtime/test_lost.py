"""What members get when publications of a room with history are lost for good."""

from __future__ import annotations

import pytest
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import Connected, Room, RoomRule
from tests.realtime.site import Node, Site
from tests.realtime.test_connection import cluster_of
from tests.support.waiting import eventually

RULE = RoomRule("kept:{name}", subscribe=True, history=1, presence=True)


async def lose(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two publications do not reach ``node``, and history keeps only the third, which does."""
    room, dropped = node.cluster.room("kept:a"), list[bytes]()
    with monkeypatch.context() as patch:
        patch.setattr(
            node.cluster._parts.rooms._delivery, "receive", lambda room, payload: dropped.append(payload)
        )
        await room.broadcast(1)
        await room.broadcast(2)
        await eventually(lambda: len(dropped) == 2)
    await room.broadcast(3)


async def _absent(room: Room) -> bool:
    return not await room.presence()


async def test_loss_ends_a_subscription(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is unsubscribed with 2500 and stays connected. It is not present in the room any more, on
    any node, and can subscribe again: then it gets what comes, and the position says that it missed some.
    """
    node, other = await site.node(rules=[RULE]), await site.node(rules=[RULE])
    room = other.cluster.room("kept:a")
    async with node.client() as client:
        subscribed = (await client.call("subscribe", {"channel": "kept:a"}))["subscribe"]
        assert len(await room.presence()) == 1
        await lose(node, monkeypatch)
        push = await client.push()
        assert push == {"channel": "kept:a", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}
        await eventually(lambda: _absent(room))
        assert node.cluster.stats().realtime.rooms == 0
        assert "ping" in await client.call("ping", {})
        back = {"channel": "kept:a", "recover": True, "epoch": subscribed["epoch"]}
        reply = await client.call("subscribe", {**back, "offset": subscribed.get("offset", 0)})
        assert reply["subscribe"]["was_recovering"]
        assert not reply["subscribe"].get("recovered")
        assert len(await room.presence()) == 1
        await room.broadcast(4)
        assert await client.pub() == 4


async def test_loss_closes_a_client_that_the_server_subscribed(
    lone_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot subscribe again by itself: 3010, and it comes back for what there is."""
    node = await lone_site.node(rules=[RULE], connect=lambda request: Connected(rooms=["kept:a"]))
    async with node.client() as client:
        await lose(node, monkeypatch)
        assert await client.drained() == (3010, "insufficient state")
    await eventually(lambda: node.cluster.stats().realtime.rooms == 0)
    assert not await node.cluster.room("kept:a").presence()


async def test_loss_closes_a_socket_of_the_app(lone_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare socket has no other sign for it than the close code 3010."""

    async def app(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket) as connection:
            await connection.join("kept:a")
            await connection.send("ready")
            async for _ in connection:
                pass

    node = await lone_site.node(rules=[RULE], routes=[WebSocketRoute("/ws", app)])
    async with node.raw(path="/ws") as client:
        assert await client.ws.recv() == "ready"
        await lose(node, monkeypatch)
        assert await client.drained() == (3010, "insufficient state")
    await eventually(lambda: node.cluster.stats().realtime.rooms == 0)
    assert not await node.cluster.room("kept:a").presence()
