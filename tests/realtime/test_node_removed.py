"""One node removes a dead node from the registry: what follows on all of them."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import Any

import pytest

from asgi_cluster import BusUnavailable, RoomRule
from tests.realtime.site import Node, Raw, Site
from tests.support.servers import Server
from tests.support.waiting import eventually

HERE = RoomRule("here:{name}", subscribe=True, presence=True, join_leave=True)


def leave_behind(server: Server, prefix: str, room: str) -> None:
    """What a node that is dead now has entered."""
    with server.client() as redis:
        entry = b'dead incarnation\n{"user":"","client":"ghost"}'
        redis.hset(f"{prefix}:{{room:{room}}}:in", "ghost", entry)


def remove(node: Node) -> None:
    node.cluster._parts.dispatch.node_removed("dead", "incarnation")


async def next_leave(client: Raw) -> tuple[str, str]:
    """The room that the next leave is about, and who has left."""
    while True:
        push = await client.push()
        if "leave" in push:
            return push["channel"], push["leave"]["info"]["client"]


async def leaves_before(client: Raw, sentinel: str) -> list[str]:
    """Who has left, until the connection ``sentinel`` joins."""
    left: list[str] = []
    while True:
        push = await client.push()
        if "leave" in push:
            left.append(push["leave"]["info"]["client"])
        elif push["join"]["info"]["client"] == sentinel:
            return left


async def test_members_of_a_dead_node_leave_once(valkey: Server, prefix: str) -> None:
    """Each room that has members on some node gets one leave, also a room of which the node that removed the
    dead one has no members.
    """
    async with AsyncExitStack() as stack:
        site = Site(valkey.url, prefix, stack)
        node, other = await site.node(rules=[HERE]), await site.node(rules=[HERE])
        here, there = [await stack.enter_async_context(each.client()) for each in (node, other)]
        await here.call("subscribe", {"channel": "here:both"})
        for room in ("here:both", "here:other"):
            leave_behind(valkey, prefix, room)
            await there.call("subscribe", {"channel": room})
        remove(node)
        first = {await next_leave(there), await next_leave(there)}
        assert first == {("here:both", "ghost"), ("here:other", "ghost")}
        async with node.raw() as last:
            sentinel = (await last.call("connect", {}))["connect"]["client"]
            for room in ("here:both", "here:other"):
                await last.call("subscribe", {"channel": room})
            assert await leaves_before(here, sentinel) == ["ghost"]
            assert await leaves_before(there, sentinel) == []


async def test_death_that_cannot_be_published(
    redis_site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One INFO line: the entries are removed when the room is read."""
    node = await redis_site.node(rules=[HERE])

    async def refuse(bucket: int, payload: bytes, *, timeout: float) -> Any:
        raise BusUnavailable("broken by the test")

    monkeypatch.setattr(node.cluster._parts.backend.session_bus, "publish", refuse)
    with caplog.at_level(logging.INFO, "asgi_cluster.dispatch"):
        remove(node)
        await eventually(lambda: "the death of node dead was not published" in caplog.text)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_death_that_is_found_while_the_node_stops(redis_site: Site) -> None:
    """Nothing is published, and nothing fails."""
    node = await redis_site.node(rules=[HERE])
    await node.cluster.__aexit__()
    remove(node)
