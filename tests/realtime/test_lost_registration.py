"""A node of a Redis Cluster loses its registration, and none of its rooms is on the registry's primary."""

from __future__ import annotations

from contextlib import AsyncExitStack
from itertools import count

from asgi_cluster import RoomRule
from asgi_cluster.backends.redis.slots import slot_of
from tests.realtime.site import Site
from tests.support.topologies import RedisCluster
from tests.support.waiting import eventually

HERE = RoomRule("here:{name}", subscribe=True, presence=True)


async def test_presence_of_a_room_on_another_primary(redis_cluster: RedisCluster, prefix: str) -> None:
    """The members are present again when the node has registered again: its old entries count as a dead
    node's.
    """
    registry = redis_cluster.primary_of(slot_of("{nodes}"))
    room = next(
        name
        for name in (f"here:{number}" for number in count())
        if redis_cluster.primary_of(slot_of(f"{{room:{name}}}")) is not registry
    )
    async with AsyncExitStack() as stack:
        site = Site(redis_cluster.url, prefix, stack)
        node, other = await site.node(rules=[HERE]), await site.node(rules=[HERE])
        async with node.client() as client:
            await client.call("subscribe", {"channel": room})
            assert len(await other.cluster.room(room).presence()) == 1
            before = (
                (await other.cluster.nodes())[0].incarnation,
                (await other.cluster.nodes())[1].incarnation,
            )
            with registry.client() as redis:
                redis.hdel(f"{prefix}:{{nodes}}:all", str(node.cluster.node))
                redis.delete(f"{prefix}:{{nodes}}:beat:{node.cluster.node}")

            async def registered_again() -> bool:
                found = await other.cluster.nodes()
                return len(found) == 2 and (found[0].incarnation, found[1].incarnation) != before

            await eventually(registered_again, timeout=20)
            late = await site.node(rules=[HERE])  # it has no older list of the nodes

            async def present() -> bool:
                return len(await late.cluster.room(room).presence()) == 1

            await eventually(present, timeout=5)
