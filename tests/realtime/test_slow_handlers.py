"""A handler that takes its time: the rest of its connection goes on, in order where order counts."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from asgi_cluster import Connection, ConnectRequest, RoomRequest, RoomRule
from asgi_cluster.rooms.rules import Connected
from tests.realtime.site import Site
from tests.support.waiting import eventually


class Gate:
    """A hook that waits until it is opened, and counts."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.entered = 0
        self.left: list[str] = []

    async def wait(self) -> None:
        self.entered += 1
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.left.append("cancelled")
            raise
        self.left.append("done")

    async def wait_cancelled_or_not(self) -> None:
        while not self.open.is_set():
            with suppress(asyncio.CancelledError):
                await self.wait()

    async def rule(self, request: RoomRequest) -> bool:
        if request.data == "slow":
            await self.wait()
        return True

    async def rpc(self, connection: Connection, data: Any) -> Any:
        await self.wait()
        return data


@pytest.fixture
def gate() -> Gate:
    return Gate()


SLOW: dict[str, dict[str, Any]] = {
    "rpc": {"method": "slow"},
    "subscribe": {"channel": "room:slow", "data": "slow"},
    "publish": {"channel": "room:slow", "data": "slow"},
}


@pytest.mark.parametrize("name", [*SLOW, "send"])
async def test_slow_handler(site: Site, gate: Gate, name: str) -> None:
    """While a handler waits, pings are answered, commands of other rooms run, and publications arrive."""
    node = await site.node(
        rules=[RoomRule("room:{name}", subscribe=gate.rule, publish=gate.rule)],
        rpc={"slow": gate.rpc, "fast": lambda connection, data: data},
        on_message=gate.rpc,
        ping_interval=1,
        pong_timeout=0.9,
    )
    async with node.client() as client:
        await client.send({"send": {"data": 1}} if name == "send" else {"id": 50, name: SLOW[name]})
        await eventually(lambda: gate.entered == 1)
        assert "rpc" in await client.call("rpc", {"method": "fast"})
        assert "subscribe" in await client.call("subscribe", {"channel": "room:a"})
        pings = 0
        async for frame in client.ws:
            await client.ws.send("{}")
            assert frame == "{}"
            pings += 1
            if pings == 2:  # the second one comes only when the first was answered in time
                break
        await node.cluster.room("room:a").broadcast("here")
        assert await client.pub() == "here"
        assert 50 not in client.replies
        gate.open.set()
        if name != "send":
            assert name in await client.reply(50)
        await eventually(lambda: gate.left == ["done"])


async def test_order_in_a_room(site: Site, gate: Gate) -> None:
    """Commands of one room, publications of one client and its messages keep their order."""
    heard: list[Any] = []

    async def message(connection: Connection, data: Any) -> None:
        if data == "slow":
            await gate.wait()
        heard.append(data)

    rule = RoomRule("room:{name}", subscribe=gate.rule, publish=gate.rule, history=10)
    node = await site.node(rules=[rule], on_message=message)
    async with node.client() as client, node.client() as other:
        for room in ("room:a", "room:b"):
            await other.call("subscribe", {"channel": room})
        await client.send(
            {"id": 11, "subscribe": {"channel": "room:a", "data": "slow"}},
            {"id": 12, "publish": {"channel": "room:a", "data": 1}},
            {"id": 13, "publish": {"channel": "room:b", "data": 2}},
            {"id": 14, "history": {"channel": "room:a", "limit": -1}},
            {"id": 15, "unsubscribe": {"channel": "room:a"}},
            {"id": 16, "publish": {"channel": "room:a", "data": 3}},
            {"id": 17, "subscribe": {"channel": "room:c"}},
            {"send": {"data": "slow"}},
            {"send": {"data": "second"}},
        )
        assert "subscribe" in await client.reply(17)
        await eventually(lambda: gate.entered == 2)
        assert not heard
        assert set(client.replies) == set()
        gate.open.set()
        assert "subscribe" in await client.reply(11)
        assert (await client.reply(14))["history"]["publications"][0]["data"] == 1
        assert "unsubscribe" in await client.reply(15)
        assert "publish" in await client.reply(16)
        # The other client: this one may have left the room before its publication came back.
        published = [await other.pub() for _ in range(3)]
        assert sorted(published) == [1, 2, 3]
        assert published.index(1) < published.index(3)
        found = (await node.cluster.room("room:a").history()).publications
        assert [publication.data for publication in found] == [1, 3]
        await eventually(lambda: heard == ["slow", "second"])


