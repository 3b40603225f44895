"""Rules, names, memberships, and what the server does to them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest
import websockets

from asgi_cluster import Cluster, RealtimeConfig, RoomRule
from asgi_cluster.bus.room_bus import RoomBus
from asgi_cluster.exceptions import BusUnavailable
from asgi_cluster.rooms.local_rooms import LocalRooms
from asgi_cluster.rooms.rules import Connected
from asgi_cluster.sockets.hub import Hub
from tests.realtime.conftest import sign_in
from tests.realtime.site import Raw, Site
from tests.support.waiting import eventually

OPEN = RoomRule("open:{name}", subscribe=True, publish=True)
KEPT = RoomRule("kept:{name}", subscribe=True, publish=True, history=5, presence=True)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pattern", "room", "params"),
    [
        ("news", "news", {}),
        ("news", "News", None),
        ("news", "news2", None),
        ("board:{id}", "board:7", {"id": "7"}),
        ("board:{id}", "board:", None),
        ("board:{id}", "board:7:x", None),
        ("{a}:{b}", "x:y", {"a": "x", "b": "y"}),
        ("a.c:{id}", "abc:1", None),
        ("board:{id}", "board:ä\u00a0b", {"id": "ä\u00a0b"}),
    ],
)
def test_rule_matches(pattern: str, room: str, params: dict[str, str] | None) -> None:
    """A name in braces is one or more characters except a colon; all else stands for itself, case
    included.
    """
    assert RoomRule(pattern).match(room) == params


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("", {}),
        ("a{", {}),
        ("{a}}", {}),
        ("{a}:{a}", {}),
        ("{1}", {}),
        ("a", {"subscribe": False}),
        ("a", {"publish": "yes"}),
        ("a", {"history": -1}),
        ("a", {"history": 1.5}),
        ("a", {"history_ttl": 0}),
        ("a", {"slow": "maybe"}),
        ("a", {"slow": "drop", "history": 1}),
        ("a", {"slow": "latest", "history": 1}),
    ],
)
def test_rule_refused(pattern: str, options: dict[str, Any]) -> None:
    """A rule that makes no sense is refused where it is written, with its pattern in the message."""
    with pytest.raises(ValueError, match="room rule"):
        RoomRule(pattern, **options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("first", "second", "covered"),
    [
        ("board:{id}", "board:lobby", True),
        ("board:lobby", "board:{id}", False),
        ("{a}:{b}", "board:{id}", True),
        ("board:{id}", "board:{other}", True),
        ("{all}", "board:{id}", False),
        ("x{a}", "xy{b}", True),
        ("xy{b}", "x{a}", False),
    ],
)
def test_unreachable_rule_refused(first: str, second: str, covered: bool) -> None:
    """A rule that an earlier one hides is refused at construction."""
    rules = [RoomRule(first), RoomRule(second)]
    if covered:
        with pytest.raises(ValueError, match="never match"):
            RealtimeConfig(rules=rules)
    else:
        RealtimeConfig(rules=rules)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["", "a" * 256, "a\nb", "a\x00", "\x7f", "\ud800", "a\u2028b"])
def test_room_name_refused(name: str) -> None:
    """Empty, too long, or with control characters: a clear error."""
    with pytest.raises(ValueError, match="room name"):
        Cluster("memory://").room(name)


async def test_broadcast_refused(lone_site: Site) -> None:
    """Too large, not encodable, or a key where nothing remembers it: an error at the caller, and nothing is
    sent.
    """
    node = await lone_site.node(rules=[OPEN], max_broadcast_bytes=100)
    room = node.cluster.room("open:a")
    with pytest.raises(ValueError, match="max_broadcast_bytes"):
        await room.broadcast("x" * 101)
    with pytest.raises(TypeError):
        await room.broadcast(object())
    with pytest.raises(ValueError, match="idempotency_key"):
        await room.broadcast(1, idempotency_key="a")
    with pytest.raises(ValueError, match="history"):
        await room.history()
    with pytest.raises(ValueError, match="presence"):
        await room.presence()


async def test_failed_entry_leaves_nothing(lone_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room whose history does not answer is error 100, temporary; nothing of the subscription stays."""
    node = await lone_site.node(rules=[KEPT])

    async def fail(*args: Any, **options: Any) -> None:
        raise BusUnavailable("no answer")

    async with node.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(node.cluster._parts.rooms, "_history", SimpleNamespace(read=fail))
            reply = await client.call("subscribe", {"channel": "kept:a"})
            assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}
        assert node.cluster.stats().realtime.rooms == 0
        assert not await node.cluster.room("kept:a").presence()
        assert "subscribe" in await client.call("subscribe", {"channel": "kept:a"})


