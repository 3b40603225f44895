"""Which nodes there are, and which have died."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.registration import Registration
from asgi_cluster.backends.redis.registry import BEAT_TTL, Registry
from asgi_cluster.backends.redis.scripts import Script, load
from asgi_cluster.bus.lease import Lease
from tests.bus.nodes import opened
from tests.contract.sites import make_node
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.waiting import eventually


async def test_nodes_are_listed_with_what_they_say_of_themselves(valkey: Server, prefix: str) -> None:
    """Id, when it started, sockets, rooms, the age of its beat; gone when it has signed off."""
    async with opened(valkey.url, prefix) as one:
        async with opened(valkey.url, prefix) as two:
            nodes = await one.session_bus.nodes(timeout=1)
            assert set(nodes) == {one.id, two.id}
            info = nodes[two.id]
            assert (info.sockets, info.rooms) == (7, 3)
            assert abs(info.started_at - time.time()) < 5
            assert 0 <= info.lag < 1
            assert info.incarnation == two.incarnation
        assert set(await one.session_bus.nodes(timeout=1)) == {one.id}


async def test_a_node_is_registered_before_its_first_lease(valkey: Server, prefix: str) -> None:
    """Whoever can serve from a cache is among those that a logout counts on."""
    async with opened(valkey.url, prefix) as node:
        assert valkey.client().hexists(f"{prefix}:{{nodes}}:all", node.id)
        assert valkey.client().pttl(f"{prefix}:{{nodes}}:beat:{node.id}") > 200_000


async def test_a_registration_that_vanishes_comes_back_as_another_incarnation(prefix: str) -> None:
    """FLUSHALL: a gap, and a new incarnation, so that presence is entered again."""
    with start_valkey() as server:
        async with opened(server.url, prefix) as node:
            before = node.incarnation
            server.client().flushall()
            await eventually(lambda: node.incarnation != before)
            await eventually(lambda: node.live)
            assert (await node.session_bus.nodes(timeout=1))[node.id].incarnation == node.incarnation
            assert node.receiver.of("gap")
            assert [event[1] for event in node.receiver.of("rooms restored")] == [frozenset()]


@pytest.mark.parametrize("stall", [0.0, 4.0])
async def test_registration_lost_in_a_blocked_loop(
    valkey: Server, prefix: str, stall: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so when the event loop stood still until the others took the node for dead, and not when
    the registration just vanished.
    """
    async with opened(valkey.url, prefix) as node:
        before = node.incarnation
        # As another node does it meanwhile.
        assert valkey.client().delete(f"{prefix}:{{nodes}}:beat:{node.id}")
        time.sleep(stall)  # noqa: ASYNC251  # the blocking call that the line is about
        await eventually(lambda: node.incarnation != before)
        await eventually(lambda: node.live)
    assert ("the event loop stood still for 4 s" in caplog.text) == (stall > 0)
    assert ("registration was gone from Redis" in caplog.text) == (stall == 0)


@pytest.mark.faults
async def test_a_dead_node_is_removed_within_six_seconds(valkey: Server, prefix: str) -> None:
    """Cut off for good, without signing off: gone from the list, and the receiver gets the node whose
    presence is to be removed.
    """
    async with (
        opened(valkey.url, prefix) as observer,
        Proxy(valkey.url) as proxy,
        opened(proxy.url, prefix) as node,
    ):
        identity = node.id, node.incarnation
        proxy.cut()
        cut_at = time.monotonic()
        await eventually(lambda: observer.receiver.of("removed"), timeout=6.0)
        assert time.monotonic() - cut_at >= 3.5
        assert observer.receiver.of("removed") == [("removed", *identity)]
        assert set(await observer.session_bus.nodes(timeout=1)) == {observer.id}
        proxy.heal()
        await eventually(lambda: node.live)
        assert set(await observer.session_bus.nodes(timeout=1)) == {observer.id, node.id}
        assert node.incarnation not in ("", identity[1])


@pytest.mark.faults
@pytest.mark.parametrize("stalled", [2.5, 6.0])
async def test_the_living_are_not_removed_after_a_stall_of_the_server(prefix: str, stalled: float) -> None:
    """For some seconds no node could beat: that does not show that one is dead."""
    with start_valkey() as server:
        async with opened(server.url, prefix) as one, opened(server.url, prefix) as two:
            incarnations = one.incarnation, two.incarnation
            server.pause()
            await asyncio.sleep(stalled)
            server.resume()
            await eventually(lambda: one.live and two.live)
            await asyncio.sleep(2.5)
            assert one.receiver.of("removed") == two.receiver.of("removed") == []
            assert (one.incarnation, two.incarnation) == incarnations


class Observed:
    """A registry server with one node in it, whose beat stands still."""

    def __init__(self, info: bytes) -> None:
        self.info = info
        self.reaped = False

    async def run(self, script: Script, keys: list[str], args: list[object], *, timeout: float) -> object:
        if script is load("node_reap"):
            self.reaped = True
            return 1
        return [1_000_000, [] if self.reaped else [[b"other", self.info, BEAT_TTL - 1000]]]


@pytest.mark.parametrize(
    ("own", "other", "dead_after"),
    [
        ((2.0, 0.0), (2.0, 0.0), 4.0),
        ((2.0, 0.0), (9.0, 0.0), 9.0),
        ((9.0, 0.0), (2.0, 0.0), 9.0),
        ((2.0, 0.0), (2.0, 30.0), 32.0),
        ((9.0, 0.0), None, 9.0),
    ],
)
async def test_a_node_is_not_dead_before_it_cannot_serve_any_more(
    own: tuple[float, float], other: tuple[float, float] | None, dead_after: float
) -> None:
    """Silent for four seconds, and for its lease and what it may serve stale; by what it has registered or,
    when that cannot be read, by the observer's own configuration.
    """
    now = 100.0
    server = Observed(b"" if other is None else msgspec.msgpack.encode([0.0, 0, 0, "i", *other]))
    topology: Any = server
    registry = Registry(topology, Names("p"), lease=own[0], stale_for=own[1])
    registration = Registration(registry, make_node(), lambda: (0, 0))
    lease = Lease(1000.0, clock=lambda: now)
    lease.renew(now)
    for passed in (0.0, dead_after - 0.01):
        now = 100.0 + passed
        assert set(await registration.observe(lease)) == {"other"}
    now = 100.0 + dead_after
    assert set(await registration.observe(lease)) == set()
    assert server.reaped
