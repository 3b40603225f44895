"""A logout that is heard of late ends what it ended, and not what the user has begun since."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Literal

import pytest
import websockets

from asgi_cluster import ClusterMiddleware
from tests.bus.test_lost_logouts import Visitor, node
from tests.sessions.app import make_app
from tests.support.nodes import serve
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import eventually


@pytest.mark.parametrize("late", ["the node that did it", "another node"])
async def test_signed_in_again_before_the_news(
    valkey: Server, prefix: str, late: Literal["the node that did it", "another node"]
) -> None:
    """Signed out everywhere, signed in again at once, and a node hears of the first only now: the new socket
    stays, the old one is closed there.
    """
    async with Proxy(valkey.url) as proxy, AsyncExitStack() as stack:
        slow, quick = node(proxy.url, prefix), node(valkey.url, prefix)
        there = await stack.enter_async_context(serve(ClusterMiddleware(make_app(), slow)))
        here = await stack.enter_async_context(serve(ClusterMiddleware(make_app(), quick)))
        before, after, other = Visitor(), Visitor(), Visitor()
        await before.login(here.url)
        await other.login(here.url, "bob")
        old = await stack.enter_async_context(before.socket(there.ws_url))
        bobs = await stack.enter_async_context(other.socket(there.ws_url))
        proxy.stall("down", only=b"SUBSCRIBE")
        origin = slow if late == "the node that did it" else quick
        receipt = await origin.user("ada").logout(timeout=0.05)
        assert receipt.sessions == 1
        await after.login(here.url)
        new = await stack.enter_async_context(after.socket(there.ws_url))
        heard = slow.stats().bus.received
        proxy.heal()
        await eventually(lambda: slow.stats().bus.received > heard)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await old.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4501
        assert slow.stats().bus.gaps == 0
        for socket in (new, bobs):
            await socket.send('{"id":2,"rpc":{"method":"x"}}')
            assert '"id":2' in str(await socket.recv())


async def test_a_session_that_the_index_lost(valkey: Server, prefix: str) -> None:
    """The logout everywhere does not name it, and ends it all the same: its sockets close, too."""
    async with AsyncExitStack() as stack:
        first, second = node(valkey.url, prefix), node(valkey.url, prefix)
        there = await stack.enter_async_context(serve(ClusterMiddleware(make_app(), first)))
        await stack.enter_async_context(second)
        visitor = Visitor()
        handle = await visitor.login(there.url)
        socket = await stack.enter_async_context(visitor.socket(there.ws_url))
        with valkey.client() as client:
            (index,) = client.keys(f"{prefix}:{{{handle[:2]}}}:i:ada")
            assert client.zrem(index, handle[3:]) == 1
        await second.user("ada").logout()
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4501
