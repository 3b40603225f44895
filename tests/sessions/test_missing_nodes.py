"""Logouts and logins while a node does not answer: what is waited for, and when a receipt may be complete."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import httpx
import pytest

from asgi_cluster import CacheConfig, Cluster, SessionConfig
from tests.sessions.app import client_for
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import eventually

PATIENT = SessionConfig(cache=CacheConfig(lease=20.0))
"""With a deadline of 15 s: whoever waits for a node that is gone waits for longer than a busy machine
takes.
"""


def patient(url: str, prefix: str) -> Cluster:
    return Cluster(url, prefix=prefix, deadline=15.0, sessions=PATIENT)


def crash(server: Server, prefix: str, name: str = "crashed") -> None:
    """A node that is registered and will never answer."""
    with server.client() as client:
        client.hset(f"{prefix}:{{nodes}}:all", name, b"")


async def test_login_does_not_wait_for_a_crashed_node(valkey: Server, prefix: str) -> None:
    """The anonymous session that a login replaces is ended, and nobody's acknowledgement is waited for."""
    async with (
        patient(valkey.url, prefix) as cluster,
        client_for(cluster) as browser,
        client_for(cluster) as other,
    ):
        await browser.post("/put", json={"cart": 1})
        other.cookies = httpx.Cookies(browser.cookies)
        crash(valkey, prefix)
        async with asyncio.timeout(7):
            signed_in = (await browser.post("/login?user=ada")).json()
        assert (signed_in["user"], signed_in["data"]) == ("ada", {"cart": 1})
        assert (await other.get("/show")).json()["data"] == {}


async def test_only_the_first_logout_waits_for_a_crashed_node(valkey: Server, prefix: str) -> None:
    """A node that has missed one is not waited for again until it answers; every receipt names it."""
    async with patient(valkey.url, prefix) as cluster:
        crash(valkey, prefix)
        first = await cluster.user("ada").logout(timeout=0.1)
        async with asyncio.timeout(7):
            second = await cluster.user("ada").logout(timeout=15)
        for receipt in (first, second):
            assert (receipt.complete, receipt.nodes_missing) == (False, ("crashed",))
            assert receipt.nodes_acked == (cluster.node,)


async def test_node_that_answers_again_is_waited_for(valkey: Server, prefix: str) -> None:
    """Stalled for a moment, not dead: its late answers are enough."""
    async with Proxy(valkey.url) as proxy, AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(patient(valkey.url, prefix))
        slow = await stack.enter_async_context(patient(proxy.url, prefix))
        assert (await cluster.user("ada").logout(timeout=15)).complete
        proxy.stall("down", only=b"SUBSCRIBE")
        missed = await cluster.user("ada").logout(timeout=0.1)
        assert missed.nodes_missing == (slow.node,)
        proxy.heal()

        async def complete() -> bool:
            return (await cluster.user("ada").logout(timeout=15)).complete

        await eventually(complete)
        # It is waited for again for as long as the caller allows, and not a moment only.
        proxy.delay(0.3)
        assert (await cluster.user("ada").logout(timeout=15)).complete


async def test_logout_without_waiting(valkey: Server, prefix: str) -> None:
    """``timeout=0``: committed and published, and the receipt says that no other node has answered yet."""
    async with patient(valkey.url, prefix) as cluster, patient(valkey.url, prefix) as other:
        receipt = await cluster.user("ada").logout(timeout=0)
        assert (receipt.complete, receipt.nodes_missing) == (False, (other.node,))


@pytest.mark.parametrize("origin", ["node", "publisher"])
async def test_complete_receipt_waits_for_what_a_cut_off_node_may_serve(
    valkey: Server, prefix: str, origin: str
) -> None:
    """One node serves stale sessions for 3 s when it cannot reach the store; another, and a publisher, are
    not configured so. A receipt is not complete after a lease while that node goes on serving the session; it
    is when the node cannot serve it any more.
    """
    lease = CacheConfig(lease=1.0)
    stale = SessionConfig(on_store_error="stale", stale_for=3.0, cache=lease)
    async with Proxy(valkey.url) as proxy, AsyncExitStack() as stack:
        cut_off = await stack.enter_async_context(Cluster(proxy.url, prefix=prefix, sessions=stale))
        other = await stack.enter_async_context(
            Cluster(valkey.url, prefix=prefix, sessions=SessionConfig(cache=lease), listen=origin == "node")
        )
        for timeout, complete in ((1.5, False), (8.0, True)):
            browser = await stack.enter_async_context(client_for(cut_off))
            await browser.post("/login?user=ada")
            await eventually(lambda: cut_off.stats().bus.lease_remaining > 0)
            assert (await browser.get("/show")).json()["user"] == "ada"
            proxy.blackhole()
            receipt = await other.user("ada").logout(timeout=timeout)
            served = await browser.get("/show")
            assert (receipt.sessions, receipt.complete) == (1, complete)
            assert receipt.nodes_missing == (cut_off.node,)
            if complete:
                assert served.status_code == 503
                assert receipt.elapsed >= 3.0
            else:
                assert served.json()["user"] == "ada"
            proxy.heal()
            await eventually(lambda: cut_off.stats().bus.lease_remaining > 0)


@pytest.mark.parametrize(
    "options",
    [
        {"cache": CacheConfig(lease=300.0)},
        {"on_store_error": "stale", "stale_for": 600.0},
        {"on_store_error": "stale", "stale_for": 200.0, "cache": CacheConfig(lease=100.0)},
    ],
)
def test_node_that_would_outlive_its_registration_is_refused(options: dict[str, object]) -> None:
    """A node that may serve a session for longer than it counts as registered could not be waited for."""
    with pytest.raises(ValueError, match=r"lease.*stale_for"):
        SessionConfig(**options)  # type: ignore[arg-type]
    assert SessionConfig(stale_for=600.0).stale_for == 600.0  # which nothing uses
