"""Users with many devices: lists and logouts cost what that user has, and nothing piles up in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_cluster import Cluster
from asgi_cluster.bus.messages import Ended, encode
from asgi_cluster.codes import CloseCode
from asgi_cluster.ids import Handle, UserId, new_handle, new_token
from asgi_cluster.sessions.store import NewSession
from tests.sessions.app import nodes
from tests.support.servers import Server, start_valkey


@pytest.fixture
async def crowd() -> AsyncIterator[tuple[Server, Cluster]]:
    with start_valkey() as server:
        async with nodes(server.url, 1) as (cluster,):
            yield server, cluster


def login(cluster: Cluster, user: str) -> tuple[Handle, Any]:
    handle = new_handle(user)
    draft = NewSession(
        handle=handle,
        secret=b"s" * 32,
        user=UserId(user),
        fields={},
        write_id=new_token(),
        idle=3600,
        absolute=7200,
        epoch=new_token(),
    )
    return handle, cluster._parts.service.store.create(draft, timeout=10)


async def many(work: list[Any], at_once: int = 2000) -> None:
    for start in range(0, len(work), at_once):
        await asyncio.gather(*work[start : start + at_once])


async def test_listing_and_revoking_cost_what_the_user_has(crowd: tuple[Server, Cluster]) -> None:
    """With 10 000 users of 5 devices each, one user's list and logout touch that user's keys, as the server's
    own count shows.
    """
    server, cluster = crowd
    await many([login(cluster, f"user-{number % 10_000}")[1] for number in range(50_000)])
    raw = server.client()

    async def commands(work: Any) -> tuple[Any, int]:
        before = raw.info("commandstats")
        result = await work
        after = raw.info("commandstats")
        own = ("cmdstat_info", "cmdstat_pexpire", "cmdstat_ping", "cmdstat_time")
        counted = sum(
            values["calls"] - before.get(name, {"calls": 0})["calls"]
            for name, values in after.items()
            if name not in own and "calls" in values
        )
        return result, counted

    listed, cost = await commands(cluster.user("user-4711").sessions())
    assert len(listed) == 5
    assert cost <= 60
    receipt, cost = await commands(cluster.user("user-4711").logout())
    assert (receipt.sessions, receipt.complete) == (5, True)
    assert cost <= 60
    assert await cluster.user("user-4711").sessions() == []
    assert len(await cluster.user("user-4712").sessions()) == 5
    raw.close()


@pytest.mark.faults
@pytest.mark.timeout(300)
async def test_a_churn_of_logins_leaves_nothing_behind(crowd: tuple[Server, Cluster]) -> None:
    """100 000 logins and logouts of 500 users, one by one and everywhere: what is left is what is alive."""
    server, cluster = crowd
    raw = server.client()
    before = set(raw.keys())
    store = cluster._parts.service.store
    for turn in range(20):
        handles, work = [], []
        for number in range(5000):
            handle, creation = login(cluster, f"user-{number % 500}")
            handles.append(handle)
            work.append(creation)
        await many(work)
        if turn % 2:
            await many(
                [
                    store.end(
                        handle, message=encode(Ended(handle, CloseCode.SESSION_ENDED, "", "")), timeout=10
                    )
                    for handle in handles
                ]
            )
        else:
            await many([cluster.user(f"user-{number}").logout(timeout=0) for number in range(500)], 100)
    left = set(raw.keys()) - before
    assert len(left) <= 500, sorted(left)[:5]  # an epoch per user, with its time to live
    assert all(raw.ttl(key) > 0 for key in left)
    assert not [key for key in left if b":s:" in key or b":i:" in key]
    raw.close()
