"""Leaving without a crowd: SIGTERM spreads the closing of sockets, and a rolling restart loses nothing."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from contextlib import AsyncExitStack, suppress
from time import monotonic
from typing import Any

import psutil
import pytest
import websockets
from starlette.applications import Starlette

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, RealtimeConfig, RoomRule, SessionConfig
from tests.sessions.app import Gate
from tests.support.nodes import Node, serve, serve_process
from tests.support.waiting import eventually

APP = "tests.draining.app:app"


async def connected(node: Node) -> websockets.ClientConnection:
    socket = await websockets.connect(f"{node.ws_url}/realtime/websocket")
    await socket.send('{"id":1,"connect":{}}')
    assert "connect" in json.loads(await socket.recv())
    return socket


async def code_and_time(socket: websockets.ClientConnection) -> tuple[int | None, float]:
    with suppress(websockets.ConnectionClosed):
        while True:
            await socket.recv()
    return socket.close_code, monotonic()


async def test_sigterm_drains_before_the_server_stops(redis_url: str, prefix: str) -> None:
    """With drain=1.0, uvicorn from its command line: 3001 for all clients, spread over the second, requests
    answered meanwhile.
    """
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix, "DRAIN": "1.0"}
    async with serve_process(APP, env=env) as (node,):
        sockets = [await connected(node) for _ in range(20)]
        watching = [asyncio.create_task(code_and_time(socket)) for socket in sockets]
        began = monotonic()
        node.signal(signal.SIGTERM)
        await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        late = await connected_or_code(node)
        assert late == 3001
        ended = [await task for task in watching]
        assert node.process is not None
        await asyncio.to_thread(node.process.wait, 10)
        assert "Traceback" not in node.log()
    assert {code for code, _ in ended} == {3001}
    times = sorted(when - began for _, when in ended)
    assert times[-1] - times[0] > 0.5
    assert sum(when < 0.5 for when in times) > 2


async def connected_or_code(node: Node) -> int | None:
    try:
        socket = await connected(node)
    except websockets.ConnectionClosed as error:
        return error.rcvd.code if error.rcvd is not None else None
    return (await code_and_time(socket))[0]


async def test_second_sigterm_does_not_wait(redis_url: str, prefix: str) -> None:
    """It goes to the server at once, which closes the rest."""
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix, "DRAIN": "30"}
    async with serve_process(APP, env=env) as (node,):
        sockets = [await connected(node) for _ in range(100)]
        watching = [asyncio.create_task(code_and_time(socket)) for socket in sockets]
        node.signal(signal.SIGTERM)
        await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        node.signal(signal.SIGTERM)
        assert {code for code, _ in [await task for task in watching]} == {3001, 1012}
        assert node.process is not None
        await asyncio.to_thread(node.process.wait, 20)


async def test_drain_is_on_and_short_for_a_few(redis_url: str, prefix: str) -> None:
    """Without any configuration: 20 sockets take a second, and none take no time."""
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix}
    async with serve_process(APP, 2, env=env) as (node, idle):
        for served in (node, idle):
            assert served.process is not None
            watching = [
                asyncio.create_task(code_and_time(await connected(served)))
                for _ in range(20 if served is node else 0)
            ]
            served.signal(signal.SIGTERM)
            ended = [await task for task in watching]
            assert {code for code, _ in ended} <= {3001}
            await asyncio.to_thread(served.process.wait, 20)
            assert f"draining {len(watching)} sockets over {len(watching) * 0.05:g} s" in served.log()
            if ended:
                assert max(when for _, when in ended) - min(when for _, when in ended) > 0.5


async def test_ctrl_c_does_not_drain(redis_url: str, prefix: str) -> None:
    """SIGINT is the server's own: all sockets at once."""
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix}
    async with serve_process(APP, env=env) as (node,):
        sockets = [await connected(node) for _ in range(5)]
        node.signal(signal.SIGINT)
        assert {(await code_and_time(socket))[0] for socket in sockets} == {1012}
        assert "draining" not in node.log()


async def test_reload_does_not_wait(redis_url: str, prefix: str) -> None:
    """uvicorn --reload ends its worker with SIGTERM too: a developer's sockets are closed at once."""
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix}
    async with serve_process(APP, env=env, args=("--reload", "--reload-dir", "tests/draining")) as (node,):
        sockets = [await connected(node) for _ in range(20)]
        for child in psutil.Process(node.pid).children():
            if any("spawn_main" in part for part in child.cmdline()):
                child.terminate()
        assert {(await code_and_time(socket))[0] for socket in sockets} == {3001}
        await eventually(lambda: "draining 20 sockets over 0 s" in node.log())


