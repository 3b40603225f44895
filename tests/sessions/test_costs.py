"""What things cost in Redis commands, as the server counts them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from asgi_cluster import Cluster, RealtimeConfig, RoomRule
from tests.sessions.app import client_for, nodes
from tests.support.servers import Server, start_valkey


class Counter:
    """Commands that clients sent, scripts' own calls left out, by name."""

    def __init__(self, server: Server, cluster: Cluster) -> None:
        self.raw = server.client()
        self.cluster = cluster

    def calls(self) -> dict[str, int]:
        return {name[8:]: values["calls"] for name, values in self.raw.info("commandstats").items()}

    async def of(self, work: Callable[[], Awaitable[Any]], times: int = 200) -> dict[str, float]:
        """Commands per run of ``work``; what the background adds is far less than one per run."""
        await work()
        before = self.calls()
        for _ in range(times):
            await work()
        after = self.calls()
        found = {name: (after[name] - before.get(name, 0)) / times for name in after}
        return {name: round(count, 1) for name, count in found.items() if count >= 0.25}


@pytest.fixture
async def counted() -> AsyncIterator[tuple[Counter, Cluster]]:
    rules = [RoomRule("log:{name}", subscribe=True, history=100)]
    with start_valkey() as server:
        async with nodes(server.url, 1, realtime=RealtimeConfig(rules=rules)) as (cluster,):
            counter = Counter(server, cluster)
            yield counter, cluster
            counter.raw.close()


async def test_request_without_cookie_never_touches_redis(counted: tuple[Counter, Cluster]) -> None:
    """Guarantee (d): not even when the app looks at its session."""
    counter, cluster = counted
    async with client_for(cluster) as client:
        assert await counter.of(lambda: client.get("/show")) == {}


async def test_cached_read_costs_no_command(counted: tuple[Counter, Cluster]) -> None:
    """A thousand reads, a hit rate above 0.99, and nothing sent."""
    counter, cluster = counted
    async with client_for(cluster) as client:
        await client.post("/put", json={"a": 1})
        assert await counter.of(lambda: client.get("/show"), times=1000) == {}
    assert cluster.stats().cache.hit_rate > 0.99


async def test_write_costs_one_round_trip(counted: tuple[Counter, Cluster]) -> None:
    """One script for the write, and one for the read that the write made necessary."""
    counter, cluster = counted
    number = 0

    async def write() -> None:
        nonlocal number
        number += 1
        await client.post("/put", json={"n": number})

    async with client_for(cluster) as client:
        costs = await counter.of(write)
    assert costs["evalsha"] == 2.0
    assert costs["publish"] == 1.0
    assert "eval" not in costs


async def test_broadcast_costs_one_round_trip(counted: tuple[Counter, Cluster]) -> None:
    """A PUBLISH without history, one script with it."""
    counter, cluster = counted
    assert await counter.of(lambda: cluster.room("plain").broadcast("x")) == {"publish": 1.0}
    costs = await counter.of(lambda: cluster.room("log:all").broadcast("x"))
    assert costs["evalsha"] == 1.0
    assert costs["publish"] == 1.0


async def test_logins_and_lists_cost_what_the_design_says(counted: tuple[Counter, Cluster]) -> None:
    """Login 1, with an earlier session 2; rotate 1; list 1. Each request reads its session once."""
    counter, cluster = counted

    async def first_login() -> None:
        async with client_for(cluster) as client:
            await client.post("/login?user=ada")

    assert (await counter.of(first_login))["evalsha"] == 1.0
    async with client_for(cluster) as client:
        await client.post("/login?user=ada")
        assert (await counter.of(lambda: client.post("/login?user=ada")))["evalsha"] == 3.0
        assert (await counter.of(lambda: client.post("/rotate")))["evalsha"] == 2.0
    await cluster.user("ada").logout()
    assert (await counter.of(lambda: cluster.user("ada").sessions()))["evalsha"] == 1.0
