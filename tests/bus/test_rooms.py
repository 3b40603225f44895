"""Rooms come and go on the subscriber."""

from __future__ import annotations

import asyncio

import pytest

from asgi_cluster.exceptions import BusUnavailable
from tests.bus.nodes import opened, our_tasks
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.waiting import eventually


async def test_a_room_is_heard_when_subscribe_returns(valkey: Server, prefix: str) -> None:
    """What is published after that arrives, on the publisher's own node too."""
    async with opened(valkey.url, prefix) as one, opened(valkey.url, prefix) as two:
        for n in range(50):
            room = f"room {n}"
            await one.room_bus.subscribe(room)
            await two.room_bus.publish(room, b"\nm%d" % n, timeout=1)
        await one.room_bus.subscribe("last")
        await one.room_bus.publish("last", b"\nend", timeout=1)
        await eventually(lambda: one.receiver.heard("last"))
        assert [one.receiver.heard(f"room {n}") for n in range(50)] == [[b"m%d" % n] for n in range(50)]
        assert two.receiver.of("room") == []


async def test_joins_of_one_tick_are_one_command(valkey: Server, prefix: str) -> None:
    """A thousand joins at once are a handful of SUBSCRIBE commands."""
    before = valkey.client().info("commandstats").get("cmdstat_subscribe", {}).get("calls", 0)
    async with opened(valkey.url, prefix) as node:
        await asyncio.gather(*[node.room_bus.subscribe(f"r{n}") for n in range(1000)])
        after = valkey.client().info("commandstats")["cmdstat_subscribe"]["calls"]
        assert len(valkey.client().pubsub_channels(f"{prefix}:0:room:*")) == 1000
        assert after - before <= 5


@pytest.mark.parametrize("steps", ["sus", "su", "sususus", "s.us", "s.u.s", "su.s", "sus.u", "s.usu"])
async def test_join_and_leave_races_end_as_the_last_step_says(
    valkey: Server, prefix: str, steps: str
) -> None:
    """However joins (s), leaves (u) and round trips (.) interleave, the last one counts; no caller waits for
    ever.
    """
    async with opened(valkey.url, prefix) as node, opened(valkey.url, prefix) as other, asyncio.timeout(5):
        joins = []
        for step in steps:
            match step:
                case "s":
                    joins.append(asyncio.ensure_future(node.room_bus.subscribe("r")))
                    # The coroutine has to get as far as its wait, as a caller's await would.
                    await asyncio.sleep(0)
                case "u":
                    node.room_bus.unsubscribe("r")
                case ".":
                    # A reply of the server: what was sent before is on its way.
                    await node.session_bus.nodes(timeout=1)
        await asyncio.gather(*joins)
        await node.room_bus.subscribe("sentinel")
        await other.room_bus.publish("r", b"\nm", timeout=1)
        await other.room_bus.publish("sentinel", b"\nend", timeout=1)
        await eventually(lambda: node.receiver.heard("sentinel"))
        assert node.receiver.heard("r") == ([b"m"] if steps.endswith("s") else [])


async def test_a_cancelled_join_does_not_break_another(valkey: Server, prefix: str) -> None:
    """Two wait for the same room; one gives up; the other is joined."""
    async with opened(valkey.url, prefix) as node:
        first = asyncio.ensure_future(node.room_bus.subscribe("r"))
        second = asyncio.ensure_future(node.room_bus.subscribe("r"))
        await asyncio.sleep(0)
        first.cancel()
        await second
        await node.room_bus.publish("r", b"\nm", timeout=1)
        await eventually(lambda: node.receiver.heard("r") == [b"m"])


async def test_a_join_while_the_bus_is_down_returns_and_is_kept(valkey: Server, prefix: str) -> None:
    """The room is subscribed when the connection is back, and its restoration is reported."""
    async with Proxy(valkey.url) as proxy, opened(proxy.url, prefix) as node:
        proxy.cut()
        await eventually(lambda: node.receiver.of("gap"))
        async with asyncio.timeout(0.1):
            await node.room_bus.subscribe("r")
        with pytest.raises(BusUnavailable):
            await node.room_bus.publish("r", b"\nlost", timeout=0.1)
        proxy.heal()
        await eventually(lambda: node.receiver.of("rooms restored"))
        await node.room_bus.publish("r", b"\nm", timeout=2)
        await eventually(lambda: node.receiver.heard("r") == [b"m"])


async def test_a_room_whose_channel_is_refused_leaves_the_others_alone(prefix: str) -> None:
    """An access list forbids one room of a batch: its join raises, the joins beside it do not."""
    rights = f"worker on >pw ~{prefix}:* +@all resetchannels &{prefix}:0:sessions &{prefix}:0:node:*"
    rooms = f"&{prefix}:0:room:good* &{prefix}:0:room:"
    with start_valkey("--user", *f"{rights} {rooms}".split()) as server:
        async with opened(server.url.replace("//", "//worker:pw@"), prefix) as node:
            outcomes = await asyncio.gather(
                *[node.room_bus.subscribe(room) for room in ("good1", "bad", "good2")], return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [type(None), BusUnavailable, type(None)]
            await node.room_bus.publish("good2", b"\nm", timeout=1)
            await eventually(lambda: node.receiver.heard("good2") == [b"m"])


async def test_a_refused_room_that_was_left_meanwhile_leaves_the_others_alone(prefix: str) -> None:
    """One command joins both rooms, an access list forbids one, and that one is left before the server
    answers: the other is joined all the same.
    """
    rights = f"worker on >pw ~{prefix}:* +@all resetchannels &{prefix}:0:sessions &{prefix}:0:node:*"
    rooms = f"&{prefix}:0:room:good* &{prefix}:0:room:"
    with start_valkey("--user", *f"{rights} {rooms}".split()) as server:
        async with opened(server.url.replace("//", "//worker:pw@"), prefix) as node:
            good, bad = (asyncio.ensure_future(node.room_bus.subscribe(room)) for room in ("good", "bad"))
            for _ in range(2):  # until the command is on its way
                await asyncio.sleep(0)
            node.room_bus.unsubscribe("bad")
            await asyncio.gather(good, bad)
            await node.room_bus.publish("good", b"\nm", timeout=1)
            await eventually(lambda: node.receiver.heard("good") == [b"m"])


async def test_nothing_is_left_behind_on_close(valkey: Server, prefix: str) -> None:
    """No task, no connection, no registration."""
    clients = len(valkey.client().client_list())
    async with opened(valkey.url, prefix) as node:
        await node.room_bus.subscribe("r")
        assert our_tasks()
    assert our_tasks() == []
    assert valkey.client().hlen(f"{prefix}:{{nodes}}:all") == 0
    assert valkey.client().keys(f"{prefix}:*") == []
    await eventually(lambda: len(valkey.client().client_list()) <= clients + 3)


async def test_a_backend_can_be_opened_again_on_another_loop(valkey: Server, prefix: str) -> None:
    """Everything starts afresh: nothing of the first time is bound to its loop."""
    from asgi_cluster.backends.redis.backend import RedisBackend
    from tests.bus.nodes import Receiver
    from tests.contract.sites import make_node

    backend = RedisBackend(valkey.url, prefix=prefix, lease_duration=2.0)

    async def once() -> bool:
        receiver = Receiver()
        async with backend.open(make_node(), receiver, receiver):
            return backend.session_bus.lease(0).live

    assert await once()
    assert not backend.session_bus.lease(0).live
    assert await asyncio.to_thread(asyncio.run, once())
