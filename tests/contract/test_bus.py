"""What every bus does when nothing goes wrong. Faults are in ``tests/bus``."""

from __future__ import annotations

import asyncio
import time

import pytest

from asgi_cluster.ids import NodeId
from asgi_cluster.rooms.history import seal_envelope
from tests.contract.sites import LEASE, TIMEOUT, Site, make_node
from tests.support.waiting import eventually

pytestmark = pytest.mark.quick


async def test_bucket_messages_reach_every_node(site: Site) -> None:
    """All nodes receive all buckets, the publisher too; one that does not listen receives nothing."""
    a, b, silent = await site.node(), await site.node(), await site.node(listen=False)
    sent = [b"%d" % n for n in range(50)]
    for n, payload in enumerate(sent):
        await a.backend.session_bus.publish(n, payload, timeout=TIMEOUT)
    await eventually(lambda: len(a.heard.sessions) == len(b.heard.sessions) == 50)
    assert sorted(a.heard.sessions) == sorted(sent)
    assert sorted(b.heard.sessions) == sorted(sent)
    assert silent.heard.sessions == []


async def test_messages_of_one_bucket_keep_their_order(site: Site) -> None:
    """From one publisher, in one bucket, everywhere."""
    a, b = await site.node(), await site.node()
    sent = [b"%d" % n for n in range(200)]
    for payload in sent:
        await a.backend.session_bus.publish(7, payload, timeout=TIMEOUT)
    await eventually(lambda: len(b.heard.sessions) == 200)
    assert b.heard.sessions == sent


async def test_room_messages_reach_those_who_subscribed(site: Site) -> None:
    """From the return of subscribe until unsubscribe, and other rooms not at all."""
    a, b = await site.node(), await site.node()
    await b.backend.room_bus.subscribe("r1")
    await b.backend.room_bus.subscribe("r1")
    await b.backend.room_bus.subscribe("r2")
    one, two = seal_envelope(None, 0, b"one"), seal_envelope(None, 0, b"two")
    await a.backend.room_bus.publish("r1", one, timeout=TIMEOUT)
    await a.backend.room_bus.publish("r3", two, timeout=TIMEOUT)
    await a.backend.room_bus.publish("r2", two, timeout=TIMEOUT)
    await eventually(lambda: len(b.heard.rooms) == 2)
    assert sorted(b.heard.rooms) == [("r1", one), ("r2", two)]
    assert a.heard.rooms == []

    b.backend.room_bus.unsubscribe("r1")
    b.backend.room_bus.unsubscribe("never subscribed")

    async def unheard() -> bool:
        b.heard.rooms.clear()
        await a.backend.room_bus.publish("r1", one, timeout=TIMEOUT)
        await a.backend.room_bus.publish("r2", two, timeout=TIMEOUT)
        await eventually(lambda: ("r2", two) in b.heard.rooms)
        return ("r1", one) not in b.heard.rooms

    await eventually(unheard)


async def test_subscribe_right_after_unsubscribe(site: Site) -> None:
    """Whatever came before, the messages of a room that was subscribed last arrive."""
    a, b = await site.node(), await site.node()
    envelope = seal_envelope(None, 0, b"x")
    for _ in range(20):
        await b.backend.room_bus.subscribe("r")
        b.backend.room_bus.unsubscribe("r")
        await b.backend.room_bus.subscribe("r")
        b.heard.rooms.clear()
        await a.backend.room_bus.publish("r", envelope, timeout=TIMEOUT)
        await eventually(lambda: b.heard.rooms)


async def test_subscribes_at_once(site: Site) -> None:
    """The messages of three hundred rooms that were joined at the same time all arrive."""
    a, b = await site.node(), await site.node()
    rooms = [f"room {n}" for n in range(300)]
    await asyncio.gather(*(b.backend.room_bus.subscribe(room) for room in rooms))
    for room in rooms:
        await a.backend.room_bus.publish(room, seal_envelope(None, 0, b"x"), timeout=TIMEOUT)
    await eventually(lambda: len(b.heard.rooms) == 300)
    assert {room for room, _ in b.heard.rooms} == set(rooms)


async def test_post_to_one_node(site: Site) -> None:
    """Only that node gets it; a node that does not exist is no error."""
    a, b = await site.node(), await site.node()
    a.backend.session_bus.post(NodeId("nobody"), b"lost")
    a.backend.session_bus.post(b.id, b"for b")
    a.backend.session_bus.post(a.id, b"for a")
    await eventually(lambda: a.heard.sessions and b.heard.sessions)
    assert (a.heard.sessions, b.heard.sessions) == ([b"for a"], [b"for b"])


async def test_registered_nodes(site: Site) -> None:
    """Every node that listens, with its load; gone when it has left; incarnations differ."""
    a, b = await site.node(), await site.node()
    await site.node(listen=False)

    async def loaded() -> bool:
        nodes = await a.backend.session_bus.nodes(timeout=TIMEOUT)
        return set(nodes) == {a.id, b.id} and all((n.sockets, n.rooms) == (3, 2) for n in nodes.values())

    await eventually(loaded)
    nodes = await b.backend.session_bus.nodes(timeout=TIMEOUT)
    assert nodes[a.id].id == a.id
    assert nodes[a.id].started_at == pytest.approx(time.time(), abs=30)
    assert 0 <= nodes[a.id].lag < 5
    assert nodes[a.id].incarnation != nodes[b.id].incarnation
    await b.leave()
    assert set(await a.backend.session_bus.nodes(timeout=TIMEOUT)) == {a.id}


async def test_lease_of_a_node_that_hears_everything(site: Site) -> None:
    """It is live for every bucket and room, it stays so, and no gap was ever reported."""
    a = await site.node()
    await a.backend.room_bus.subscribe("r")
    leases = [a.backend.session_bus.lease(bucket) for bucket in (0, 100, 255)] + [
        a.backend.room_bus.lease("r")
    ]
    await eventually(lambda: all(lease.live for lease in leases))
    started = time.monotonic()

    async def a_while_later() -> bool:
        assert a.backend.ready
        return time.monotonic() - started > 1.5 * LEASE and all(lease.live for lease in leases)

    await eventually(a_while_later)
    stats = a.backend.stats()
    assert stats.connected
    assert 0 < stats.lease_remaining <= LEASE
    assert (stats.gaps, stats.last_gap, stats.malformed) == (0, None, 0)
    assert a.heard.gaps == []


async def test_backend_that_is_opened_again(site: Site) -> None:
    """After it was left, under a new id: its messages arrive, and it receives those of others."""
    a, b = await site.node(), await site.node()
    await b.leave()
    again = make_node("again")
    async with b.backend.open(again, b.heard, b.heard):
        assert set(await a.backend.session_bus.nodes(timeout=TIMEOUT)) == {a.id, again.id}
        await a.backend.session_bus.publish(1, b"hello", timeout=TIMEOUT)
        await eventually(lambda: b.heard.sessions == [b"hello"])
        await b.backend.session_bus.publish(1, b"answer", timeout=TIMEOUT)
        await eventually(lambda: a.heard.sessions == [b"hello", b"answer"])