@pytest.mark.parametrize("server", ["websockets-sansio", "wsproto"])
async def test_bounded(lone_site: Site, gate: Gate, server: str) -> None:
    """16 commands of one client are under way at most. It is not read meanwhile, and not closed because its
    pongs are not read either; another client is served.
    """
    node = await lone_site.node(
        rpc={"slow": gate.rpc, "fast": lambda connection, data: data},
        ping_interval=1,
        pong_timeout=0.9,
        server={"ws": server},
    )
    async with node.client() as client:
        await client.send(*({"id": number, "rpc": {"method": "slow"}} for number in range(10, 50)))
        await eventually(lambda: gate.entered == 16)
        for _ in range(2):  # the second one comes only when no pong to the first was missed
            assert await client.ws.recv() == "{}"
            await client.ws.send("{}")
        async with node.client() as other:
            assert "rpc" in await other.call("rpc", {"method": "fast"})
        assert gate.entered == 16
        gate.open.set()
        for number in range(10, 50):
            assert "rpc" in await client.reply(number)


@pytest.mark.parametrize("gone", ["closed", "cut", "logged out"])
@pytest.mark.parametrize("count", [1, 40])
async def test_client_goes_while_a_handler_waits(
    lone_site: Site, gate: Gate, gone: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What its client waits for is cancelled when the client is gone; nothing of it stays."""
    disconnects: list[int] = []
    node = await lone_site.node(
        rules=[RoomRule("room:{name}", subscribe=gate.rule, presence=True)],
        rpc={"slow": gate.rpc},
        on_disconnect=lambda connection, code, reason: disconnects.append(code),
        close_timeout=0.2,
        ping_interval=0.5,  # what finds out about a client that is not read
        pong_timeout=0.45,
        cluster={"identify": lambda scope: "ada"},
    )
    async with node.client() as client:
        await client.call("subscribe", {"channel": "room:here"})
        await client.send(
            *({"id": n, "subscribe": {"channel": f"room:{n}", "data": "slow"}} for n in range(10, 10 + count))
        )
        await eventually(lambda: gate.entered == min(count, 16))
        if gone == "closed":
            await client.ws.close(1000)
        elif gone == "cut":
            client.ws.transport.abort()
        else:
            await node.cluster.user("ada").disconnect()
        await eventually(lambda: node.cluster.stats().realtime.connections == 0)
    assert gate.left == ["cancelled"] * min(count, 16)
    assert len(disconnects) == 1
    assert node.cluster.stats().realtime.rooms == 0
    assert not await node.cluster.room("room:here").presence()
    assert not [record for record in caplog.records if record.name.startswith("asgi_cluster")]


async def test_presence_ends_while_a_handler_goes_on(site: Site, gate: Gate) -> None:
    """A client that is gone is in no room and counts against no limit, also while a handler of it runs; and
    it enters no room afterwards, whatever that handler does.
    """
    rejoined = asyncio.Event()
    finish = asyncio.Event()

    async def stubborn(connection: Connection, data: Any) -> None:
        await gate.wait_cancelled_or_not()
        await connection.join("room:late")
        rejoined.set()
        await finish.wait()

    node = await site.node(
        rules=[RoomRule("room:{name}", subscribe=True, presence=True)],
        rpc={"slow": stubborn},
        max_connections_per_user=1,
        close_timeout=30,
        cluster={"identify": lambda scope: "ada"},
    )
    async with node.client() as client:
        await client.call("subscribe", {"channel": "room:here"})
        await client.send({"id": 50, "rpc": {"method": "slow"}})
        await eventually(lambda: gate.entered == 1)
        assert await node.cluster.room("room:here").presence()

    async def left() -> bool:
        return not await node.cluster.room("room:here").presence()

    try:
        await eventually(left)
        assert not gate.left
        assert node.cluster.stats().realtime.rooms == 0
        async with node.raw() as other:
            assert "connect" in await other.call("connect", {})
        gate.open.set()
        await asyncio.wait_for(rejoined.wait(), 5)
        assert node.cluster.stats().realtime.rooms == 0
        assert not await node.cluster.room("room:late").presence()
    finally:
        gate.open.set()
        finish.set()
    await eventually(lambda: node.cluster.stats().realtime.connections == 0)


async def test_publication_outlives_its_client(site: Site) -> None:
    """What a client published before it left is published, also when its rule takes a moment."""

    async def slowly(request: RoomRequest) -> bool:
        for _ in range(5):
            await asyncio.sleep(0)
        return True

    node = await site.node(rules=[RoomRule("room", subscribe=True, publish=slowly)])
    async with node.client() as other:
        await other.call("subscribe", {"channel": "room"})
        async with node.client() as client:
            await client.send(*({"id": n, "publish": {"channel": "room", "data": n}} for n in range(10, 20)))
        assert [await other.pub() for _ in range(10)] == list(range(10, 20))


async def test_cancellation_ignored(lone_site: Site, caplog: pytest.LogCaptureFixture, gate: Gate) -> None:
    """A handler that swallows its cancellation does not keep its connection here for ever, and is named."""

    async def stubborn(connection: Connection, data: Any) -> None:
        await gate.wait_cancelled_or_not()

    node = await lone_site.node(rpc={"slow": stubborn}, close_timeout=0.1)
    async with node.client() as client:
        await client.send({"id": 5, "rpc": {"method": "slow"}})
        await eventually(lambda: gate.entered == 1)
    await eventually(lambda: node.cluster.stats().realtime.connections == 0)
    assert "goes on although its client is gone" in caplog.text
    gate.open.set()


async def test_slow_connect_hook(site: Site, gate: Gate) -> None:
    """A connect hook that waits: no ping before the reply; what was sent behind it waits for it, and is
    served then.
    """

    async def connect(request: ConnectRequest) -> Connected:
        if request.data == "slow":
            await gate.wait()
        return Connected(user_id="ada")

    rule = RoomRule("room:{name}", subscribe=lambda request: request.connection.user_id == "ada")
    node = await site.node(connect=connect, rules=[rule], ping_interval=1, pong_timeout=0.9)
    async with node.raw() as client, node.client() as other:
        subscribes = [{"id": n, "subscribe": {"channel": f"room:{n}"}} for n in range(2, 40)]
        await client.send({"id": 1, "connect": {"data": "slow"}}, *subscribes)
        await eventually(lambda: gate.entered == 1)
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(client.ws.recv())
            for _ in range(2):  # between these two, an interval of pings passes
                assert await other.ws.recv() == "{}"
                await other.ws.send("{}")
            gate.open.set()
        assert '"connect"' in str(first.result())
        for n in range(2, 40):
            assert "subscribe" in await client.reply(n)


@pytest.mark.parametrize("behind", [0, 40])
async def test_connect_hook_that_never_ends(lone_site: Site, gate: Gate, behind: int) -> None:
    """The connect timeout holds for a hook that waits, also with a full queue behind it: 3502, and the hook
    is cancelled.
    """

    async def connect(request: ConnectRequest) -> str:
        await gate.wait()
        return "ada"

    node = await lone_site.node(connect=connect, connect_timeout=0.2, close_timeout=0.2)
    async with node.raw() as client:
        await client.send({"id": 1, "connect": {}}, *({"id": n, "ping": {}} for n in range(2, 2 + behind)))
        assert await client.drained() == (3502, "stale")
        await eventually(lambda: node.cluster.stats().realtime.connections == 0)
        assert gate.left == ["cancelled"]


async def test_idle_client_has_no_task(lone_site: Site) -> None:
    """A client that waits for nothing has no task beside its server's, and a call that does not wait is
    answered without one.
    """
    node = await lone_site.node(
        rules=[RoomRule("room", subscribe=True)], rpc={"fast": lambda connection, data: data}
    )
    async with node.client() as client:
        await client.call("subscribe", {"channel": "room"})
        await eventually(lambda: not [task for task in asyncio.all_tasks() if "command" in task.get_name()])
        made: list[Any] = []
        loop = asyncio.get_running_loop()

        def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
            made.append(work)
            return asyncio.Task(work, loop=loop, **options)

        await client.send({"id": 70, "rpc": {"method": "fast", "data": 1}}, {"id": 71, "ping": {}})
        loop.set_task_factory(factory)
        try:
            frames = [await client.ws.recv()]
        finally:
            loop.set_task_factory(None)
        assert frames
        assert not [work for work in made if "asgi_cluster" in work.cr_code.co_filename]