async def test_server_side_history(site: Site) -> None:
    """The server reads back what was broadcast; the same idempotency key twice is one message."""
    node, other = await site.node(rules=[KEPT]), await site.node(rules=[KEPT])
    room = node.cluster.room("kept:a")
    async with other.client() as client:
        await client.call("subscribe", {"channel": "kept:a"})
        first = await room.broadcast("text", idempotency_key="k")
        again = await other.cluster.room("kept:a").broadcast("text", idempotency_key="k")
        assert first == again
        await room.broadcast(b"\x00")
        last = await room.broadcast({"n": 1})
        assert [await client.pub() for _ in range(3)] == ["text", "AA==", {"n": 1}]
    history = await other.cluster.room("kept:a").history()
    assert [found.data for found in history.publications] == ["text", b"\x00", {"n": 1}]
    assert last is not None
    assert (history.offset, history.epoch) == (last.offset, last.epoch)
    assert [found.data for found in (await room.history(limit=1, reverse=True)).publications] == [{"n": 1}]
    assert [found.data for found in (await room.history(since=first, limit=1)).publications] == [b"\x00"]


async def test_disconnect_from_room(site: Site) -> None:
    """``room.disconnect(user=…)`` ends that user's subscriptions on every node; the connections stay."""
    node, other = await site.node(rules=[OPEN]), await site.node(rules=[OPEN])
    ada, bob = await sign_in(node, "ada"), await sign_in(node, "bob")
    async with other.client(ada) as first, node.client(bob) as second:
        for client in (first, second):
            await client.call("subscribe", {"channel": "open:a"})
        await node.cluster.room("open:a").disconnect(user="ada")
        push = await first.push()
        assert push == {"channel": "open:a", "unsubscribe": {"code": 2000, "reason": "server unsubscribe"}}
        await node.cluster.room("open:a").broadcast(1)
        assert await second.pub() == 1
        assert "subscribe" in await first.call("subscribe", {"channel": "open:a"})


async def test_connection_limits(site: Site) -> None:
    """One connection too many of a user, or of a session, anywhere in the cluster, is closed with 3504."""
    options: dict[str, Any] = {"max_connections_per_user": 3, "max_connections_per_session": 2}
    node, other = await site.node(**options), await site.node(**options)
    first, second = await sign_in(node, "ada"), await sign_in(node, "ada")
    async with node.client(first), other.client(first):
        async with node.raw(first) as third:
            await third.send({"id": 1, "connect": {}})
            assert await third.closed() == (3504, "connection limit")
        async with other.client(second), node.raw(second) as fourth:
            await fourth.send({"id": 1, "connect": {}})
            assert await fourth.closed() == (3504, "connection limit")
    await eventually(lambda: not other.cluster.stats().realtime.connections)
    async with node.client(first), node.client(first), node.client(second):
        pass


async def test_hooks(lone_site: Site) -> None:
    """Connect and disconnect are told, with code and reason; a message without reply reaches its hook."""
    seen: list[Any] = []
    node = await lone_site.node(
        connect=lambda request: Connected(user_id=request.token, data={"got": request.data}),
        on_connect=lambda connection: seen.append(("connect", connection.user_id)),
        on_message=lambda connection, data: seen.append(("message", data)),
        on_disconnect=lambda connection, code, reason: seen.append(("gone", code, reason)),
    )
    async with node.raw() as client:
        reply = await client.call("connect", {"token": "ada", "data": [1]})
        assert reply["connect"]["data"] == {"got": [1]}
        await client.send({"send": {"data": {"n": 1}}})
        await eventually(lambda: len(seen) == 2)
        await client.ws.close(4000, "bye")
    await eventually(lambda: len(seen) == 3)
    assert seen == [("connect", "ada"), ("message", {"n": 1}), ("gone", 4000, "bye")]


