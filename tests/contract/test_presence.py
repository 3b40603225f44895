"""What every presence store does."""

from __future__ import annotations

import asyncio

import pytest
import redis

from asgi_cluster.backends.redis import presence
from asgi_cluster.exceptions import NotStarted
from tests.contract.sites import TIMEOUT, Member, Site


def info(user: str) -> bytes:
    return b'{"user":"%s","client":"c","conn_info":{"name":"\\u00e9\\n"}}' % user.encode()


async def enter(node: Member, client: str, user: str = "ann", room: str = "r") -> None:
    await node.backend.presence.enter(room, client, info(user), timeout=TIMEOUT)


async def members(node: Member, room: str = "r") -> dict[str, bytes]:
    return dict(await node.backend.presence.members(room, timeout=TIMEOUT))


@pytest.mark.quick
async def test_members_of_a_room(site: Site) -> None:
    """Who has entered on any node is there, in that room only, until they leave."""
    a, b = await site.node(), await site.node()
    await enter(a, "c1", "ann")
    await enter(b, "c2", "bob")
    await enter(b, "c3", "eve", room="r2")
    for node in (a, b):
        assert await members(node) == {"c1": info("ann"), "c2": info("bob")}
    assert await a.backend.presence.leave("r", "c1", timeout=TIMEOUT)
    assert not await a.backend.presence.leave("r", "c1", timeout=TIMEOUT)
    assert not await a.backend.presence.leave("nowhere", "c1", timeout=TIMEOUT)
    assert await members(b) == {"c2": info("bob")}
    assert await members(b, "r2") == {"c3": info("eve")}
    assert await members(b, "nowhere") == {}


@pytest.mark.quick
async def test_entering_again(site: Site) -> None:
    """The last info holds; there is still one member."""
    a = await site.node()
    await enter(a, "c1", "ann")
    await enter(a, "c1", "bob")
    assert await members(a) == {"c1": info("bob")}


@pytest.mark.quick
async def test_stats_count_people_and_their_tabs(site: Site) -> None:
    """Two tabs of one user are two connections and one user; those without a name are one user together."""
    a, b = await site.node(), await site.node()
    assert await a.backend.presence.stats("r", timeout=TIMEOUT) == (0, 0)
    await enter(a, "c1", "ann")
    await enter(b, "c2", "ann")
    await enter(b, "c3", "bob")
    await enter(b, "c4", "")
    await b.backend.presence.enter("r", "c5", b"{}", timeout=TIMEOUT)
    await b.backend.presence.enter("r", "c6", b"no json", timeout=TIMEOUT)
    assert await a.backend.presence.stats("r", timeout=TIMEOUT) == (6, 3)


@pytest.mark.quick
async def test_node_that_has_just_come(site: Site) -> None:
    """Its people are seen at once, also by a node that has asked for the members a moment ago."""
    a = await site.node()
    await enter(a, "c1")
    assert set(await members(a)) == {"c1"}
    b = await site.node()
    await enter(b, "c2")
    assert set(await members(a)) == {"c1", "c2"}


@pytest.mark.quick
async def test_members_of_a_node_that_has_left(site: Site) -> None:
    """People of a node that is not registered any more are not shown."""
    a, b = await site.node(), await site.node()
    await enter(a, "c1")
    await enter(b, "c2")
    await b.leave()
    looking = await site.node()
    assert await members(looking) == {"c1": info("ann")}


@pytest.mark.quick
async def test_publisher_that_does_not_listen(site: Site) -> None:
    """A worker may look who is there."""
    a, worker = await site.node(), await site.node(listen=False)
    await enter(a, "c1")
    assert set(await members(worker)) == {"c1"}


@pytest.mark.quick
async def test_many_enter_and_leave_at_once(site: Site) -> None:
    """Two hundred arrivals and a hundred departures from two nodes leave exactly those who stayed."""
    nodes = [await site.node(), await site.node()]
    await asyncio.gather(*(enter(nodes[n % 2], f"c{n}") for n in range(200)))
    left = await asyncio.gather(
        *(nodes[n % 2].backend.presence.leave("r", f"c{n}", timeout=TIMEOUT) for n in range(100))
    )
    assert all(left)
    assert set(await members(nodes[0])) == {f"c{n}" for n in range(100, 200)}


