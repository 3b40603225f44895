"""A real Redis Cluster: three primaries, three replicas."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

import pytest

from asgi_cluster.backends.redis.slots import slot_of
from asgi_cluster.bus.messages import Changed, encode
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import new_token
from tests.bus.nodes import Node, opened, our_tasks
from tests.support.servers import Server
from tests.support.topologies import RedisCluster, start_redis_cluster
from tests.support.waiting import eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    """For tests that leave it as they found it."""
    with start_redis_cluster() as started:
        yield started


def gap_buckets(node: Node) -> set[int]:
    buckets: set[int] = set()
    for _, reason, some, _, _ in node.receiver.of("gap"):
        assert some is not None, "a gap of one primary is not a gap of all"
        if reason != "subscribed again":
            buckets |= some
    return buckets


async def hears_all_buckets(publisher: Node, node: Node, *, at_once: bool = True) -> None:
    """A message for each of the 256 buckets arrives; not ``at_once``: of those sent again and again, one
    does.
    """
    token = new_token()

    def missing() -> list[int]:
        heard = {handle for _, handle in node.receiver.of("session")}
        return [bucket for bucket in range(256) if f"{bucket:02x}.{token}" not in heard]

    async def publish() -> bool:
        await asyncio.gather(
            *[
                publisher.session_bus.publish(
                    bucket, encode(Changed(f"{bucket:02x}.{token}", "me")), timeout=2
                )
                for bucket in missing()
            ]
        )
        if at_once:
            await eventually(lambda: not missing())
        return not missing()

    await eventually(publish, interval=0.1)


async def test_every_bucket_and_room_is_heard(cluster: RedisCluster, prefix: str) -> None:
    """Session messages of all buckets, rooms on all primaries, posts to one node; nothing is left behind."""
    async with opened(cluster.url, prefix) as one, opened(cluster.url, prefix) as two:
        assert one.live
        await hears_all_buckets(one, two)
        rooms = [f"room {n}" for n in range(60)]
        await asyncio.gather(*[two.room_bus.subscribe(room) for room in rooms])
        assert all(two.room_bus.lease(room).live for room in rooms)
        await asyncio.gather(*[one.room_bus.publish(room, b"\nm", timeout=1) for room in rooms])
        await eventually(lambda: all(two.receiver.heard(room) == [b"m"] for room in rooms))
        assert one.receiver.of("room") == []
        before = len(two.receiver.of("session"))
        one.session_bus.post(two.id, encode(Changed("00.posted", "me")))
        await eventually(lambda: two.receiver.of("session")[before:] == [("session", "00.posted")])
        assert set(await one.session_bus.nodes(timeout=1)) == {one.id, two.id}
        assert one.receiver.of("gap") == two.receiver.of("gap") == []
    assert our_tasks() == []


async def test_a_url_that_names_one_node_finds_the_others(cluster: RedisCluster, prefix: str) -> None:
    """A replica's address will do."""
    url = f"redis+cluster://127.0.0.1:{cluster.nodes[3].port}"
    async with opened(url, prefix) as node:
        await hears_all_buckets(node, node)


async def test_a_single_server_is_no_cluster(valkey: Server, prefix: str) -> None:
    """The right scheme is named."""
    with pytest.raises(StoreUnavailable, match="redis://"):
        async with opened(f"redis+cluster://127.0.0.1:{valkey.port}", prefix):
            pytest.fail("it opened")


async def test_commands_follow_a_slot_that_moves(cluster: RedisCluster, prefix: str) -> None:
    """Under load, a slot goes to another primary and back: every command is executed, none of them twice."""
    async with opened(cluster.url, prefix) as node:
        key = f"{prefix}:{{7f}}:s:counter"
        slot = slot_of(key)
        home = cluster.primary_of(slot)
        target = next(primary for primary in cluster.primaries() if primary is not home)
        done = 0
        stop = asyncio.Event()

        async def count() -> None:
            nonlocal done
            while not stop.is_set():
                await node.backend._topology.call(key, "INCR", key, timeout=2)
                done += 1

        counting = [asyncio.ensure_future(count()) for _ in range(4)]
        await asyncio.to_thread(cluster.move, [slot], target)
        await asyncio.to_thread(cluster.move, [slot], home)
        stop.set()
        await asyncio.gather(*counting)
        assert done > 0
        assert int(await node.backend._topology.call(key, "GET", key, timeout=1)) == done


async def test_a_slot_that_moves_is_a_gap_of_its_bucket_alone(cluster: RedisCluster, prefix: str) -> None:
    """The bucket's lease ends, it is subscribed at its new primary, and no other bucket is touched.

    Rooms likewise.
    """
    async with opened(cluster.url, prefix) as node, opened(cluster.url, prefix) as publisher:
        channel = f"{prefix}:{{7f}}:sessions"
        slot = slot_of(channel)
        beside = {b for b in range(256) if slot_of(f"{{{b:02x}}}") == slot}
        room = next(
            name for name in map("r{}".format, itertools.count()) if slot_of(f"{{room:{name}}}") == slot
        )
        await node.room_bus.subscribe(room)
        await node.room_bus.subscribe("another")
        home = cluster.primary_of(slot)
        target = next(primary for primary in cluster.primaries() if primary is not home)
        await asyncio.to_thread(cluster.move, [slot], target)
        await eventually(lambda: node.receiver.of("gap"))
        await eventually(lambda: node.live)
        await eventually(lambda: node.room_bus.lease(room).live)
        assert gap_buckets(node) == beside
        assert node.receiver.of("rooms gap")[0][1] == {room}
        assert {event[1] for event in node.receiver.of("rooms restored") if event[1]} == {frozenset({room})}
        await hears_all_buckets(publisher, node, at_once=False)
        await publisher.room_bus.publish(room, b"\nm", timeout=1)
        await eventually(lambda: node.receiver.heard(room) == [b"m"])
        await asyncio.to_thread(cluster.move, [slot], home)
        await eventually(lambda: node.live)
        await hears_all_buckets(publisher, node, at_once=False)


