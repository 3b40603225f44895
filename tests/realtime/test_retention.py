"""What a room keeps is a matter of the cluster, and not of the process that publishes to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import redis

from asgi_cluster import BusUnavailable, Cluster, RealtimeConfig, RoomRule
from asgi_cluster.rooms import retention
from tests.realtime.site import Node, Raw, Site
from tests.support.proxy import Proxy
from tests.support.servers import start_valkey
from tests.support.waiting import eventually

KEPT = RoomRule("kept:{name}", subscribe=True, publish=True, history=100, history_ttl=60)
OTHER = RoomRule("other:{name}", subscribe=True, publish=True)


@asynccontextmanager
async def worker(site: Site, *rules: RoomRule, listen: bool = False) -> AsyncIterator[Cluster]:
    """A process that publishes, with rules of its own or none."""
    config = RealtimeConfig(rules=rules)
    async with Cluster(site.url, prefix=site.prefix, listen=listen, realtime=config) as cluster:
        yield cluster


async def subscribed(client: Raw, room: str = "kept:a", **position: object) -> dict[str, object]:
    found: dict[str, object] = (await client.call("subscribe", {"channel": room, **position}))["subscribe"]
    return found


async def remembered(node: Node, room: str = "kept:a") -> list[object]:
    return [each.data for each in (await node.cluster.room(room).history()).publications]


@pytest.mark.parametrize("kind", ["worker without rules", "worker with others", "node with others"])
async def test_publication_by_a_process_without_the_rule_is_kept(site: Site, kind: str) -> None:
    """Delivered with its position, remembered, and recovered by a client that was away."""
    node = await site.node(rules=[KEPT])
    rules = [] if kind == "worker without rules" else [OTHER]
    async with worker(site, *rules, listen=kind.startswith("node")) as publisher:
        async with node.client() as client:
            before = await subscribed(client)
            first = await publisher.room("kept:a").broadcast(1)
            assert first is not None
            assert (await client.push())["pub"] == {"data": 1, "offset": first.offset}
        await publisher.room("kept:a").broadcast(2)
        assert await publisher.room("kept:a").broadcast(3, idempotency_key="k") == await publisher.room(
            "kept:a"
        ).broadcast(3, idempotency_key="k")
        async with node.client() as client:
            since = {"recover": True, "offset": before.get("offset", 0), "epoch": before["epoch"]}
            again = await subscribed(client, **since)
            assert again["recovered"]
            assert [pub["data"] for pub in again["publications"]] == [1, 2, 3]  # type: ignore[attr-defined]
        assert await remembered(node) == [1, 2, 3]
        history = await publisher.room("kept:a").history()
        assert [each.data for each in history.publications] == [1, 2, 3]
        assert await publisher.room("other:a").broadcast(1) is None
        with pytest.raises(ValueError, match="neither here nor on any node"):
            await publisher.room("other:a").history()


async def test_worker_from_before_the_first_node(site: Site) -> None:
    """It has just seen that there are no rules. When a node with rules has started, its first publication is
    kept all the same.
    """
    async with worker(site) as publisher:
        assert await publisher.room("kept:a").broadcast("to nobody") is None
        node = await site.node(rules=[KEPT])
        assert await publisher.room("kept:a").broadcast("first") is not None
        assert await remembered(node) == ["first"]


async def test_rules_outlive_the_nodes(redis_site: Site) -> None:
    """During a deploy no node is there: a worker that starts then keeps what the last ones kept."""
    async with worker(redis_site, KEPT, listen=True):
        pass
    async with worker(redis_site) as publisher:
        assert await publisher.room("kept:a").broadcast(1) is not None


async def test_rules_that_differ(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The larger counts for all, and each node says once which rule it is, the values, and where."""
    small = RoomRule("kept:{name}", subscribe=True, history=2, history_ttl=60)
    with caplog.at_level(logging.WARNING, "asgi_cluster.realtime"):
        node, other = await site.node(rules=[KEPT]), await site.node(rules=[small])
        for n in range(5):
            await (node, other)[n % 2].cluster.room("kept:a").broadcast(n)
            await (node, other)[n % 2].cluster.room("kept:a").broadcast(n)
        assert await remembered(other) == await remembered(node) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        await eventually(lambda: len(caplog.records) >= 2)
    assert node.cluster.node is not None
    assert other.cluster.node is not None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for line in lines:
        for word in ("'kept:{name}'", "history=100", "history=2", node.cluster.node, other.cluster.node):
            assert word in line


async def test_rule_that_keeps_nothing_here(site: Site) -> None:
    """A node whose own rule drops messages to slow clients does not do that in a room that others keep."""
    await site.node(rules=[KEPT])
    here = RoomRule("kept:{name}", subscribe=True, slow="drop")
    node = await site.node(rules=[here])
    async with node.client() as client:
        assert (await subscribed(client))["recoverable"]
        assert await node.cluster.room("kept:a").broadcast(1) is not None
        assert "offset" in (await client.push())["pub"]
        audience = node.cluster._parts.rooms._local.get("kept:a")
        assert audience is not None
        assert audience.slow == "disconnect"


