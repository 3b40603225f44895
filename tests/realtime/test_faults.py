"""Rooms while Redis is cut, killed or restarted, and while nodes die."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

import pytest

from asgi_cluster import BusUnavailable, Cluster, RoomRule
from asgi_cluster.ids import new_token
from tests.realtime.site import Node, Site
from tests.realtime.test_centrifuge_python import sdk, subscribe
from tests.support.nodes import Node as Served
from tests.support.nodes import serve_process
from tests.support.proxy import Proxy
from tests.support.servers import start_valkey
from tests.support.waiting import eventually

KEPT = RoomRule("kept:{name}", subscribe=True, publish=True, history=1000, presence=True, join_leave=True)
OPEN = RoomRule("open:{name}", subscribe=True, publish=True)


async def broadcast(cluster: Cluster, room: str, data: Any) -> None:
    """Until it is certain that it is there: the same key again is the same message."""
    key = new_token()

    async def once() -> bool:
        try:
            await cluster.room(room).broadcast(data, idempotency_key=key)
        except BusUnavailable:
            return False
        return True

    await eventually(once, timeout=20, interval=0.05)


@pytest.mark.parametrize("fault", ["cut", "stall", "swallow"])
async def test_bus_fault_loses_nothing(redis_url: str, prefix: str, fault: str) -> None:
    """Publications sent while a node's subscriber is cut or stalled reach its clients, who stay connected."""
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(redis_url))
        direct = await Site(redis_url, prefix, stack).node(rules=[KEPT])
        node = await Site(proxy.url, prefix, stack).node(rules=[KEPT])
        client, heard = await stack.enter_async_context(sdk(node))
        _, at = await subscribe(client, "kept:a")
        await broadcast(direct.cluster, "kept:a", 0)
        await eventually(lambda: at.data == [0])
        if fault == "cut":
            proxy.cut()
        elif fault == "stall":
            proxy.stall("down")
        else:
            proxy.swallow(b"SUBSCRIBE")
        for number in range(1, 20):
            await broadcast(direct.cluster, "kept:a", number)
        if fault == "stall":
            # Known by the missing echo alone: the connection stands.
            await eventually(lambda: node.cluster.stats().bus.gaps > 0)
        proxy.heal()
        await eventually(lambda: at.data == list(range(20)), timeout=10)
        assert not heard.disconnected
        assert node.cluster.stats().bus.gaps >= (fault != "swallow")


async def test_registration_lost(site: Site, redis_url: str) -> None:
    """A node that had to register anew shows its people again, and nobody leaves."""
    if site.url.startswith("memory"):
        pytest.skip("no registration that could be lost")
    node, other = await site.node(rules=[KEPT]), await site.node(rules=[KEPT])
    async with sdk(node) as (client, _), sdk(other) as (watcher, _):
        await subscribe(client, "kept:a")
        _, at = await subscribe(watcher, "kept:a")
        room = other.cluster.room("kept:a")
        before = {member.connection_id for member in await room.presence()}
        assert len(before) == 2
        incarnation = node.cluster._parts.backend.room_bus.incarnation
        with start_client(redis_url) as redis:
            redis.hdel(f"{site.prefix}:{{nodes}}:all", node.cluster.node)
            redis.delete(f"{site.prefix}:{{nodes}}:beat:{node.cluster.node}")

        async def back() -> bool:
            now = node.cluster._parts.backend.room_bus.incarnation
            owner = f"{node.cluster.node} {now}".encode()
            with start_client(redis_url) as redis:
                entries = redis.hvals(f"{site.prefix}:{{room:kept:a}}:in")
            return now != incarnation and any(entry.partition(b"\n")[0] == owner for entry in entries)

        await eventually(back, timeout=10)
        assert {member.connection_id for member in await room.presence()} == before
        assert not at.left


def start_client(url: str) -> Any:
    import redis

    return redis.Redis.from_url(url)


async def test_killed_node(redis_url: str, prefix: str) -> None:
    """A killed node's people leave within six seconds, each once, and its clients recover elsewhere."""
    async with AsyncExitStack() as stack:
        env = {"ASGI_CLUSTER_URL": redis_url}
        served = await stack.enter_async_context(serve_process("tests.realtime.members:app", 3, env=env))
        doomed, *others = [as_node(one) for one in served]
        watching = []
        name = f"kept:{prefix}"
        for node in others:
            client, _ = await stack.enter_async_context(sdk(node))
            watching.append((await subscribe(client, name))[1])
        lost, lost_heard = await stack.enter_async_context(sdk(doomed))
        subscription, at = await subscribe(lost, name)
        await subscription.publish(0)
        await eventually(lambda: at.data == [0])
        await eventually(lambda: all(len(one.joined) >= 1 for one in watching))
        lost._address = others[0].endpoint
        loop = asyncio.get_running_loop()
        before = loop.time()
        served[0].kill()
        await eventually(lambda: len(lost_heard.connecting) == 2)
        await subscription.publish(1)
        await eventually(lambda: at.data == [0, 1], timeout=10)
        await eventually(lambda: all(one.left == [""] for one in watching), timeout=8)
        assert loop.time() - before <= 6.5
        assert (await subscription.presence_stats()).num_clients == 3


