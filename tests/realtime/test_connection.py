"""The app's own sockets: accepted by the cluster, or knowing nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_cluster import Cluster, Connection, RoomRule
from asgi_cluster.backends.memory.history import MemoryHistory
from asgi_cluster.backends.memory.presence import MemoryPresence
from tests.realtime.conftest import sign_in
from tests.realtime.site import Node, Raw, Site
from tests.support.waiting import eventually

UVICORN = ["websockets-sansio", "websockets", "wsproto"]


def cluster_of(websocket: WebSocket) -> Cluster:
    """The cluster of the node that serves it (``Site.node``)."""
    cluster: Cluster = websocket.app.state.cluster
    return cluster


async def chat(websocket: WebSocket) -> None:
    cluster = cluster_of(websocket)
    async with cluster.accept(websocket) as connection:
        await connection.join("chat")
        await connection.send("ready")
        async for message in connection:
            await cluster.room("chat").broadcast(message, exclude=connection)


CHAT = WebSocketRoute("/chat", chat)


async def test_messages_travel_bare(site: Site) -> None:
    """Text stays text, bytes stay bytes, JSON values go as JSON text, on every node, without envelope."""
    first, second = await site.node(routes=[CHAT]), await site.node(routes=[CHAT])
    async with first.raw(path="/chat") as ada, second.raw(path="/chat") as bob:
        assert [await ada.ws.recv(), await bob.ws.recv()] == ["ready", "ready"]
        await ada.ws.send("hallo")
        assert await bob.ws.recv() == "hallo"
        await ada.ws.send(b"\x00\xff")
        assert await bob.ws.recv() == b"\x00\xff"
        await first.cluster.room("chat").broadcast({"n": [1, None]})
        assert await bob.ws.recv() == '{"n":[1,null]}'
        assert await ada.ws.recv() == '{"n":[1,null]}'  # and nothing of its own before it


async def test_room_mixes_clients_and_sockets(site: Site) -> None:
    """The same room reaches both kinds, each in its own form; a client's string arrives bare."""
    node = await site.node(routes=[CHAT], rules=[RoomRule("chat", subscribe=True, publish=True)])
    async with node.raw(path="/chat") as own, node.client() as client:
        assert await own.ws.recv() == "ready"
        await client.call("subscribe", {"channel": "chat"})
        await client.call("publish", {"channel": "chat", "data": "hallo"})
        assert await own.ws.recv() == "hallo"
        assert await client.pub() == "hallo"
        await own.ws.send("text")
        assert await client.pub() == "text"


async def test_leaving_the_body_closes(lone_site: Site) -> None:
    """The end of ``async with`` closes with 1000 after what was sent, and nothing of the socket is left."""

    async def greet(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket, subprotocol="greet") as connection:
            await connection.join("chat")
            await connection.send("bye")

    node = await lone_site.node(routes=[WebSocketRoute("/greet", greet)])
    async with node.raw(path="/greet", subprotocols=["greet"]) as client:
        assert client.ws.subprotocol == "greet"
        assert await client.ws.recv() == "bye"
        assert await client.closed() == (1000, "")
    await eventually(lambda: node.cluster.stats().realtime.connections == 0)
    assert node.cluster.stats().realtime.rooms == 0