async def test_reaping_a_dead_incarnation(server_site: Site) -> None:
    """What a dead incarnation left behind is removed once: of two observers one gets each entry. The living
    keep theirs, and so does the node itself under a new incarnation.
    """
    a, b, dead = await server_site.node(), await server_site.node(), await server_site.node()
    await enter(a, "c1")
    for n in range(20):
        await enter(dead, f"d{n}", f"user-{n}")
    incarnation = (await a.backend.session_bus.nodes(timeout=TIMEOUT))[dead.id].incarnation
    reaped = await asyncio.gather(
        *(node.backend.presence.reap("r", dead.id, incarnation, timeout=TIMEOUT) for node in (a, b))
    )
    merged = {client: found for removed in reaped for client, found in removed.items()}
    assert merged == {f"d{n}": info(f"user-{n}") for n in range(20)}
    assert sum(len(removed) for removed in reaped) == 20
    assert set(await members(b)) == {"c1"}
    await enter(dead, "d0", "again")
    assert await a.backend.presence.reap("r", dead.id, "an older one", timeout=TIMEOUT) == {}
    assert set(await members(b)) == {"c1", "d0"}


async def test_remains_that_nobody_reaped(server_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room without members of living nodes is cleaned up by a read, when the nodes of its entries have been
    strangers for long enough; entries of living nodes stay.
    """
    a, dead = await server_site.node(), await server_site.node()
    await enter(a, "c1")
    await enter(dead, "c2")
    await dead.leave()
    with redis.Redis.from_url(server_site.url) as server:
        key = f"{server_site.prefix}:{{room:r}}:in"
        assert set(await members(a)) == set(await members(a)) == {"c1"}
        assert set(server.hkeys(key)) == {b"c1", b"c2"}
        monkeypatch.setattr(presence, "_UNREGISTERED_FOR", 0.0)
        assert set(await members(a)) == {"c1"}
        assert set(server.hkeys(key)) == {b"c1"}


@pytest.mark.quick
async def test_entering_without_a_registration(site: Site) -> None:
    """A publisher that is no node cannot have people: it says so."""
    worker = await site.node(listen=False)
    with pytest.raises(NotStarted):
        await enter(worker, "c1")


async def test_presence_keys_expire(server_site: Site) -> None:
    """The presence of a room that no node is left to clean up expires; an empty room has no key."""
    a = await server_site.node()
    key = f"{server_site.prefix}:{{room:r}}:in"
    with redis.Redis.from_url(server_site.url) as server:
        await enter(a, "c1")
        assert server.pttl(key) > 6 * 86_400_000
        server.pexpire(key, 5000)
        await members(a)
        assert server.pttl(key) > 6 * 86_400_000
        await a.backend.presence.leave("r", "c1", timeout=TIMEOUT)
        assert not server.exists(key)


@pytest.mark.quick
async def test_entering_with_a_limit(site: Site) -> None:
    """Of many that enter at once on two nodes as many enter as the limit says. Who is in enters again, a
    place that becomes free can be had, and entries of a node that has left do not count.
    """
    a, b = await site.node(), await site.node()

    async def admit(node: Member, client: str) -> bool:
        return await node.backend.presence.enter("r", client, info("ann"), limit=3, timeout=TIMEOUT)

    for node in (a, b):
        await members(node)  # both know the nodes
    admitted = await asyncio.gather(*(admit((a, b)[n % 2], f"c{n}") for n in range(8)))
    assert sum(admitted) == 3
    entered = {f"c{n}" for n in range(8) if admitted[n]}
    assert set(await members(a)) == entered
    inside = sorted(entered)[0]
    assert await admit(a, inside)
    assert not await admit(b, "late")
    assert await a.backend.presence.leave("r", inside, timeout=TIMEOUT)
    assert await admit(b, "late")
    assert not await admit(a, "later")
    await b.leave()
    there = set(await members(await site.node()))
    newcomer = await site.node()
    outcomes = [await admit(newcomer, f"n{n}") for n in range(4)]
    assert sum(outcomes) == 3 - len(there)
    assert not await admit(newcomer, "one more")