async def test_drain_from_code(cluster_url: str, prefix: str) -> None:
    """``await cluster.drain(seconds)`` closes what is open, turns the node unready, and refuses nonsense."""
    cluster = Cluster(cluster_url, prefix=prefix, sessions=SessionConfig(cookie=CookieConfig(secure=False)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async with serve(ClusterMiddleware(app, cluster)) as node:
        sockets = [await connected(node) for _ in range(5)]
        assert cluster.ready
        with pytest.raises(ValueError, match="at least 0"):
            await cluster.drain(-1)
        await cluster.drain(0.2)
        assert not cluster.ready
        assert {(await code_and_time(socket))[0] for socket in sockets} == {3001}
        await eventually(lambda: cluster.stats().realtime.connections == 0)


async def test_handshake_that_a_drain_overtakes(cluster_url: str, prefix: str) -> None:
    """A socket whose user is still being looked up when the drain begins is closed with 3001 as well."""
    gate = Gate()

    async def identify(scope: Any) -> str:
        await gate.pass_through()
        return "ada"

    cluster = Cluster(cluster_url, prefix=prefix, identify=identify)
    async with serve(ClusterMiddleware(Starlette(), cluster)) as node:
        opening = asyncio.create_task(connected_or_code(node))
        await gate.reached.wait()
        await cluster.drain(0)
        gate.open.set()
        assert await asyncio.wait_for(opening, 10) == 3001


@pytest.mark.parametrize("how", ["signal", "loop"])
@pytest.mark.parametrize("signals", [1, 2])
async def test_sigterm_in_a_server_that_runs_here(prefix: str, how: str, signals: int) -> None:
    """The handler that was there before gets the signal when the sockets are closed; a second signal
    reaches it at once. Other signals are not held back.
    """
    received: list[int] = []
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGTERM)
    if how == "signal":
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    else:
        loop.add_signal_handler(signal.SIGTERM, received.append, signal.SIGTERM)
    loop.add_signal_handler(signal.SIGUSR1, received.append, signal.SIGUSR1)
    try:
        cluster = Cluster(f"memory://{prefix}", realtime=RealtimeConfig(drain=0.5 if signals == 1 else 60.0))
        async with serve(ClusterMiddleware(Starlette(), cluster)) as node:
            sockets = [await connected(node) for _ in range(3)]
            signal.raise_signal(signal.SIGUSR1)
            await eventually(lambda: received == [signal.SIGUSR1])
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)
            if signals == 1:
                assert {(await code_and_time(socket))[0] for socket in sockets} == {3001}
            await eventually(lambda: signal.SIGTERM in received)
            for socket in sockets:
                await socket.close()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGUSR1)
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGUSR1, signal.SIGTERM]


def test_drain_needs_no_handler_of_its_own() -> None:
    """A drain time that makes no sense is refused at construction; 0 and ``None`` turn it off."""
    with pytest.raises(ValueError, match="drain"):
        RealtimeConfig(drain=-1)
    assert not RealtimeConfig(drain=0).drain
    assert RealtimeConfig(drain=None).drain is None


class Reader:
    """A client that keeps its place in a room, and comes back to any node that answers."""

    def __init__(self, nodes: list[Node], room: str) -> None:
        self.nodes = nodes
        self.room = room
        self.seen: list[int] = []
        self.unrecovered = 0
        self.offset = 0
        self.epoch = ""
        self.subscribed = asyncio.Event()

    async def run(self) -> None:
        while True:
            with suppress(OSError, websockets.WebSocketException, asyncio.TimeoutError):
                await self._once(random.choice(self.nodes))
            await asyncio.sleep(random.uniform(0, 0.1))

    async def _once(self, node: Node) -> None:
        async with websockets.connect(f"{node.ws_url}/realtime/websocket", open_timeout=2) as socket:
            subscribe: dict[str, Any] = {"channel": self.room}
            if self.epoch:
                subscribe |= {"recover": True, "offset": self.offset, "epoch": self.epoch}
            await socket.send('{"id":1,"connect":{}}\n' + json.dumps({"id": 2, "subscribe": subscribe}))
            async for frame in socket:
                for line in str(frame).split("\n"):
                    self._take(json.loads(line))
                    if line == "{}":
                        await socket.send("{}")

    def _take(self, reply: dict[str, Any]) -> None:
        if "subscribe" in reply:
            result = reply["subscribe"]
            if self.epoch and not result.get("recovered"):
                self.unrecovered += 1
            for pub in result.get("publications", ()):
                self._pub(pub)
            self.epoch = result["epoch"]
            self.offset = max(self.offset, result.get("offset", 0))
            self.subscribed.set()
        elif "push" in reply and "pub" in reply["push"]:
            self._pub(reply["push"]["pub"])

    def _pub(self, pub: dict[str, Any]) -> None:
        self.offset = pub["offset"]
        self.seen.append(pub["data"])


