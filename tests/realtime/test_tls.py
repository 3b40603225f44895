"""Direct writes under TLS: the same order, bounds and endings as without."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import RoomRule
from tests.realtime.site import Node, Site
from tests.realtime.test_outbox import Member, Recording, deliver, flood
from tests.support.machine import LOCAL, self_signed
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate for loopback, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"), f"IP:{LOCAL}")


async def start(
    site: Site, certificate: tuple[str, str], **realtime: Any
) -> tuple[Node, Member, ssl.SSLContext]:
    """As in ``test_outbox``, over TLS; and what a client needs to trust it."""
    member = Member()

    async def app(websocket: WebSocket) -> None:
        await member(websocket)

    node = await site.node(
        routes=[WebSocketRoute("/ws", app)],
        server={"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]},
        **realtime,
    )
    return node, member, ssl.create_default_context(cafile=certificate[0])


@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_order(redis_site: Site, certificate: tuple[str, str], compression: str | None) -> None:
    """Text and binary, small and larger than a TLS record, directly and in order, and then the close code."""
    node, member, trust = await start(redis_site, certificate)
    async with node.raw(path="/ws", ssl=trust, compression=compression, max_size=None) as client:
        assert await client.ws.recv() == "ready"
        assert node.cluster.stats().realtime.direct == 1
        expected: list[str | bytes] = []
        for number in range(50):
            size = 70_000 if number % 10 == 9 else 10
            expected += [f"{number}" + "x" * size, b"%d" % number]
            deliver(node, expected[-2])
            await member.connections[0].send(expected[-1])
        assert [await asyncio.wait_for(client.ws.recv(), 5) for _ in expected] == expected
        await client.ws.send("hallo")
        assert await client.ws.recv() == "echo hallo"
        deliver(node, "last")
        await member.connections[0].close(4000, "enough")
        assert await client.ws.recv() == "last"
        assert await client.closed() == (4000, "enough")


async def test_one_tick_is_one_write(redis_site: Site, certificate: tuple[str, str]) -> None:
    """Ten messages of one tick are one write to the TLS transport, and so one record."""
    node, member, trust = await start(redis_site, certificate)
    async with node.raw(path="/ws", ssl=trust) as client:
        assert await client.ws.recv() == "ready"
        server = member.connections[0].socket.server
        written: list[bytes] = []
        server.transport = Recording(server.transport, written)
        for number in range(10):
            deliver(node, str(number))
        assert [await client.ws.recv() for _ in range(10)] == [str(number) for number in range(10)]
        assert len(written) == 1


async def test_slow_client_is_disconnected(redis_site: Site, certificate: tuple[str, str]) -> None:
    """A client that stops reading meets its bound, is closed and cut off; its neighbour gets everything."""
    rules = [RoomRule("room", slow="disconnect")]
    node, member, trust = await start(
        redis_site, certificate, rules=rules, outbox_bytes=200_000, close_timeout=0.2
    )
    async with (
        node.raw(path="/ws", ssl=trust, max_size=None) as slow,
        node.raw(path="/ws", ssl=trust, max_size=None) as other,
    ):
        assert [await slow.ws.recv(), await other.ws.recv()] == ["ready", "ready"]
        slow.ws.transport.pause_reading()
        bound, got = 0, 0
        while node.cluster.stats().realtime.slow == 0:
            await flood(node, range(got, got + 10))
            bound = max(bound, *(connection.outbox.waiting_bytes for connection in member.connections))
            for _ in range(10):
                assert int((await asyncio.wait_for(other.ws.recv(), 5))[:8]) == got
                got += 1
            assert got < 5_000
        assert 0 < bound <= 200_000
        await eventually(lambda: node.cluster.stats().realtime.connections == 1)
        slow.ws.transport.abort()


@pytest.mark.parametrize("ws", ["websockets-sansio", "websockets", "wsproto"])
@pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")
@pytest.mark.parametrize("goes", ["politely", "cut", "silent"])
async def test_closing_leaves_no_traceback(
    redis_site: Site, certificate: tuple[str, str], ws: str, goes: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A forced close under TLS, whatever the client does then, leaves nothing to the loop's error handler."""
    caught: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: caught.append(context))
    member = Member()

    async def app(websocket: WebSocket) -> None:
        await member(websocket)

    node = await redis_site.node(
        routes=[WebSocketRoute("/ws", app)],
        server={"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1], "ws": ws},
        close_timeout=0.2,
    )
    trust = ssl.create_default_context(cafile=certificate[0])
    async with node.raw(path="/ws", ssl=trust) as client:
        assert await client.ws.recv() == "ready"
        if goes == "silent":
            client.ws.transport.pause_reading()
        await member.connections[0].close(4000, "enough")
        if goes == "cut":
            client.ws.transport.abort()
        elif goes == "politely":
            assert await client.closed() == (4000, "enough")
        await asyncio.sleep(0.5)  # the time after which a socket that hangs is cut is over
        client.ws.transport.abort()
    await eventually(lambda: node.cluster.stats().realtime.connections == 0)
    assert caught == []
    assert "Traceback" not in caplog.text
