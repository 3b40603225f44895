"""A cluster belongs to the event loop that started it, and says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from asgi_cluster import Cluster
from tests.sessions.app import client_for, nodes

USES: dict[str, Callable[[Cluster], Awaitable[object]]] = {
    "broadcast": lambda cluster: cluster.room("room").broadcast("hello"),
    "logout": lambda cluster: cluster.user("ada").logout(),
    "devices": lambda cluster: cluster.user("ada").sessions(),
    "nodes": lambda cluster: cluster.nodes(),
}


@pytest.mark.parametrize("use", USES)
async def test_use_on_another_loop(redis_url: str, prefix: str, use: str) -> None:
    """A clear error at once, instead of a reply that never comes; the cluster goes on where it is."""

    async def elsewhere(cluster: Cluster) -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            async with asyncio.timeout(2):
                await USES[use](cluster)

    async with nodes(redis_url, 1, prefix=prefix) as (cluster,):
        await asyncio.to_thread(asyncio.run, elsewhere(cluster))
        await USES[use](cluster)


async def test_request_on_another_loop(redis_url: str, prefix: str) -> None:
    """A request that needs the store is an error of the app's, and not an outage."""

    async def elsewhere(cluster: Cluster) -> None:
        async with client_for(cluster) as client:
            with pytest.raises(RuntimeError, match="another event loop"):
                await client.post("/login?user=ada")

    async with nodes(redis_url, 1, prefix=prefix) as (cluster,):
        await asyncio.to_thread(asyncio.run, elsewhere(cluster))
        async with client_for(cluster) as client:
            assert (await client.post("/login?user=ada")).status_code == 200