def make_older(server: redis.Redis, site: Site, name: bytes, seconds: int) -> None:
    """As if the node had declared the rules that much earlier."""
    key = f"{site.prefix}:{{rooms}}:rules"
    seen, _, rest = server.hget(key, name).partition(b" ")
    server.hset(key, name, b"%d %s" % (int(seen) - seconds * 1000, rest))


async def test_history_that_no_rule_has_any_more(site: Site) -> None:
    """A deploy without any history counts as one with less: when the old nodes are gone for a minute
    (``memory://``: at once), the room keeps nothing, and slow clients get what the new rule says.
    """
    async with worker(site, KEPT, listen=True) as before:
        assert await before.room("kept:a").broadcast(1) is not None
    node = await site.node(rules=[RoomRule("kept:{name}", subscribe=True, slow="drop")])
    if not site.url.startswith("memory"):
        with redis.Redis.from_url(site.url) as server:
            assert await node.cluster.room("kept:a").broadcast(2) is not None
            (old,) = [
                name
                for name, value in server.hgetall(f"{site.prefix}:{{rooms}}:rules").items()
                if b"kept" in value
            ]
            make_older(server, site, old, 61)

    async def forgotten() -> bool:
        return await node.cluster.room("kept:a").broadcast(3) is None

    await eventually(forgotten, timeout=15)
    async with node.client() as client:
        assert "recoverable" not in await subscribed(client)
        audience = node.cluster._parts.rooms._local.get("kept:a")
        assert audience is not None
        assert audience.slow == "drop"


