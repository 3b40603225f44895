"""The maintained Python SDK, unchanged, against the endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import centrifuge
import httpx
import pytest

from asgi_cluster import ConnectRequest, NotPermitted, RoomRule, TokenExpired
from asgi_cluster.rooms.rules import Connected
from tests.realtime.conftest import sign_in
from tests.realtime.site import Node, Site
from tests.support.waiting import eventually

OPEN = RoomRule("open:{name}", subscribe=True, publish=True)
KEPT = RoomRule("kept:{name}", subscribe=True, publish=True, history=100, presence=True, join_leave=True)


class Heard(centrifuge.SubscriptionEventHandler, centrifuge.ClientEventHandler):  # type: ignore[misc]
    """Everything that the SDK reports."""

    def __init__(self) -> None:
        self.data: list[Any] = []
        self.offsets: list[int] = []
        self.subscribed: list[Any] = []
        self.unsubscribed: list[Any] = []
        self.disconnected: list[Any] = []
        self.connecting: list[Any] = []
        self.joined: list[str] = []
        self.left: list[str] = []

    async def on_publication(self, ctx: Any) -> None:
        self.data.append(ctx.pub.data)
        self.offsets.append(ctx.pub.offset)

    async def on_subscribed(self, ctx: Any) -> None:
        self.subscribed.append(ctx)

    async def on_unsubscribed(self, ctx: Any) -> None:
        self.unsubscribed.append(ctx)

    async def on_disconnected(self, ctx: Any) -> None:
        self.disconnected.append((ctx.code, ctx.reason))

    async def on_connecting(self, ctx: Any) -> None:
        self.connecting.append((ctx.code, ctx.reason))

    async def on_join(self, ctx: Any) -> None:
        self.joined.append(ctx.info.user)

    async def on_leave(self, ctx: Any) -> None:
        self.left.append(ctx.info.user)


@asynccontextmanager
async def sdk(node: Node, cookie: str = "", **options: Any) -> AsyncIterator[tuple[centrifuge.Client, Heard]]:
    """A connected client of the SDK."""
    heard = Heard()
    client = centrifuge.Client(
        node.endpoint,
        events=heard,
        headers={"cookie": cookie} if cookie else {},
        min_reconnect_delay=0.02,
        max_reconnect_delay=0.1,
        proxy=None,
        **options,
    )
    await client.connect()
    await client.ready()
    try:
        yield client, heard
    finally:
        await client.disconnect()


async def subscribe(client: centrifuge.Client, room: str, **options: Any) -> tuple[Any, Heard]:
    heard = Heard()
    subscription = client.new_subscription(
        room, events=heard, min_resubscribe_delay=0.02, max_resubscribe_delay=0.1, **options
    )
    await subscription.subscribe()
    await subscription.ready()
    return subscription, heard


async def test_publish_and_receive(site: Site) -> None:
    """Two SDK clients on two nodes exchange messages, and the server reaches both."""
    first, second = await site.node(rules=[OPEN]), await site.node(rules=[OPEN])
    async with sdk(first) as (ada, _), sdk(second) as (bob, _):
        subscription, at_ada = await subscribe(ada, "open:a")
        _, at_bob = await subscribe(bob, "open:a")
        await subscription.publish({"from": "ada"})
        await first.cluster.room("open:a").broadcast("from the server")
        await eventually(lambda: at_bob.data == [{"from": "ada"}, "from the server"])
        await eventually(lambda: at_ada.data == at_bob.data)


async def test_refused(lone_site: Site) -> None:
    """A refusal is final for the subscription and leaves the client connected."""
    node = await lone_site.node(rules=[OPEN, RoomRule("closed")])
    async with sdk(node) as (client, heard):
        refused = Heard()
        await client.new_subscription("closed", events=refused).subscribe()
        await eventually(lambda: bool(refused.unsubscribed))
        assert refused.unsubscribed[0].code == 103
        await subscribe(client, "open:a")
        assert not heard.disconnected


async def test_logout_is_terminal(site: Site) -> None:
    """4501 ends the client for good; nobody reconnects."""
    node, other = await site.node(rules=[OPEN]), await site.node(rules=[OPEN])
    cookie = await sign_in(node, "ada")
    async with sdk(other, cookie) as (_, heard):
        async with httpx.AsyncClient(base_url=node.http, headers={"cookie": cookie}) as http:
            await http.get("/logout")
        await eventually(lambda: heard.disconnected == [(4501, "logged out")])
    await eventually(lambda: other.cluster.stats().realtime.connections == 0)


async def test_recovers_after_a_cut(site: Site) -> None:
    """A dropped connection comes back by itself and misses nothing in a room with history."""
    node = await site.node(rules=[KEPT])
    async with sdk(node) as (client, heard):
        _, at = await subscribe(client, "kept:a")
        room = node.cluster.room("kept:a")
        await room.broadcast(0)
        await eventually(lambda: at.data == [0])
        client._conn.transport.abort()
        for number in range(1, 6):
            await room.broadcast(number)
        await eventually(lambda: at.data == [0, 1, 2, 3, 4, 5])
        assert [offset - at.offsets[0] for offset in at.offsets] == [0, 1, 2, 3, 4, 5]
        assert at.subscribed[-1].recovered
        assert not heard.disconnected


async def test_told_when_it_cannot_recover(site: Site) -> None:
    """More was published than the room keeps: ``recovered`` is false, and nothing is delivered as if it were
    all.
    """
    rule = RoomRule("short", subscribe=True, history=3)
    node = await site.node(rules=[rule])
    async with sdk(node) as (client, _):
        _, at = await subscribe(client, "short")
        await node.cluster.room("short").broadcast(0)
        await eventually(lambda: at.data == [0])
        client._conn.transport.abort()
        for number in range(1, 9):
            await node.cluster.room("short").broadcast(number)
        await eventually(lambda: len(at.subscribed) == 2)
        assert at.subscribed[-1].was_recovering
        assert not at.subscribed[-1].recovered
        await node.cluster.room("short").broadcast("next")
        await eventually(lambda: at.data[-1:] == ["next"])
        # On a busy machine it is back before the last of them was published.
        live = at.data[1:-1]
        assert live == list(range(9 - len(live), 9))


async def test_history_and_presence(site: Site) -> None:
    """History with limit, since and reverse; presence and its numbers; joins and leaves."""
    node, other = await site.node(rules=[KEPT]), await site.node(rules=[KEPT])
    ada, bob = await sign_in(node, "ada"), await sign_in(node, "bob")
    async with sdk(node, ada) as (first, _):
        subscription, at = await subscribe(first, "kept:a")
        for number in range(5):
            await subscription.publish(number)
        page = await subscription.history(limit=-1)
        assert [pub.data for pub in page.publications] == [0, 1, 2, 3, 4]
        assert [pub.info.user for pub in page.publications] == ["ada"] * 5
        assert page.offset == page.publications[-1].offset
        since = centrifuge.StreamPosition(page.offset - 3, page.epoch)
        assert [pub.data for pub in (await subscription.history(limit=2, since=since)).publications] == [2, 3]
        newest = await subscription.history(limit=2, reverse=True)
        assert [pub.data for pub in newest.publications] == [4, 3]
        with pytest.raises(centrifuge.exceptions.ReplyError) as refused:
            await subscription.history(limit=-1, since=centrifuge.StreamPosition(2, "other"))
        assert refused.value.code == 112
        async with sdk(other, bob) as (second, _), sdk(other, bob) as (third, _):
            for client in (second, third):
                await subscribe(client, "kept:a")
            people = (await subscription.presence()).clients
            assert sorted(info.user for info in people.values()) == ["ada", "bob", "bob"]
            stats = await subscription.presence_stats()
            assert (stats.num_clients, stats.num_users) == (3, 2)
            await eventually(lambda: at.joined[-2:] == ["bob", "bob"])
        await eventually(lambda: at.left == ["bob", "bob"])
        assert (await subscription.presence_stats()).num_clients == 1


async def test_rpc(lone_site: Site) -> None:
    """``rpc`` calls the function of that name, sync or async, with the connection and the data."""

    async def add(connection: Any, data: Any) -> Any:
        return {"sum": sum(data), "user": connection.user_id}

    node = await lone_site.node(rpc={"add": add, "nothing": lambda connection, data: None})
    async with sdk(node) as (client, _):
        assert (await client.rpc("add", [1, 2])).data == {"sum": 3, "user": None}
        assert (await client.rpc("nothing", None)).data is None
        with pytest.raises(centrifuge.exceptions.ReplyError) as refused:
            await client.rpc("other", None)
        assert refused.value.code == 104


async def test_token_expires_and_is_refreshed(lone_site: Site) -> None:
    """A token of the app's own names the user; it is refreshed before it expires, and the connection
    stays.
    """
    seen: list[str] = []

    def connect(request: ConnectRequest) -> Connected:
        seen.append(request.token)
        return Connected(user_id="ada", expires_in=1, info={"name": "Ada"}, data={"hello": True})

    async def token() -> str:
        return f"token-{len(seen)}"

    node = await lone_site.node(connect=connect, rules=[KEPT])
    async with sdk(node, token="first", get_token=token) as (client, heard):
        subscription, _ = await subscribe(client, "kept:a")
        await eventually(lambda: len(seen) >= 2, timeout=8)
        assert seen[:2] == ["first", "token-1"]
        (info,) = (await subscription.presence()).clients.values()
        assert (info.user, info.conn_info) == ("ada", {"name": "Ada"})
        assert not heard.disconnected
        assert len(heard.connecting) == 1


async def test_server_side_subscription(lone_site: Site) -> None:
    """Rooms that the connect hook names are subscribed without asking, and recovered after a cut."""

    class Server(Heard):
        async def on_publication(self, ctx: Any) -> None:
            self.data.append((ctx.channel, ctx.pub.data))

    node = await lone_site.node(
        connect=lambda request: Connected(user_id="ada", rooms=["kept:mine"]), rules=[KEPT]
    )
    heard = Server()
    client = centrifuge.Client(node.endpoint, events=heard, min_reconnect_delay=0.02, proxy=None)
    await client.connect()
    await client.ready()
    room = node.cluster.room("kept:mine")
    await room.broadcast(1)
    await eventually(lambda: heard.data == [("kept:mine", 1)])
    client._conn.transport.abort()
    await room.broadcast(2)
    await eventually(lambda: heard.data == [("kept:mine", 1), ("kept:mine", 2)])
    await client.disconnect()


async def test_connect_and_disconnect_loop(site: Site) -> None:
    """Clients that come and go leave nothing behind."""
    node = await site.node(rules=[KEPT, OPEN])
    for _ in range(10):
        async with sdk(node) as (client, _):
            await asyncio.gather(subscribe(client, "kept:a"), subscribe(client, "open:b"))
    await eventually(lambda: node.cluster.stats().realtime.connections == 0)
    assert node.cluster.stats().realtime.rooms == 0
    assert not await node.cluster.room("kept:a").presence()


async def test_expired_token_is_fetched_anew(lone_site: Site) -> None:
    """``TokenExpired``: the SDK fetches a token and connects with it. An invalid one is final."""

    def connect(request: ConnectRequest) -> str:
        if request.token == "expired":
            raise TokenExpired
        if request.token != "new":
            raise NotPermitted("invalid token", code=3500)
        return "ada"

    async def fetch() -> str:
        return "new"

    node = await lone_site.node(connect=connect, rules=[OPEN])
    async with sdk(node, token="expired", get_token=fetch) as (client, heard):
        await subscribe(client, "open:a")
        assert not heard.disconnected
    heard = Heard()
    client = centrifuge.Client(node.endpoint, events=heard, token="forged", get_token=fetch, proxy=None)
    await client.connect()
    await eventually(lambda: heard.disconnected == [(3500, "invalid token")])


async def test_what_is_not_supported(lone_site: Site) -> None:
    """A tags filter ends the subscription with 108; delta is an offer, and whole messages arrive."""
    node = await lone_site.node(rules=[OPEN])
    async with sdk(node) as (client, heard):
        refused = Heard()
        tags = centrifuge.Filter.eq("a", "b")
        await client.new_subscription("open:a", events=refused, tags_filter=tags).subscribe()
        await eventually(lambda: [ended.code for ended in refused.unsubscribed] == [108])
        _, at = await subscribe(client, "open:b", delta=centrifuge.DeltaType.FOSSIL)
        await node.cluster.room("open:b").broadcast({"whole": True})
        await eventually(lambda: at.data == [{"whole": True}])
        assert not heard.disconnected


async def test_protobuf(lone_site: Site) -> None:
    """The SDK's Protobuf form ends for good with a code and a reason."""
    node = await lone_site.node()
    heard = Heard()
    client = centrifuge.Client(node.endpoint, events=heard, use_protobuf=True, proxy=None)
    await client.connect()
    await eventually(lambda: heard.disconnected == [(3506, "inappropriate protocol: JSON only")])