async def test_connect_refused(lone_site: Site) -> None:
    """A connect hook that refuses: error 103 with its reason, and the connection is good for nothing more."""
    from asgi_cluster import NotPermitted

    def connect(request: Any) -> str:
        raise NotPermitted("bad token")

    node = await lone_site.node(connect=connect)
    async with node.raw() as client:
        assert (await client.call("connect", {}))["error"] == {"code": 103, "message": "bad token"}
        await client.send({"id": 2, "connect": {}})
        assert await client.closed() == (3501, "bad request")


class Subscriptions:
    """A bus that acknowledges when the test says so."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.subscribed: set[str] = set()
        self.log: list[str] = []
        self.refuses = False

    async def subscribe(self, room: str) -> None:
        self.log.append(f"+{room}")
        await self.gate.wait()
        if self.refuses:
            raise BusUnavailable("NOPERM")
        self.subscribed.add(room)

    def unsubscribe(self, room: str) -> None:
        self.log.append(f"-{room}")
        self.subscribed.discard(room)


async def test_first_members_together(lone_site: Site) -> None:
    """Several first members wait for the acknowledgement; one who is cancelled takes nobody along."""
    bus = Subscriptions()
    rooms = LocalRooms(cast("RoomBus", bus), Hub(outbox_bytes=1), crosses_loops=False)
    async with asyncio.TaskGroup() as tasks:
        holders = [tasks.create_task(rooms.acquire("room")) for _ in range(3)]
        await asyncio.sleep(0)
        holders[0].cancel()
        await asyncio.sleep(0)
        assert not any(holder.done() for holder in holders[1:])
        bus.gate.set()
    assert bus.subscribed == {"room"}
    local_room = holders[1].result()
    rooms.release(local_room)
    assert bus.subscribed == {"room"}
    rooms.release(local_room)
    assert bus.subscribed == set()
    assert len(rooms) == 0


@pytest.mark.quick
async def test_join_after_the_last_left() -> None:
    """A join while nobody is left subscribes anew, in that order; a refused channel leaves nothing behind."""
    bus = Subscriptions()
    bus.gate.set()
    rooms = LocalRooms(cast("RoomBus", bus), Hub(outbox_bytes=1), crosses_loops=False)
    rooms.release(await rooms.acquire("room"))
    local_room = await rooms.acquire("room")
    assert bus.log == ["+room", "-room", "+room"]
    rooms.release(local_room)
    bus.refuses = True
    with pytest.raises(BusUnavailable):
        await rooms.acquire("room")
    assert len(rooms) == 0
    assert bus.log[-1] == "-room"


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ["chat:*", "*", "chat:<id>", "<kind>:{id}", "a*b:{id}"])
def test_rule_with_another_wildcard(pattern: str) -> None:
    """What is meant as ``{name}`` is refused, with the cure, and not taken literally."""
    with pytest.raises(ValueError, match=r"Write \{name\}"):
        RoomRule(pattern)


@pytest.mark.quick
@pytest.mark.parametrize("rules", [RoomRule("chat:{id}"), "chat:{id}", ["chat:{id}"], {"chat:{id}": True}])
def test_rules_that_are_no_list_of_rules(rules: Any) -> None:
    """The error says what ``rules`` has to be."""
    with pytest.raises(TypeError, match=r"rules=\[RoomRule\(\.\.\.\)\]"):
        RealtimeConfig(rules=rules)


async def test_connection_limit_when_several_come_at_once(site: Site) -> None:
    """Of six connections of a user that come at once to two nodes, the three that fit stay; later ones are
    refused while they are there, and displace none.
    """
    options: dict[str, Any] = {"connect": lambda request: request.token, "max_connections_per_user": 3}
    nodes = await site.node(**options), await site.node(**options)

    async def connect(client: Raw) -> bool:
        await client.send({"id": 1, "connect": {"token": "ada"}})
        try:
            return "connect" in await client.reply(1)
        except websockets.ConnectionClosed:
            assert await client.closed() == (3504, "connection limit")
            return False

    for _ in range(3):
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(nodes[n % 2].raw()) for n in range(10)]
            outcomes = await asyncio.gather(*map(connect, clients[:6]))
            assert sum(outcomes) == 3
            assert not any(await asyncio.gather(*map(connect, clients[6:])))
            for client, stays in zip(clients, outcomes, strict=False):
                if stays:
                    assert "error" not in await client.call("ping", {})
        await eventually(lambda: not any(node.cluster.stats().realtime.connections for node in nodes))