def as_node(served: Served) -> Node:
    return Node(None, served)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [True, False])
async def test_restarted_redis(prefix: str, data: bool) -> None:
    """Redis restarts. With its data nothing is lost; empty, every subscriber is told, and goes on."""
    options = ["--appendonly", "yes", "--appendfsync", "always"] if data else []
    async with AsyncExitStack() as stack:
        server = stack.enter_context(start_valkey(*options))
        site = Site(server.url, prefix, stack)
        nodes = [await site.node(rules=[KEPT]) for _ in range(2)]
        heard = []
        for node in nodes:
            client, _ = await stack.enter_async_context(sdk(node))
            heard.append((await subscribe(client, "kept:a"))[1])
        for number in range(3):
            await broadcast(nodes[0].cluster, "kept:a", number)
        await eventually(lambda: all(at.data == [0, 1, 2] for at in heard))
        server.kill()
        server.restart(data=data)
        for number in range(3, 6):
            await broadcast(nodes[0].cluster, "kept:a", number)
        if data:
            await eventually(lambda: all(at.data == [0, 1, 2, 3, 4, 5] for at in heard), timeout=10)
        else:

            def told_or_complete() -> bool:
                return all(
                    at.data == [0, 1, 2, 3, 4, 5]
                    or any(ctx.was_recovering and not ctx.recovered for ctx in at.subscribed)
                    for at in heard
                )

            await eventually(told_or_complete, timeout=10)
            await broadcast(nodes[1].cluster, "kept:a", "after")
            await eventually(lambda: all(at.data[-1] == "after" for at in heard), timeout=10)


async def test_bus_error_local(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """``on_bus_error="local"``: this node's members get it, marked; by default it is an error and nobody
    does.
    """
    caplog.set_level(logging.CRITICAL, "asgi_cluster")
    async with AsyncExitStack() as stack:
        server = stack.enter_context(start_valkey())
        site = Site(server.url, prefix, stack)
        strict = await site.node(rules=[OPEN])
        lenient = await site.node(rules=[OPEN], on_bus_error="local")
        at_strict = await stack.enter_async_context(strict.client())
        at_lenient = await stack.enter_async_context(lenient.client())
        for client in (at_strict, at_lenient):
            await client.call("subscribe", {"channel": "open:a"})
        server.kill()
        with pytest.raises(BusUnavailable):
            await strict.cluster.room("open:a").broadcast(1)
        await lenient.cluster.room("open:a").broadcast(1)
        push = await at_lenient.push()
        assert push["pub"] == {"data": 1, "tags": {"delivery": "local"}}
        server.restart()
        await eventually(lambda: all(n.cluster.stats().bus.lease_remaining for n in (strict, lenient)))
        await strict.cluster.room("open:a").broadcast(2)
        assert (await at_lenient.push())["pub"] == {"data": 2}
        assert await at_strict.pub() == 2


async def test_many_come_back_at_once(redis_site: Site) -> None:
    """200 clients that reconnect at once cost one history read per room and node."""
    node = await redis_site.node(rules=[RoomRule("kept:{name}", subscribe=True, history=1000)])
    rooms = ["kept:a", "kept:b"]
    positions: dict[str, tuple[int, str]] = {}
    async with node.client() as first:
        for room in rooms:
            await node.cluster.room(room).broadcast(0)
            result = (await first.call("subscribe", {"channel": room}))["subscribe"]
            positions[room] = (result["offset"], result["epoch"])
            for number in range(1, 6):
                await node.cluster.room(room).broadcast(number)
    await eventually(lambda: node.cluster.stats().realtime.rooms == 0)
    history = node.cluster._parts.rooms._history
    reads: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(history, name)

        async def read(self, room: str, **options: Any) -> Any:
            reads.append(room)
            return await history.read(room, **options)

    node.cluster._parts.rooms._history = Counting()  # type: ignore[assignment]
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(node.client()) for _ in range(200)]
        commands = [
            {
                "id": number + 10,
                "subscribe": {
                    "channel": room,
                    "recover": True,
                    "offset": positions[room][0],
                    "epoch": positions[room][1],
                },
            }
            for number, room in enumerate(rooms)
        ]
        await asyncio.gather(*(client.send(*commands) for client in clients))
        for client in clients:
            for number in range(len(rooms)):
                result = (await client.reply(number + 10))["subscribe"]
                assert result["recovered"]
                assert [pub["data"] for pub in result["publications"]] == [1, 2, 3, 4, 5]
        assert sorted(reads) == rooms
