"""A real Sentinel set: one primary, one replica, three sentinels."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from asgi_cluster.bus.messages import Changed, encode
from asgi_cluster.exceptions import StoreUnavailable
from loadtest.ports import free_port
from tests.bus.nodes import Node, opened, our_tasks
from tests.support.topologies import SentinelSet, start_sentinel_set
from tests.support.waiting import eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]


async def wrote(node: Node, timeout: float = 0.3) -> bool:
    try:
        return bool(await node.backend._topology.call("k", "SET", "k", "v", timeout=timeout) == b"OK")
    except StoreUnavailable:
        return False


async def hears(node: Node) -> None:
    before = len(node.receiver.of("session"))
    await node.session_bus.publish(3, encode(Changed("03.x", "me")), timeout=1)
    await node.room_bus.publish("r", b"\nagain", timeout=1)
    await eventually(
        lambda: len(node.receiver.of("session")) > before and b"again" in node.receiver.heard("r")
    )


async def survives(servers: SentinelSet, node: Node, *, stopped: bool) -> None:
    """The primary goes, the replica takes over: writes resume and the lease is live within a second of the
    election.
    """
    await node.room_bus.subscribe("r")
    old = servers.primary
    new = next(server for server in servers.servers if server is not old)
    gone_at = time.monotonic()
    if stopped:
        old.pause()
    else:
        old.kill()
    await eventually(lambda: new.role() == "master", timeout=40, interval=0.02)
    promoted_at = time.monotonic()
    # The election is over when the sentinels name the new primary: before that no node can have its address.
    await eventually(lambda: servers.primary is new, timeout=5, interval=0.02)
    elected_at = time.monotonic()
    await eventually(lambda: wrote(node), timeout=5)
    written_at = time.monotonic()
    await eventually(lambda: node.live, timeout=5)
    trusted_at = time.monotonic()
    print(f"promoted {promoted_at - gone_at:.2f} s, elected {elected_at - gone_at:.2f} s after it was gone")
    print(f"writes {written_at - elected_at:.2f} s, trust {trusted_at - elected_at:.2f} s later")
    assert written_at - elected_at <= 1.0
    assert trusted_at - elected_at <= 1.0
    await hears(node)
    assert node.receiver.of("gap")
    assert str(new.port) in repr(node.backend._topology)
    old.resume() if stopped else old.restart(data=True)
    # When the sentinels look at it, and have waited whether others say so, too: 8 to 20 s and more.
    await eventually(lambda: old.role() == "slave", timeout=60, interval=0.05)
    await eventually(lambda: node.live)
    await hears(node)
    with new.client() as client:
        assert client.hexists(f"{node.backend._registry.names.nodes()}", node.id)


async def test_a_primary_that_is_killed(prefix: str) -> None:
    """Failover by kill, with a password on the servers; nothing is left behind at the end."""
    with start_sentinel_set("--requirepass", "s3cret") as servers:
        async with opened(servers.url, prefix) as node:
            await survives(servers, node, stopped=False)
        assert our_tasks() == []


async def test_a_primary_that_is_stopped(prefix: str) -> None:
    """Failover by SIGSTOP: no connection breaks, and nothing stays pinned to the old address."""
    with start_sentinel_set() as servers:
        async with opened(servers.url, prefix) as node:
            await survives(servers, node, stopped=True)


async def test_a_failover_by_hand_and_a_sentinel_that_is_gone(
    prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SENTINEL FAILOVER with one sentinel dead: the node follows.

    What min-replicas does not bound is warned of.
    """
    caplog.set_level(logging.WARNING)
    with start_sentinel_set() as servers:
        servers.sentinels[0].kill()
        async with opened(servers.url, prefix) as node:
            assert "min-replicas-to-write is 0" in caplog.text
            await node.room_bus.subscribe("r")
            old = servers.primary
            with servers.sentinels[1].client() as client:
                await asyncio.to_thread(client.execute_command, "SENTINEL", "FAILOVER", servers.name)
            await eventually(lambda: servers.primary is not old, timeout=40, interval=0.1)
            await eventually(lambda: node.receiver.of("gap") and node.live, timeout=5)
            assert await wrote(node, timeout=2)
            await hears(node)


async def test_nobody_knows_the_primary(prefix: str) -> None:
    """Every sentinel is named, with what it said."""
    with start_sentinel_set() as servers:
        port = free_port()
        url = f"redis+sentinel://127.0.0.1:{port},127.0.0.1:{servers.sentinels[0].port}/another"
        with pytest.raises(StoreUnavailable) as error:
            async with opened(url, prefix):
                pytest.fail("it opened")
        assert f"127.0.0.1:{port}: " in str(error.value)
        assert "has no service 'another'" in str(error.value)
