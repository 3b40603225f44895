"""A process that does not listen (``listen=False``: a worker, a script) logs out as a node does."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from asgi_cluster import Cluster
from asgi_cluster.ids import bucket_of
from tests.sessions.test_live_logout import Place, closed, cookies, place, sign_in
from tests.sessions.test_user_logout import connect
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import eventually

TIMEOUT = 20.0
"""So long that waiting for all of it cannot be taken for an answer."""


@pytest.fixture(params=["memory", "valkey", "sentinel", "cluster"])
def url(request: pytest.FixtureRequest, prefix: str) -> str:
    if request.param == "memory":
        return f"memory://{prefix}"
    fixture = {"valkey": "valkey", "sentinel": "sentinel_set", "cluster": "redis_cluster"}[request.param]
    return str(request.getfixturevalue(fixture).url)


async def logged_out(here: Place, publisher: Cluster, way: str, *, timeout: float = TIMEOUT) -> None:
    """One session with a socket on each node, ended by the publisher: all of it, at once, and counted."""
    browser = await sign_in(here.nodes[0])
    handle = (await browser.get("/show")).json()["handle"]
    sockets = [await connect(node, cookie=cookies(browser)) for node in here.nodes]
    ended = publisher.user("ada") if way == "user" else publisher.session(handle)
    receipt = await ended.logout(timeout=timeout)
    assert (receipt.sessions, receipt.complete, receipt.nodes_missing) == (1, True, ())
    assert set(receipt.nodes_acked) == {cluster.node for cluster in here.clusters}
    assert receipt.sockets_closed == len(sockets)
    assert receipt.elapsed < timeout / 2
    assert [await closed(socket) for socket in sockets] == [4501] * len(sockets)
    await browser.aclose()


@pytest.mark.parametrize("way", ["user", "session"])
async def test_logout_by_a_publisher(url: str, prefix: str, way: str) -> None:
    """Complete as soon as the nodes have answered, with their sockets counted; the publisher is no node."""
    async with place(url, prefix, 2) as here, Cluster(url, prefix=prefix, listen=False) as publisher:
        for _ in range(2):
            await logged_out(here, publisher, way)
        assert {node.id for node in await publisher.nodes()} == {cluster.node for cluster in here.clusters}


async def test_publisher_in_memory_without_a_start(prefix: str) -> None:
    """``memory://`` needs no start, and a publisher that nobody started is no node either."""
    url = f"memory://{prefix}"
    async with place(url, prefix, 1) as here:
        publisher = Cluster(url, prefix=prefix, listen=False)
        await logged_out(here, publisher, "user")
        assert [node.id for node in await here.clusters[0].nodes()] == [here.clusters[0].node]


async def test_publisher_that_never_logs_out_has_no_subscriber(valkey: Server, prefix: str) -> None:
    """The connection for the answers is opened by the first logout, and writes no key."""
    with valkey.client() as client:

        def subscribers() -> int:
            return sum(int(each["sub"]) for each in client.client_list())

        before = subscribers()
        async with Cluster(valkey.url, prefix=prefix, listen=False) as publisher:
            await publisher.room("news").broadcast("hello")
            assert subscribers() == before
            await publisher.user("ada").logout()
            # The logout waits for it for half of the deadline at most.
            await eventually(lambda: subscribers() == before + 1)
        await eventually(lambda: subscribers() == before)
        # What the broadcast has read of the rooms' rules is every publisher's, and none of the logout's. The
        # user's epoch is every logout's.
        left = [key for key in client.keys(f"{prefix}:*") if b"{rooms}" not in key]
        assert left == [f"{prefix}:{{{bucket_of('ada'):02x}}}:e:ada".encode()]


async def test_publisher_whose_connection_was_cut(valkey: Server, prefix: str) -> None:
    """It is opened again, and answers arrive again."""
    async with Proxy(valkey.url) as proxy, AsyncExitStack() as stack:
        here = await stack.enter_async_context(place(valkey.url, prefix, 1))
        publisher = await stack.enter_async_context(Cluster(proxy.url, prefix=prefix, listen=False))
        await logged_out(here, publisher, "user")
        opened = proxy.accepted
        assert proxy.cut(only=b"SUBSCRIBE", refuse=False) == 1
        await eventually(lambda: proxy.accepted > opened)
        with valkey.client() as client:
            await eventually(lambda: client.pubsub_numsub(f"{prefix}:0:node:{publisher.node}")[0][1] == 1)
        await logged_out(here, publisher, "user")


async def test_publisher_that_cannot_be_answered(valkey: Server, prefix: str) -> None:
    """Its connection for the answers is stalled: the session ends all the same, and the receipt says that the
    nodes are missing.
    """
    async with Proxy(valkey.url) as proxy, AsyncExitStack() as stack:
        here = await stack.enter_async_context(place(valkey.url, prefix, 1))
        publisher = await stack.enter_async_context(Cluster(proxy.url, prefix=prefix, listen=False))
        await logged_out(here, publisher, "user")
        proxy.stall("down", only=b"SUBSCRIBE")
        browser = await sign_in(here.nodes[0])
        receipt = await publisher.user("ada").logout(timeout=0.1)
        assert (receipt.sessions, receipt.complete) == (1, False)
        assert receipt.nodes_missing == (here.clusters[0].node,)
        assert (await browser.get("/show")).json()["user"] is None
        await browser.aclose()