async def test_node_without_history_does_not_wait(redis_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """It brings no rule that publishers would have to read before it serves."""
    caplog.set_level(logging.INFO, "asgi_cluster.realtime")
    async with worker(redis_site) as publisher:
        await publisher.room("r").broadcast(1)
        async with worker(redis_site, OTHER, listen=True):
            assert "new to the cluster" not in caplog.text
        async with worker(redis_site, KEPT, listen=True):
            assert "new to the cluster" in caplog.text


async def test_superseded_rules_are_forgotten(redis_site: Site) -> None:
    """A deploy that keeps less counts when no node has declared the old rules for a minute; after a stall, in
    which none could, they still hold.
    """
    small = RoomRule("kept:{name}", subscribe=True, history=2, history_ttl=60)
    async with worker(redis_site, KEPT, listen=True):
        pass
    with redis.Redis.from_url(redis_site.url) as server:
        key = f"{redis_site.prefix}:{{rooms}}:rules"
        [old] = server.hkeys(key)

        def age(name: bytes, seconds: int) -> None:
            make_older(server, redis_site, name, seconds)

        async with worker(redis_site, small, listen=True) as node:
            [new] = set(server.hkeys(key)) - {old}
            age(old, 59)
            age(new, 30)
            await node._parts.rooms.retention._exchange(1.0)
            age(old, 600)
            age(new, 600)
            await node._parts.rooms.retention._exchange(1.0)
            assert set(server.hkeys(key)) == {old, new}
            kept = node._parts.rooms.retention.of("kept:a")
            assert kept is not None
            assert kept.size == 100
            await node._parts.rooms.retention._exchange(1.0)
            assert server.hkeys(key) == [new]
            kept = node._parts.rooms.retention.of("kept:a")
            assert kept is not None
            assert kept.size == 2


async def test_room_without_history_is_entered_while_the_bus_is_down(redis_site: Site) -> None:
    """The rules cannot be read then, and need not be. What is broadcast after the outage arrives."""
    async with Proxy(redis_site.url) as proxy, AsyncExitStack() as stack:
        node = await Site(proxy.url, redis_site.prefix, stack).node(rules=[OTHER])
        async with node.client() as client:
            proxy.cut()
            retention = node.cluster._parts.rooms.retention
            await eventually(lambda: not node.cluster.stats().bus.connected)
            retention._until = 0.0
            assert "subscribe" in await client.call("subscribe", {"channel": "other:a"})
            with pytest.raises(BusUnavailable):
                await node.cluster.room("other:a").broadcast("lost")
            proxy.heal()

            async def sent() -> bool:
                try:
                    await node.cluster.room("other:a").broadcast("back")
                except BusUnavailable:
                    return False
                return node.cluster.stats().bus.connected

            await eventually(sent, timeout=15)
            assert await client.pub() == "back"


async def test_broadcast_stays_one_round_trip(prefix: str) -> None:
    """A worker that publishes all the time reads the rules in the background, about once a second."""
    with start_valkey() as server, server.client() as client:

        def calls(name: str) -> int:
            return int(client.info("commandstats").get(f"cmdstat_{name}", {}).get("calls", 0))

        async with Cluster(server.url, prefix=prefix, listen=False) as publisher:
            scripts, publishes = calls("evalsha"), calls("publish")
            for n in range(500):
                await publisher.room("r").broadcast(n)
            assert calls("publish") - publishes == 500
            assert calls("evalsha") - scripts < 50


async def test_cold_burst_reads_the_rules_once(prefix: str) -> None:
    """A worker that was idle and sends five hundred messages at once asks once before them."""
    with start_valkey() as server, server.client() as client:
        async with Cluster(server.url, prefix=prefix, listen=False) as publisher:
            publisher._parts.rooms.retention._until = 0.0
            before = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
            await asyncio.gather(*(publisher.room("r").broadcast(n) for n in range(500)))
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before < 10


async def test_subscribing_leaves_nothing_in_redis(redis_site: Site) -> None:
    """An anonymous client may subscribe to as many names as the rule has: none of them leaves a key."""
    node = await redis_site.node(rules=[KEPT])
    with redis.Redis.from_url(redis_site.url) as server:
        async with node.client() as client:
            for n in range(50):
                assert (await subscribed(client, f"kept:{n}"))["recoverable"]
                await client.call("history", {"channel": f"kept:{n}"})
                await client.call("unsubscribe", {"channel": f"kept:{n}"})
            assert list(server.scan_iter(f"{redis_site.prefix}:{{room:*")) == []


async def test_position_of_an_empty_room_is_recovered_from(site: Site) -> None:
    """Subscribed before anything was published, on one node; back on another after the first publications."""
    one, two = await site.node(rules=[KEPT]), await site.node(rules=[KEPT])
    async with one.client() as client, one.client() as staying:
        before = await subscribed(client)
        await subscribed(staying)
        await client.ws.close()
        for n in range(3):
            await two.cluster.room("kept:a").broadcast(n)
            assert await staying.pub() == n
        async with two.client() as back:
            since = {"recover": True, "offset": before.get("offset", 0), "epoch": before["epoch"]}
            again = await subscribed(back, **since)
            assert again["recovered"]
            assert [pub["data"] for pub in again["publications"]] == [0, 1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [b"", b"x", b"1 n", b"1 1 n\n\xc1", b"1 1 n\n" + b"\x91" * 100_000])
async def test_declaration_that_was_tampered_with(
    redis_site: Site, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It is ignored: broadcasts and the other rules work."""
    with redis.Redis.from_url(redis_site.url) as server:
        server.hset(f"{redis_site.prefix}:{{rooms}}:rules", "x", value)
        node = await redis_site.node(rules=[KEPT])
        async with worker(redis_site) as publisher:
            assert await publisher.room("kept:a").broadcast(1) is not None
        assert await remembered(node) == [1]
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) <= 4


async def test_quiet_node_keeps_its_reading_fresh(redis_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without history rules, so that its next broadcast is one round trip. A worker that publishes
    nothing stops reading.
    """
    monkeypatch.setattr(retention, "_IDLE_AFTER", 0.0)
    async with worker(redis_site, listen=True) as node, worker(redis_site) as publisher:
        readings, unread = {node._parts.rooms.retention._until}, publisher._parts.rooms.retention._until

        def often() -> bool:
            readings.add(node._parts.rooms.retention._until)
            return len(readings) > 3

        await eventually(often, timeout=15)
        assert publisher._parts.rooms.retention._until == unread


async def test_reading_the_rules_seldom_writes(prefix: str) -> None:
    """What a node writes when nothing happens does not grow with the number of its readings."""
    rules = RealtimeConfig(rules=[KEPT])
    with start_valkey() as server, server.client() as client:

        def calls(name: str) -> int:
            return int(client.info("commandstats").get(f"cmdstat_{name}", {}).get("calls", 0))

        async with Cluster(server.url, prefix=prefix, realtime=rules) as node:
            before = {name: calls(name) for name in ("set", "hset", "pexpire")}
            most = {"set": 30, "hset": 30, "pexpire": 150}  # the beats, some in each second, are PEXPIRE
            for _ in range(300):
                await node._parts.rooms.retention._exchange(5.0)
            written = {name: calls(name) - n for name, n in before.items()}
            assert {name: n for name, n in written.items() if n > most[name]} == {}


async def test_declaration_waits_for_every_reading(redis_site: Site) -> None:
    """Of processes that rely on theirs for different times, also those that wrote nothing."""
    async with worker(redis_site) as publisher:
        history, clock = publisher._parts.backend.history, asyncio.get_running_loop().time
        for turn, views in enumerate([[3.0, 1.0], [1.0, 3.0], [3.0, 3.0], [3.0, 1.0, 0.5, 3.0]]):
            until = 0.0
            for view in views:
                until = max(until, clock() + view)
                await history.declare("", b"", node="w", view=view, timeout=5)
            found = await history.declare(f"new {turn}", b"\x90", node="n", view=0.5, timeout=5)
            assert found.wait <= 5.0  # the worker's own view is 3 s
            assert clock() + found.wait >= until - 0.01
            # So does a node that brings the same rules meanwhile.
            same = await history.declare(f"new {turn}", b"\x90", node="n2", view=0.5, timeout=5)
            assert clock() + same.wait >= until - 0.01