async def test_body_fails(lone_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in the body closes with 1011 and goes on to the server."""

    async def fail(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket):
            raise ZeroDivisionError

    node = await lone_site.node(routes=[WebSocketRoute("/fail", fail)])
    async with node.raw(path="/fail") as client:
        assert await client.closed() == (1011, "internal error")
    await eventually(lambda: "ZeroDivisionError" in caplog.text)


async def test_accept_without_middleware() -> None:
    """Without the middleware ``accept`` says what to do."""
    with pytest.raises(RuntimeError, match="ClusterMiddleware"):
        async with Cluster("memory://").accept(({"type": "websocket"}, None, None)):
            pass
    with pytest.raises(TypeError, match="WebSocket"):
        async with Cluster("memory://").accept(object()):
            pass


async def test_accept_twice(lone_site: Site) -> None:
    """A WebSocket that the app has accepted is taken over; a second time is an error."""
    raised: list[BaseException] = []

    async def serve(websocket: WebSocket) -> None:
        await websocket.accept()
        cluster = cluster_of(websocket)
        async with cluster.accept(websocket, user_id="ada") as connection:
            try:
                async with cluster.accept(websocket):
                    pass
            except RuntimeError as error:
                raised.append(error)
            await cluster.user("ada").send({"id": connection.user_id})
            async for _ in connection:
                pass

    node = await lone_site.node(routes=[WebSocketRoute("/ws", serve)])
    async with node.raw(path="/ws") as client:
        assert await client.ws.recv() == '{"id":"ada"}'
    assert len(raised) == 1


async def test_nobody_iterates(lone_site: Site) -> None:
    """A body that never reads still learns of the disconnect: its input is drained, its rooms are left."""
    state: dict[str, Any] = {}
    done = asyncio.Event()

    async def deaf(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket) as connection:
            await connection.join("chat")
            state["connection"] = connection
            await done.wait()

    node = await lone_site.node(routes=[WebSocketRoute("/deaf", deaf)])
    async with node.raw(path="/deaf") as client:
        await eventually(lambda: "connection" in state)
        for number in range(200):
            await client.ws.send(str(number))
        await client.ws.ping()  # answered only when what came before it was read
    connection: Connection = state["connection"]
    await eventually(lambda: node.cluster.stats().realtime.rooms == 0)
    with pytest.raises(OSError, match="closed"):
        await connection.send("too late")
    done.set()


async def test_slow_body_loses_nothing(lone_site: Site) -> None:
    """A body that iterates, slowly, gets every message in order: the queue fills, the server waits."""
    got: list[str | bytes] = []

    async def slow(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket) as connection:
            async for message in connection:
                got.append(message)
                if len(got) == 1:
                    await asyncio.sleep(1.5)  # longer than a second: the pump takes over

    node = await lone_site.node(routes=[WebSocketRoute("/slow", slow)])
    async with node.raw(path="/slow") as client:
        for number in range(300):
            await client.ws.send(str(number))
        await eventually(lambda: len(got) == 300)
    assert got == [str(number) for number in range(300)]


def handler(kind: str) -> Callable[[WebSocket], Any]:
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_text(await websocket.receive_text())

    async def catch(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect as disconnect:
            websocket.app.state.seen = (disconnect.code, disconnect.reason)

    async def pour(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_text("more")
            await asyncio.sleep(0.001)

    return {"echo": echo, "catch": catch, "pour": pour}[kind]


@pytest.mark.parametrize("ws", UVICORN)
@pytest.mark.parametrize("kind", ["echo", "catch", "pour"])
@pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")
async def test_logout_closes_foreign_socket(
    site: Site, ws: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A socket of an app that knows nothing of us closes with 4501 on every node, without a traceback."""
    route = WebSocketRoute("/ws", handler(kind))
    nodes = [await site.node(routes=[route], server={"ws": ws}) for _ in range(2)]
    cookie = await sign_in(nodes[0], "ada")
    async with nodes[0].raw(cookie, path="/ws") as here, nodes[1].raw(cookie, path="/ws") as there:
        await eventually(lambda: sum(node.cluster.stats().realtime.connections for node in nodes) == 2)
        # A client that does not read what is poured into it does not answer a close either.
        closes = [asyncio.ensure_future(client.drained()) for client in (here, there)]
        async with httpx.AsyncClient(base_url=nodes[0].http, headers={"cookie": cookie}) as http:
            assert (await http.get("/logout")).json() == {"closed": 2, "complete": True}
        assert await asyncio.gather(*closes) == [(4501, "logged out")] * 2
    await eventually(lambda: not any(node.cluster.stats().realtime.connections for node in nodes))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_send_to_people(site: Site) -> None:
    """``user.send`` and ``session.send`` reach exactly their sockets, on every node, in each socket's
    form.
    """
    first, second = await site.node(routes=[CHAT]), await site.node(routes=[CHAT])
    ada, bob = await sign_in(first, "ada"), await sign_in(first, "bob")
    async with (
        first.client(ada) as client,
        second.raw(ada, path="/chat") as own,
        second.client(bob) as other,
    ):
        assert await own.ws.recv() == "ready"
        await first.cluster.user("ada").send({"n": 1})
        assert await client.push() == {"message": {"data": {"n": 1}}}
        assert await own.ws.recv() == '{"n":1}'
        await first.cluster.user("bob").send("for bob")
        assert await other.push() == {"message": {"data": "for bob"}}
        await first.cluster.user("ada").disconnect()
        assert (await client.closed())[0] == 3503
        assert (await own.closed())[0] == 3503
        assert "rpc" not in await other.call("rpc", {"method": "x"})


@pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")
@pytest.mark.parametrize("ws", UVICORN)
async def test_leaving_the_body_does_not_wait_for_a_client_that_does_not_read(
    lone_site: Site, ws: str
) -> None:
    """After ``close_timeout`` the connection is cut, however much waits for the client."""
    left: list[float] = []

    async def pour(websocket: WebSocket) -> None:
        clock = asyncio.get_running_loop().time
        began = 0.0
        async with cluster_of(websocket).accept(websocket) as connection:
            for _ in range(4):
                await connection.send("x" * 5_000_000)
            await connection.socket.loop.run_in_executor(None, lambda: None)  # and they are written
            began = clock()
        left.append(clock() - began)

    node = await lone_site.node(
        routes=[WebSocketRoute("/pour", pour)],
        server={"ws": ws},
        close_timeout=0.3,
        outbox_bytes=1 << 26,
    )
    async with node.raw(path="/pour", max_size=None, max_queue=1) as client:
        client.ws.transport.pause_reading()
        await eventually(lambda: left, timeout=10)
        await eventually(lambda: node.cluster.stats().realtime.connections == 0)
        client.ws.transport.abort()
    assert left[0] < 5


class Held:
    """Holds the calls of one method of a class: each waits, ``before`` its work or after it."""

    def __init__(self, patch: pytest.MonkeyPatch, of: type, method: str, *, before: bool = False) -> None:
        self.waiting = asyncio.Event()
        self.go_on = asyncio.Event()
        real = getattr(of, method)

        async def held(*args: Any, **options: Any) -> Any:
            found = None if before else await real(*args, **options)
            self.waiting.set()
            await self.go_on.wait()
            return await real(*args, **options) if before else found

        patch.setattr(of, method, held)


SHOWN = RoomRule("shown", presence=True, history=5)


def kept_open(held: list[Connection]) -> WebSocketRoute:
    async def keep(websocket: WebSocket) -> None:
        async with cluster_of(websocket).accept(websocket) as connection:
            held.append(connection)
            async for message in connection:
                if message == "leave the body":
                    return

    return WebSocketRoute("/keep", keep)


@asynccontextmanager
async def connected(site: Site) -> AsyncIterator[tuple[Node, Raw, Connection]]:
    """A node with the rule ``SHOWN``, a client of its ``/keep``, and that client's connection."""
    found: list[Connection] = []
    node = await site.node(routes=[kept_open(found)], rules=[SHOWN])
    async with node.raw(path="/keep") as client:
        await eventually(lambda: found)
        yield node, client, found[0]


@pytest.mark.parametrize("end", ["client", "app"])
async def test_join_of_a_connection_that_ends_meanwhile(
    lone_site: Site, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """``join`` raises when the connection is over, before or during it, and leaves no presence."""
    async with connected(lone_site) as (node, client, connection):
        held = Held(monkeypatch, MemoryPresence, "enter")
        joining = asyncio.create_task(connection.join("shown"))
        await held.waiting.wait()
        await (client.ws.close() if end == "client" else client.ws.send("leave the body"))
        await eventually(lambda: node.cluster.stats().realtime.connections == 0)
        held.go_on.set()
        with pytest.raises(OSError, match="closed"):
            await joining
    room = node.cluster.room("shown")
    assert await room.presence() == []
    with pytest.raises(OSError, match="closed"):
        await connection.join("shown")
    assert await room.presence() == []
    assert node.cluster.stats().realtime.rooms == 0


async def test_leave_during_a_join(lone_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``leave`` that is called while a ``join`` waits comes after it: no member, and no presence."""
    async with connected(lone_site) as (node, _, connection), asyncio.TaskGroup() as tasks:
        held = Held(monkeypatch, MemoryHistory, "read")
        joining = tasks.create_task(connection.join("shown"))
        await held.waiting.wait()
        leaving = tasks.create_task(connection.leave("shown"))
        await asyncio.sleep(0)  # it has begun
        held.go_on.set()
        await asyncio.wait([joining, leaving])
        assert not connection.rooms
        assert await node.cluster.room("shown").presence() == []
        assert node.cluster.stats().realtime.rooms == 0


async def test_join_during_a_leave(lone_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``join`` that is called while a ``leave`` waits comes after it: a member, with presence."""
    async with connected(lone_site) as (node, _, connection), asyncio.TaskGroup() as tasks:
        await connection.join("shown")
        held = Held(monkeypatch, MemoryPresence, "leave", before=True)
        leaving = tasks.create_task(connection.leave("shown"))
        await held.waiting.wait()
        joining = tasks.create_task(connection.join("shown"))
        await asyncio.sleep(0)  # it has begun
        held.go_on.set()
        await asyncio.wait([joining, leaving])
        assert set(connection.rooms) == {"shown"}
        assert [member.connection_id for member in await node.cluster.room("shown").presence()] == [
            connection.id
        ]
