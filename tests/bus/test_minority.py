"""A primary of a Redis Cluster that its peers have replaced, and that this node still reaches."""

from __future__ import annotations

import asyncio
import time

import pytest

from asgi_cluster import Cluster
from asgi_cluster.backends.redis.quorum import PrimaryReport, common_ground
from asgi_cluster.ids import Handle
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.store import SessionStore
from tests.contract.drafts import create
from tests.support.machine import LOCAL
from tests.support.servers import Server
from tests.support.topologies import RedisCluster, start_redis_cluster
from tests.support.waiting import eventually

_PATIENCE = 30.0


def cut_off(server: Server) -> None:
    """It gets nothing from its peers any more; clients reach it as before."""
    with server.client() as client:
        client.execute_command("DEBUG", "DROP-CLUSTER-PACKET-FILTER", "-2")


async def someone_at(store: SessionStore, servers: RedisCluster, primary: Server, prefix: str) -> Handle:
    """A session whose record is on that primary."""
    while True:
        handle = (await create(store)).handle
        if servers.primary_of(servers.slot(f"{prefix}:{{{handle[:2]}}}:s:x")) is primary:
            return handle


async def alive(cache: SessionCache, handle: Handle) -> bool | None:
    """Whether the session is there by this node's cache; ``None``: the cache had nothing to say."""
    entry = cache.get(handle)
    return None if entry is None else entry.record is not None


@pytest.mark.timeout(120)
async def test_primary_that_its_peers_replaced(prefix: str) -> None:
    """It takes writes until the node timeout. A logout at its successor is answered, and from then on no node
    serves the session from its cache, though the old primary still answers its heartbeats.
    """
    with start_redis_cluster(node_timeout=15.0) as servers:
        registry = servers.primary_of(servers.slot(f"{prefix}:{{nodes}}:all"))
        old = next(server for server in servers.primaries() if server is not registry)
        new = servers.replica_of(old)
        async with Cluster(servers.url, prefix=prefix) as reader:
            service = reader._parts.service
            store, cache = service.reader, service.cache
            handle = await someone_at(service.store, servers, old, prefix)
            with new.client() as client:
                client.execute_command("READONLY")
                key = f"{prefix}:{{{handle[:2]}}}:s:{handle[3:]}"
                await eventually(lambda: client.exists(key), timeout=_PATIENCE)

                async def cached() -> bool:
                    await store.read(handle, timeout=1.0)
                    return bool(await alive(cache, handle))

                await eventually(cached, timeout=_PATIENCE)
                cut_off(old)
                client.execute_command("CLUSTER", "FAILOVER", "TAKEOVER")
                await eventually(lambda: new.role() == "master", timeout=_PATIENCE)
            # Who ends it has never seen the old primary.
            others = ",".join(f"{LOCAL}:{server.port}" for server in servers.nodes if server is not old)
            view = f"redis+cluster://{others}"

            def agreed() -> bool:
                with registry.client() as peer:
                    row = next(
                        row for row in peer.execute_command("CLUSTER", "SLOTS") if row[2][1] == new.port
                    )
                    return bool(row)

            await eventually(agreed, timeout=_PATIENCE)
            async with Cluster(view, prefix=prefix) as ender:
                assert await store.read_fresh(handle, timeout=1.0) is not None, (
                    "the old primary does not answer"
                )
                receipt = await ender.session(handle).logout(timeout=10.0)
            assert receipt.sessions == 1
            answered = time.monotonic()
            last = 0.0
            while time.monotonic() - answered < 3.0:
                if await alive(cache, handle):
                    last = time.monotonic() - answered
                await asyncio.sleep(0.01)
            assert last == 0.0, f"served from the cache {last:.2f} s after the logout was answered"
            # The node has found the new primary as well: not even the store says otherwise.
            assert await store.read_fresh(handle, timeout=1.0) is None

            async def trusted() -> bool:
                await store.read(handle, timeout=1.0)
                return await alive(cache, handle) is False

            await eventually(trusted, timeout=_PATIENCE)


def test_common_ground() -> None:
    """The newest epoch that a majority stands at, and since when; none while there is no such majority."""

    def ground(*standings: tuple[float, int], primaries: int = 3, size: int = 3) -> tuple[int, float] | None:
        return common_ground([PrimaryReport(sent, epoch, size) for sent, epoch in standings], primaries)

    assert ground() is None
    assert ground((1.0, 5), primaries=1, size=1) == (5, 1.0)
    assert ground((1.0, 5)) is None
    assert ground((1.0, 5), (2.0, 5)) == (5, 1.0)
    assert ground((1.0, 5), (2.0, 5), (3.0, 5)) == (5, 2.0)
    assert ground((1.0, 5), (2.0, 5), (3.0, 4)) == (5, 1.0)
    assert ground((1.0, 5), (2.0, 4), (3.0, 4)) is None
    assert ground((1.0, 5), (2.0, 5), (3.0, 5), size=6) is None
    assert ground((1.0, 5), (2.0, 5), primaries=4, size=2) is None