async def test_rolling_restart_loses_nothing_in_a_room_with_history(redis_url: str, prefix: str) -> None:
    """Three nodes are replaced one after another under load: every reader ends with the whole sequence, in
    order.
    """
    env = {"ASGI_CLUSTER_URL": redis_url, "PREFIX": prefix, "DRAIN": "0.3"}
    rules = [RoomRule("log:{name}", subscribe=True, publish=True, history=10_000, history_ttl=600)]
    publisher = Cluster(redis_url, prefix=prefix, listen=False, realtime=RealtimeConfig(rules=rules))
    async with publisher, serve_process(APP, 3, env=env) as first, asyncio.TaskGroup() as tasks:
        nodes = list(first)
        readers = [Reader(nodes, "log:all") for _ in range(30)]
        running = [tasks.create_task(reader.run()) for reader in readers]
        for reader in readers:
            await asyncio.wait_for(reader.subscribed.wait(), 20)
        published = 0
        done = asyncio.Event()

        async def publish() -> None:
            nonlocal published
            while not done.is_set():
                published += 1
                await publisher.room("log:all").broadcast(published)
                await asyncio.sleep(0.01)

        publishing = tasks.create_task(publish())
        for old in first:
            async with serve_process(APP, env=env) as (new,):
                nodes.append(new)
                nodes.remove(old)
                assert old.process is not None
                old.signal(signal.SIGTERM)
                await asyncio.to_thread(old.process.wait, 15)
                await asyncio.sleep(0.3)
                nodes.append(nodes.pop(0))
                if old is first[-1]:
                    done.set()
                    await publishing
                    await eventually(
                        lambda: all(reader.seen[-1:] == [published] for reader in readers), timeout=10
                    )
                else:
                    nodes.remove(new)
        for task in running:
            task.cancel()
    for reader in readers:
        assert reader.unrecovered == 0
        assert reader.seen == list(range(reader.seen[0], published + 1))
        assert reader.seen[0] == 1


@pytest.mark.parametrize("what", ["the cluster stops meanwhile", "the drain fails"])
async def test_sigterm_that_is_held_back_is_raised_again(
    what: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the drain, the handler that was there before gets the signal, once."""
    taken: list[int] = []
    begun = asyncio.Event()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    try:
        async with Cluster(f"memory://{prefix}", realtime=RealtimeConfig(drain=5.0)) as cluster:

            async def drain(seconds: float) -> None:
                begun.set()
                if what == "the drain fails":
                    raise KeyError("injected")
                await asyncio.Event().wait()

            monkeypatch.setattr(cluster._parts.hub, "drain", drain)
            signal.raise_signal(signal.SIGTERM)
            await asyncio.wait_for(begun.wait(), 10)
            if what == "the drain fails":
                await eventually(lambda: bool(taken))
                assert cluster.started
            else:
                assert taken == []
        assert taken == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


async def test_signals_with_two_clusters_in_one_process(prefix: str) -> None:
    """Other signals reach the loop's handlers once, whichever cluster served a socket last or has stopped;
    SIGTERM reaches the server once.
    """
    taken: list[int] = []
    loop = asyncio.get_running_loop()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    loop.add_signal_handler(signal.SIGUSR1, taken.append, signal.SIGUSR1)
    try:
        async with AsyncExitStack() as stack:
            first = AsyncExitStack()
            nodes = []
            for number, owner in enumerate((first, stack)):
                app = ClusterMiddleware(Starlette(), Cluster(f"memory://{prefix}{number}"))
                nodes.append(await owner.enter_async_context(serve(app)))
            for node in (*nodes, *nodes):
                await (await connected(node)).close()
                signal.raise_signal(signal.SIGUSR1)
                await eventually(lambda: taken == [signal.SIGUSR1])
                taken.clear()
            await first.aclose()
            await (await connected(nodes[1])).close()
            signal.raise_signal(signal.SIGUSR1)
            await eventually(lambda: taken == [signal.SIGUSR1])
            signal.raise_signal(signal.SIGTERM)
            await eventually(lambda: taken == [signal.SIGUSR1, signal.SIGTERM])
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)
        signal.signal(signal.SIGTERM, previous)