async def test_many_slots_that_move_lose_no_message_without_a_gap(cluster: RedisCluster, prefix: str) -> None:
    """Messages are published all the while: each bucket that missed one has had a gap."""
    async with opened(cluster.url, prefix) as node, opened(cluster.url, prefix) as publisher:
        source, target = cluster.primaries()[:2]
        slots = sorted({slot_of(f"{{{b:02x}}}") for b in range(256)})
        first, last, _ = next(row for row in cluster.slots() if row[2] is source)
        moving = [slot for slot in slots if first <= slot <= last][:25]
        sent: list[str] = []
        stop = asyncio.Event()

        async def publish() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                for bucket in range(0, 256, 4):
                    handle = f"{bucket:02x}.{number}"
                    await publisher.session_bus.publish(bucket, encode(Changed(handle, "me")), timeout=2)
                    sent.append(handle)

        publishing = asyncio.ensure_future(publish())
        await asyncio.to_thread(cluster.move, moving, target)
        stop.set()
        await publishing
        await eventually(lambda: node.live)
        await hears_all_buckets(publisher, node, at_once=False)
        heard = {handle for _, handle in node.receiver.of("session")}
        missed = {int(handle[:2], 16) for handle in sent if handle not in heard}
        assert missed <= gap_buckets(node)
        await asyncio.to_thread(cluster.move, moving, source)


@pytest.mark.parametrize("stopped", [False, True], ids=["killed", "stopped"])
async def test_a_primary_that_is_gone_is_replaced(prefix: str, stopped: bool) -> None:
    """Its buckets are a gap at once and trusted again after the failover; the others never notice."""
    with start_redis_cluster() as cluster:
        async with opened(cluster.url, prefix) as node, opened(cluster.url, prefix) as publisher:
            slot = slot_of("{7f}")
            victim = cluster.primary_of(slot)
            replica = cluster.replica_of(victim)
            ranges = [range(first, last + 1) for first, last, primary in cluster.slots() if primary is victim]
            lost = {b for b in range(256) if any(slot_of(f"{{{b:02x}}}") in some for some in ranges)}
            gone_at = time.monotonic()
            if stopped:
                victim.pause()
            else:
                victim.kill()
            await eventually(lambda: gap_buckets(node) == lost, timeout=2)
            # What is sent to a stopped server before that is known has an unknown outcome.
            await eventually(lambda: gap_buckets(publisher) == lost, timeout=2)
            assert all(node.session_bus.lease(b).live for b in set(range(256)) - lost)
            await eventually(lambda: replica.role() == "master", timeout=40, interval=0.02)
            elected_at = time.monotonic()
            await eventually(lambda: node.live, timeout=10)
            trusted_at = time.monotonic()
            await eventually(lambda: publisher.live, timeout=10)
            await hears_all_buckets(publisher, node)
            print(f"elected {elected_at - gone_at:.2f} s, trusted {trusted_at - elected_at:.2f} s later")
            assert trusted_at - elected_at <= 1.5
            assert gap_buckets(node) == lost
            before = len(node.receiver.of("gap"))
            victim.resume() if stopped else victim.restart(data=True)
            await eventually(lambda: victim.role() == "slave", timeout=40, interval=0.05)
            await hears_all_buckets(publisher, node)
            assert len(node.receiver.of("gap")) == before


async def test_a_demoted_primary_is_left(prefix: str) -> None:
    """A failover by hand: the old primary lives on as a replica, and nothing stays pinned to it."""
    with start_redis_cluster() as cluster:
        async with opened(cluster.url, prefix) as node:
            victim = cluster.primary_of(slot_of("{7f}"))
            replica = cluster.replica_of(victim)
            replica.client().execute_command("CLUSTER", "FAILOVER")
            await eventually(lambda: cluster.primary_of(slot_of("{7f}")) is replica, timeout=10)
            await eventually(lambda: gap_buckets(node), timeout=5)
            await eventually(lambda: node.live, timeout=5)
            await hears_all_buckets(node, node, at_once=False)
            assert await node.backend._topology.call("{7f}", "SET", "{7f}", "x", timeout=1) == b"OK"


async def test_links_between_the_nodes_are_killed(cluster: RedisCluster, prefix: str) -> None:
    """DEBUG CLUSTERLINK KILL under load: sharded messages do not travel on those links, and none is lost."""
    async with opened(cluster.url, prefix) as node, opened(cluster.url, prefix) as publisher:
        for _ in range(20):
            for primary in cluster.primaries():
                with primary.client() as client:
                    for other in cluster.primaries():
                        if other is not primary:
                            with other.client() as asked:
                                identity = asked.execute_command("CLUSTER", "MYID")
                            client.execute_command("DEBUG", "CLUSTERLINK", "KILL", "ALL", identity)
            await hears_all_buckets(publisher, node)
        assert node.receiver.of("gap") == []
