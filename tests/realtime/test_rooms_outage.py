"""Rooms whose server is away for a while: what was left undone is done when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from asgi_cluster import RoomRule
from tests.realtime.site import Node, Site
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import eventually

ROOM = RoomRule("room", subscribe=True, presence=True, join_leave=True)


@asynccontextmanager
async def two_nodes(
    valkey: Server, prefix: str
) -> AsyncIterator[tuple[Proxy, Node, Callable[[], Awaitable[int]]]]:
    """A proxy, a node behind it, and how many are present as another node, which is not cut off, has it."""
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(valkey.url))
        near = await Site(proxy.url, prefix, stack).node(rules=[ROOM])
        far = await Site(valkey.url, prefix, stack).node(rules=[ROOM])

        async def present() -> int:
            return len(await far.cluster.room("room").presence())

        yield proxy, near, present


async def until(present: Callable[[], Awaitable[int]], count: int) -> None:
    """Wait until so many are present."""

    async def reached() -> bool:
        return await present() == count

    await eventually(reached, timeout=20)


@pytest.mark.parametrize("leaving", ["unsubscribes", "goes"])
async def test_client_that_leaves_while_redis_is_away(valkey: Server, prefix: str, leaving: str) -> None:
    """Its presence ends when Redis is back, for the nodes that were not cut off, too."""
    async with (
        two_nodes(valkey, prefix) as (proxy, near, present),
        near.client() as staying,
        near.client() as client,
    ):
        for each in (staying, client):
            await each.call("subscribe", {"channel": "room"})
        assert await present() == 2
        proxy.cut()
        await eventually(lambda: near.cluster.stats().bus.lease_remaining == 0)
        if leaving == "unsubscribes":
            await client.call("unsubscribe", {"channel": "room"})
        else:
            await client.ws.close()
            await eventually(lambda: near.cluster.stats().realtime.connections == 1)
        assert await present() == 2
        proxy.heal()
        await until(present, 1)


async def test_client_that_leaves_during_an_outage_and_comes_back_stays_present(
    valkey: Server, prefix: str
) -> None:
    """What could not be removed is removed when Redis is back, but for a client that is in the room again."""
    async with (
        two_nodes(valkey, prefix) as (proxy, near, present),
        near.client() as returning,
        near.client() as leaving,
    ):
        for each in (returning, leaving):
            await each.call("subscribe", {"channel": "room"})
        proxy.stall("down", only=b"EVALSHA")
        await returning.call("unsubscribe", {"channel": "room"})
        assert await present() == 1
        proxy.heal()

        async def entered() -> bool:
            return "subscribe" in await returning.call("subscribe", {"channel": "room"})

        await eventually(entered)
        assert await present() == 2
        proxy.cut()
        await leaving.call("unsubscribe", {"channel": "room"})
        assert await present() == 2
        proxy.heal()
        await until(present, 1)
        # On the connection that removed the other, so after whatever else it was to remove.
        assert len(await near.cluster.room("room").presence()) == 1


async def test_leave_that_is_cancelled_while_redis_is_away(valkey: Server, prefix: str) -> None:
    """It was not sent, and who left is not present for ever."""
    async with two_nodes(valkey, prefix) as (proxy, near, present), near.client() as client:
        await client.call("subscribe", {"channel": "room"})
        (connection,) = near.connections
        proxy.cut()
        await eventually(lambda: not near.cluster.stats().bus.connected)
        leaving = asyncio.create_task(connection.leave("room"))
        await eventually(lambda: not connection.rooms)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        assert await present() == 1
        proxy.heal()
        await until(present, 0)
