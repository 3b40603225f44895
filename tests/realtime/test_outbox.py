"""What leaves a node: the same order, bounds and endings, whichever way it takes to the client."""

from __future__ import annotations

import asyncio
import socket as sockets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed

from asgi_cluster import Connection, RoomRule
from asgi_cluster.sockets.batches import Flusher
from asgi_cluster.sockets.prepared import PreparedMessage
from tests.realtime.site import Node, Site
from tests.realtime.test_connection import cluster_of
from tests.support.waiting import eventually

PATHS = ["direct", "wrapped", "websockets", "wsproto"]
"""``direct`` writes frames to the transport; ``wrapped`` is the same server behind a middleware that wraps
``send``.
"""


def wrapping(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped(message: Any) -> None:
            await send(message)

        await app(scope, receive, wrapped)

    return middleware


class Member:
    """The app: it joins one room and keeps its connections for the test."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []

    async def __call__(self, websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket) as connection:
            await connection.join("room")
            self.connections.append(connection)
            await connection.send("ready")
            async for message in connection:
                await websocket.send_text(f"echo {message!s}")


async def start(site: Site, path: str, **realtime: Any) -> tuple[Node, Member]:
    member = Member()

    async def app(websocket: WebSocket) -> None:
        await member(websocket)

    node = await site.node(
        routes=[WebSocketRoute("/ws", app)],
        wrap=wrapping if path == "wrapped" else None,
        server={"ws": path if path in ("websockets", "wsproto") else "websockets-sansio"},
        **realtime,
    )
    return node, member


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


pytestmark = pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")


async def test_statistics_name_the_path(redis_site: Site, path: str) -> None:
    """``stats`` says how many sockets are written to directly, and why the others are not."""
    node, _ = await start(redis_site, path)
    async with node.raw(path="/ws") as client:
        assert await client.ws.recv() == "ready"
        stats = node.cluster.stats().realtime
        assert stats.direct == (path == "direct")
        assert sum(stats.fallback.values()) == (path != "direct")
        assert all(reason for reason in stats.fallback)


@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_order(redis_site: Site, path: str, compression: str | None) -> None:
    """Broadcasts, own messages and what the app sends by itself arrive whole and in order, small and large,
    also where permessage-deflate was negotiated.
    """
    node, member = await start(redis_site, path)
    async with node.raw(path="/ws", compression=compression, max_size=None) as client:
        assert await client.ws.recv() == "ready"
        expected: list[str | bytes] = []
        for number in range(50):
            size = 70_000 if number % 10 == 9 else 10
            expected += [f"{number}" + "x" * size, b"%d" % number]
            deliver(node, expected[-2])
            await member.connections[0].send(expected[-1])
        got = [await asyncio.wait_for(client.ws.recv(), 5) for _ in expected]
        assert got == expected
        await client.ws.send("hallo")
        assert await client.ws.recv() == "echo hallo"
        deliver(node, "last")
        await member.connections[0].close(4000, "enough")
        assert await client.ws.recv() == "last"
        assert await client.closed() == (4000, "enough")


async def test_one_tick_is_one_write(redis_site: Site) -> None:
    """What is broadcast in one tick leaves in one write; a lone message leaves at the end of its tick."""
    node, member = await start(redis_site, "direct")
    async with node.raw(path="/ws") as client:
        assert await client.ws.recv() == "ready"
        transport = member.connections[0].socket.server.transport
        written: list[bytes] = []
        member.connections[0].socket.server.transport = Recording(transport, written)
        for number in range(10):
            deliver(node, str(number))
        assert [await client.ws.recv() for _ in range(10)] == [str(number) for number in range(10)]
        assert len(written) == 1
        deliver(node, "alone")
        assert await client.ws.recv() == "alone"
        assert len(written) == 2


class Recording:
    """A transport that counts writes."""

    def __init__(self, transport: Any, written: list[bytes]) -> None:
        self._transport = transport
        self._written = written

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@asynccontextmanager
async def stalled(node: Node) -> AsyncIterator[sockets.socket]:
    """A WebSocket client that has connected and reads nothing more, with the smallest buffer there is."""
    connection = sockets.socket()
    connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    host, _, port = node.http.removeprefix("http://").partition(":")
    with connection:
        await loop.sock_connect(connection, (host, int(port)))
        request = (
            f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await loop.sock_sendall(connection, request.encode())
        answer = b""
        while b"ready" not in answer:
            answer += await loop.sock_recv(connection, 1024)
        yield connection


def deliver(node: Node, data: str | bytes, key: str | None = None) -> None:
    """Straight into the room: what the bus does with it is not the point here."""
    local_room = node.cluster._parts.rooms._local.get("room")
    assert local_room is not None
    binary = isinstance(data, bytes)
    packet = PreparedMessage(data if isinstance(data, bytes) else data.encode(), binary=binary)
    local_room.deliver(lambda _: packet, key=key)


async def flood(node: Node, numbers: range, *, keys: int = 0) -> None:
    for number in numbers:
        deliver(node, f"{number:08}" + "x" * 16_000, key=str(number % keys) if keys else None)
        await asyncio.sleep(0)


async def test_slow_client_is_disconnected(redis_site: Site, path: str) -> None:
    """``slow="disconnect"``: the outbox stays within its bound, the client is closed, the others get
    everything.
    """
    rules = [RoomRule("room", slow="disconnect")]
    node, member = await start(redis_site, path, rules=rules, outbox_bytes=200_000, close_timeout=0.2)
    async with stalled(node), node.raw(path="/ws", max_size=None) as other:
        assert await other.ws.recv() == "ready"
        slow = member.connections[0]
        bound = 0
        got: list[int] = []

        def arrived(upto: int) -> bool:
            return len(got) > upto

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_read(other.ws.recv, got, 600))
            for start_at in range(0, 600, 10):
                await flood(node, range(start_at, start_at + 10))
                bound = max(bound, slow.outbox.waiting_bytes)
                await eventually(partial(arrived, start_at))
        assert got == list(range(600))
        assert bound <= 200_000
        await eventually(lambda: node.cluster.stats().realtime.connections == 1)
        assert node.cluster.stats().realtime.slow == 1


async def test_burst_of_one_tick(redis_site: Site, path: str) -> None:
    """A burst within one tick stays within the bound, and a client that reads is not slow for it."""
    node, member = await start(redis_site, path, outbox_bytes=200_000)
    async with node.raw(path="/ws", max_size=None) as client:
        assert await client.ws.recv() == "ready"
        outbox = member.connections[0].outbox
        bound = 0
        for number in range(20):
            deliver(node, f"{number:08}" + "x" * 30_000)
            bound = max(bound, outbox.waiting_bytes)
        assert bound <= 200_000
        if path == "direct":
            got: list[int] = []
            await _read(client.ws.recv, got, 20)
            assert got == list(range(20))


async def _read(receive: Callable[[], Awaitable[Any]], into: list[int], count: int) -> None:
    while len(into) < count:
        into.append(int((await asyncio.wait_for(receive(), 5))[:8]))


async def test_slow_client_drops(redis_site: Site, path: str) -> None:
    """``slow="drop"``: what does not fit is dropped for the slow client alone, counted, and it stays."""
    rules = [RoomRule("room", slow="drop")]
    node, member = await start(redis_site, path, rules=rules, outbox_bytes=200_000)
    async with stalled(node) as connection:
        await flood(node, range(600))
        stats = node.cluster.stats().realtime
        assert stats.dropped > 0
        assert stats.slow == 0
        assert member.connections[0].outbox.waiting_bytes <= 200_000
        numbers = await read_numbers(connection)
        assert numbers == sorted(numbers)
        assert len(numbers) == 600 - stats.dropped


async def test_slow_client_gets_the_latest(redis_site: Site, path: str) -> None:
    """``slow="latest"``: a slow client gets the last message of each key, in order of their last change."""
    rules = [RoomRule("room", slow="latest")]
    node, member = await start(redis_site, path, rules=rules, outbox_bytes=500_000)
    async with stalled(node) as connection:
        await flood(node, range(600), keys=3)
        stats = node.cluster.stats().realtime
        assert stats.dropped > 0
        assert stats.slow == 0
        assert member.connections[0].outbox.waiting_bytes <= 500_000
        numbers = await read_numbers(connection)
        assert numbers == sorted(numbers)
        assert numbers[-3:] == [597, 598, 599]


async def read_numbers(connection: sockets.socket) -> list[int]:
    """The numbers of all messages that arrive, until nothing more does."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while True:
        try:
            data += await asyncio.wait_for(loop.sock_recv(connection, 1 << 20), 0.5)
        except TimeoutError:
            break
    numbers = []
    while data:
        assert data[0] == 0x81
        assert data[1] == 126
        size = int.from_bytes(data[2:4], "big")
        numbers.append(int(data[4:12]))
        del data[: 4 + size]
    return numbers


async def test_large_room_lets_others_run() -> None:
    """The flusher gives the loop back after a slice of time, however many sockets have something to write."""

    class Costly:
        def __init__(self) -> None:
            self.flushed = False

        def flush(self) -> None:
            until = loop.time() + 0.001
            while loop.time() < until:
                pass
            self.flushed = True

    loop = asyncio.get_running_loop()
    flusher = Flusher(loop)
    outboxes = [Costly() for _ in range(200)]
    for outbox in outboxes:
        flusher.add(outbox)  # type: ignore[arg-type]
    turns = 0
    while not all(outbox.flushed for outbox in outboxes):
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 4


async def test_endpoint_joins_what_waits(redis_site: Site, path: str) -> None:
    """Clients of the endpoint may get several pushes in one frame; each arrives once, in order."""
    rule = RoomRule("open", subscribe=True)
    node, _ = await start(redis_site, path, rules=[rule])
    async with node.client() as client:
        await client.call("subscribe", {"channel": "open"})
        for number in range(100):
            await node.cluster.room("open").broadcast(number)
        assert [await client.pub() for _ in range(100)] == list(range(100))


class Unwritable(PreparedMessage):
    """A message that no way to the client can take."""

    @property
    def frame(self) -> bytes:
        raise ValueError("unwritable")

    event = frame  # type: ignore[assignment]


async def test_message_that_cannot_be_written_closes_the_socket(
    lone_site: Site, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that no server should raise closes that socket with 3004, after which clients reconnect, and
    is logged. The other members of the room get the next message.
    """
    node, member = await start(lone_site, path)
    async with node.raw(path="/ws") as client:
        assert await client.ws.recv() == "ready"
        (failing,) = member.connections
        async with node.raw(path="/ws") as other:
            assert await other.ws.recv() == "ready"
            failing.outbox.push(Unwritable(b""))
            assert await client.drained() == (3004, "internal server error")
            deliver(node, "next")
            assert await other.ws.recv() == "next"
    assert "a message could not be written to the WebSocket of user None" in caplog.text


async def test_shared_write_that_fails_closes_one_socket(
    lone_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """One member's transport fails while a large room is written to: each of the others gets every message
    once.
    """
    node, member = await start(lone_site, "direct")
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(node.raw(path="/ws")) for _ in range(12)]
        for client in clients:
            assert await client.ws.recv() == "ready"
        transport = member.connections[5].socket.server.transport
        member.connections[5].socket.server.transport = Broken(transport, [])
        deliver(node, "one")
        deliver(node, "two")
        await eventually(lambda: node.cluster.stats().realtime.rooms and member.connections[5].outbox.closed)
        deliver(node, "three")
        whole = 0
        for client in clients:
            got = []
            with suppress(ConnectionClosed):
                while "three" not in got:
                    got.append(await asyncio.wait_for(client.ws.recv(), 5))
            whole += got == ["one", "two", "three"]
        assert whole == len(clients) - 1
    assert caplog.text.count("a message could not be written to the WebSocket") == 1


class Broken(Recording):
    """A transport whose first write fails."""

    def write(self, data: bytes) -> None:
        if not self._written:
            self._written.append(data)
            raise ValueError("broken")
        self._transport.write(data)
