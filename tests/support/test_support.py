"""The test support itself: a fault that does nothing would make every test of faults pass."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import redis.asyncio

from tests.support.nodes import serve, serve_process, several
from tests.support.proxy import Proxy
from tests.support.servers import Server, debian_binary, start_valkey
from tests.support.topologies import start_redis_cluster, start_sentinel_set
from tests.support.waiting import eventually


def client(url: str, timeout: float = 0.3) -> redis.asyncio.Redis:
    retry = redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0)
    return redis.asyncio.Redis.from_url(url, socket_timeout=timeout, retry=retry)


def plain(text: str) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    return app


hello = plain("hello")


def test_server_restarts_empty_and_with_data() -> None:
    """The same port and another process; keys stay only when asked for."""
    with start_valkey() as server, server.client() as first:
        first.set("a", 1)
        before = server.pid
        server.restart(data=True)
        assert first.get("a") == b"1"
        server.restart()
        assert first.get("a") is None
        assert server.pid != before


def test_server_is_gone_after_stop_even_when_paused() -> None:
    """A test that forgets to resume its server leaves nothing behind."""
    server = start_valkey("--requirepass", "secret")
    with server.client() as known:
        assert known.ping()
    server.pause()
    process = server.process
    server.stop()
    assert process is not None
    assert process.poll() is not None
    assert not server.directory.exists()


async def test_proxy_passes_and_cuts(valkey: Server) -> None:
    """Healthy it is transparent; cut, connections end and new ones too, until healed."""
    async with Proxy(valkey.url) as proxy, client(proxy.url) as through:
        assert await through.ping()
        assert proxy.cut() == 1
        with pytest.raises(redis.ConnectionError):
            await through.ping()
        with pytest.raises(redis.ConnectionError):
            await through.ping()
        proxy.heal()
        assert await through.ping()


@pytest.mark.parametrize("fault", ["blackhole", "up", "down"])
async def test_proxy_holds_back(valkey: Server, prefix: str, fault: str) -> None:
    """Nothing comes back while it holds; only a stall on the way down lets the command be executed."""
    async with Proxy(valkey.url) as proxy, client(proxy.url) as through, client(valkey.url) as direct:
        await through.ping()
        proxy.blackhole() if fault == "blackhole" else proxy.stall(fault)  # type: ignore[arg-type]
        with pytest.raises(redis.TimeoutError):
            await through.set(prefix, 1)
        assert (await direct.get(prefix) is not None) == (fault == "down")
        proxy.heal()
        assert await through.ping()


async def test_proxy_swallows_the_reply_and_loses_the_command(valkey: Server, prefix: str) -> None:
    """The caller sees the same; at the server one was executed and the other was not."""
    async with Proxy(valkey.url) as proxy, client(proxy.url) as through, client(valkey.url) as direct:
        await through.ping()
        proxy.swallow(b"INCR")
        with pytest.raises(redis.ConnectionError):
            await through.incr(prefix)
        assert await direct.get(prefix) == b"1"
        proxy.lose(b"INCR")
        with pytest.raises(redis.ConnectionError):
            await through.incr(prefix)
        assert await direct.get(prefix) == b"1"
        assert proxy.swallowed == 2


async def test_proxy_delays_each_chunk_and_keeps_the_order(valkey: Server) -> None:
    """0.1 s each way, and not more for many commands at once."""
    clock = asyncio.get_running_loop().time
    async with Proxy(valkey.url) as proxy, client(proxy.url, timeout=5) as through:
        await through.ping()
        proxy.delay(0.1)
        start = clock()
        async with through.pipeline(transaction=False) as pipe:
            for number in range(200):
                pipe.echo(str(number))
            assert await pipe.execute() == [str(number).encode() for number in range(200)]
        assert 0.2 <= clock() - start < 2


async def test_proxy_hits_only_the_chosen_connection(valkey: Server) -> None:
    """A fault for the connection that said ECHO leaves the other one alone."""
    async with Proxy(valkey.url) as proxy, client(proxy.url) as one, client(proxy.url) as other:
        await one.echo("mark")
        await other.ping()
        proxy.blackhole(only=b"mark")
        assert await other.ping()
        with pytest.raises(redis.TimeoutError):
            await one.ping()


async def test_serve_in_this_loop_and_several() -> None:
    """Real uvicorn, lifespan included."""
    async with serve(hello) as node, httpx.AsyncClient() as http:
        assert (await http.get(node.url)).text == "hello"
    async with several(3, lambda index: plain(f"node {index}")) as nodes, httpx.AsyncClient() as http:
        assert [(await http.get(node.url)).text for node in nodes] == ["node 0", "node 1", "node 2"]


async def test_serve_refused_startup_is_an_error() -> None:
    """An app whose startup fails does not leave the test waiting."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="refused to start"), allow_unwrapped=True):
        async with serve(app):
            pytest.fail("it started")


async def test_serve_process_is_real_and_ends() -> None:
    """Processes of their own, gone afterwards."""
    async with serve_process("tests.support.test_support:hello", 2) as nodes, httpx.AsyncClient() as http:
        for node in nodes:
            assert (await http.get(node.url)).text == "hello"
        nodes[0].kill()
    assert all(node.process is not None and node.process.poll() is not None for node in nodes)


async def test_eventually_says_what_it_saw_last() -> None:
    """The failure names the last answer."""
    with pytest.raises(AssertionError, match="last answer: 0"):
        await eventually(lambda: 0, timeout=0.02)


@pytest.mark.parametrize("binary", ["valkey", "debian"])
async def test_sentinel_set_fails_over(binary: str) -> None:
    """A killed primary is replaced by its replica, with what it had, and the sentinels say so."""
    with start_sentinel_set(
        "--requirepass", "x", down_after=0.5, binary=debian_binary() if binary == "debian" else None
    ) as found:
        old = found.primary
        with old.client() as known:
            known.set("a", 1)
            assert known.wait(1, 1000) == 1
        old.kill()
        new = await eventually(lambda: found.primary if found.primary is not old else None, timeout=30)
        assert new is not None
        with new.client() as known:
            assert known.get("a") == b"1"


async def test_redis_cluster_replaces_a_primary_and_moves_slots() -> None:
    """Keys go along with their slot; after a kill another node owns the dead one's slots."""
    with start_redis_cluster() as cluster:
        assert len(cluster.primaries()) == 3
        slot = cluster.slot("{a}b")
        source = cluster.primary_of(slot)
        with source.client() as known:
            known.set("{a}b", "value")
        target = next(node for node in cluster.primaries() if node is not source)
        cluster.move([slot], target)
        assert cluster.primary_of(slot) is target
        with target.client() as known:
            assert known.get("{a}b") == b"value"
        heir = cluster.replica_of(target)
        target.kill()
        await eventually(lambda: cluster.primary_of(slot) is heir, timeout=20)
        cluster.wait_ok()
