"""What is wrong is said at the start: where, what, and never the password."""

from __future__ import annotations

import asyncio
import logging
import ssl

import pytest

from asgi_cluster.backends.redis.backend import RedisBackend
from asgi_cluster.exceptions import StoreUnavailable
from loadtest.ports import free_port
from tests.bus.fake import FakeServer
from tests.bus.nodes import opened, our_tasks
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.topologies import SentinelSet


async def refusal(url: str, prefix: str) -> str:
    with pytest.raises(StoreUnavailable) as error:
        async with opened(url, prefix):
            pytest.fail("it opened")
    assert our_tasks() == []
    return str(error.value)


@pytest.mark.quick
async def test_nobody_listens(prefix: str) -> None:
    """The address is named."""
    port = free_port()
    assert f"127.0.0.1:{port}" in await refusal(f"redis://127.0.0.1:{port}", prefix)


async def test_a_server_that_accepts_and_says_nothing(prefix: str) -> None:
    """Opening fails after a second, not never."""
    async with FakeServer({b"HELLO": b""}) as server:
        assert "no answer in time" in await refusal(server.url, prefix)


async def test_sentinel_that_is_late_at_the_start(sentinel_set: SentinelSet, prefix: str) -> None:
    """It may be busy: the start goes on for three seconds, as with a server that is late."""
    sentinel = sentinel_set.sentinels[0]
    async with Proxy(f"redis://127.0.0.1:{sentinel.port}") as proxy:
        proxy.stall("down")
        asyncio.get_running_loop().call_later(1.5, proxy.heal)
        url = f"{proxy.url.replace('redis:', 'redis+sentinel:')}/{sentinel_set.name}"
        async with opened(url, prefix) as node:
            assert node.live


async def test_a_wrong_password(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """It says so, and does not repeat it, nor does any log."""
    caplog.set_level(logging.DEBUG)
    with start_valkey("--requirepass", "right") as server:
        told = await refusal(f"redis://:wr0ng-s3cret@127.0.0.1:{server.port}", prefix)
    assert "password" in told
    assert f"127.0.0.1:{server.port}" in told
    assert "wr0ng-s3cret" not in told + caplog.text


async def test_a_missing_password(prefix: str) -> None:
    """It says so, and not that the server refused one."""
    with start_valkey("--requirepass", "right") as server:
        told = await refusal(f"redis://127.0.0.1:{server.port}", prefix)
        assert "wants a password and was given none (redis://:password@host" in told


async def test_a_database_that_is_not_there(valkey: Server, prefix: str) -> None:
    """The path of the URL is named as what is wrong."""
    told = await refusal(f"redis://127.0.0.1:{valkey.port}/99", prefix)
    assert "no database of the number in the URL's path" in told


async def test_a_database_of_a_cluster_server(prefix: str) -> None:
    """A server of a Redis Cluster has the database 0 only."""
    async with FakeServer({b"SELECT": b"-ERR SELECT is not allowed in cluster mode\r\n"}) as server:
        told = await refusal(f"{server.url.removesuffix('/0')}/1", prefix)
    assert "no database of the number in the URL's path" in told


async def test_a_sentinel_url_for_a_server(valkey: Server, prefix: str) -> None:
    """A server that is no Sentinel is called so."""
    told = await refusal(f"redis+sentinel://127.0.0.1:{valkey.port}/mymaster", prefix)
    assert f"127.0.0.1:{valkey.port}: this is no Sentinel" in told


async def test_another_kind_of_server(prefix: str) -> None:
    """What answers like a web server is called no Redis server."""
    async with FakeServer({b"HELLO": b"HTTP/1.1 400 Bad Request\r\n\r\n"}) as server:
        assert "this is no Redis server" in await refusal(server.url, prefix)


async def test_a_server_that_is_too_old(prefix: str) -> None:
    """Both one that has HELLO and one that does not."""
    async with FakeServer(version="6.0.16") as server:
        assert "too old: Redis 6.2" in await refusal(server.url, prefix)
    async with FakeServer(
        {b"HELLO": b"-ERR unknown command `HELLO`, with args beginning with: `3`\r\n"}
    ) as server:
        assert "too old: Redis 6.2" in await refusal(server.url, prefix)


async def test_a_replica(valkey: Server, prefix: str) -> None:
    """Nothing written there would last."""
    with start_valkey("--replicaof", f"127.0.0.1 {valkey.port}") as replica:
        assert "not a primary" in await refusal(replica.url, prefix)


async def test_a_node_of_a_cluster(prefix: str) -> None:
    """The URL's scheme is named."""
    # Not a free port of the system's choice: a node's second port is 10 000 above.
    with start_valkey("--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        assert "redis+cluster://" in await refusal(server.url, prefix)


@pytest.mark.parametrize(
    ("rights", "told"),
    [
        ("~* +@all resetchannels", "cannot publish session messages"),
        ("~* +@all resetchannels &PREFIX:0:sessions", "cannot publish acknowledgements"),
        ("~* +@all resetchannels &PREFIX:0:sessions &PREFIX:0:node:*", "cannot publish room messages"),
        ("~other:* +@all allchannels", "permission"),
        ("~* +@all -subscribe allchannels", "permission"),
        ("~* +@all -info allchannels", "info"),
    ],
)
async def test_a_right_that_is_missing(prefix: str, rights: str, told: str) -> None:
    """The start fails and says which, instead of the first logout."""
    user = f"worker on >pw {rights.replace('PREFIX', prefix)}".split()
    with start_valkey("--user", *user) as server:
        assert told in await refusal(server.url.replace("//", "//worker:pw@"), prefix)


async def test_a_publisher_does_not_listen(valkey: Server, prefix: str) -> None:
    """``listen=False``: no registration, no subscriber, and publishing reaches those who listen."""
    async with opened(valkey.url, prefix) as node, opened(valkey.url, prefix, listen=False) as publisher:
        await node.room_bus.subscribe("r")
        await publisher.room_bus.publish("r", b"\nm", timeout=1)
        assert set(await publisher.session_bus.nodes(timeout=1)) == {node.id}
        assert publisher.backend.ready


@pytest.mark.quick
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://", "needs a host"),
        ("redis://h:99999", "port"),
        ("redis://h/zero", "database number"),
        ("redis://:s3cret/x@h", "port"),
        ("redis://:1/s3cret@h", "%2F"),
        ("redis://:1?s3cret@h", "%3F"),
        ("redis://h/0?db=x", "'db'"),
        ("redis://h?socket_timeout=3", "socket_timeout"),
        ("redis://h?max_connections=3", "max_connections"),
        ("redis://h?nonsense=3", "nonsense"),
        ("unix://", "path"),
        ("http://h", "scheme"),
        ("redis+sentinel://h:1,h:2", "names the service"),
        ("redis+sentinel://h:1,,h:2/x", "lists its servers"),
        ("redis+sentinel://h:1/x/y", "names the service"),
        ("redis+sentinel://h:1/x?sentinel_port=3", "sentinel_port"),
        ("redis+cluster://h:1/3", "database 0"),
        ("redis+cluster://", "lists its servers"),
        ("redis+other://h", "unknown scheme"),
    ],
)
def test_a_url_that_cannot_work(url: str, told: str) -> None:
    """Refused at construction, saying what is wrong."""
    with pytest.raises(ValueError, match=told) as error:
        RedisBackend(url.replace("//h", "//:s3cret@h"), prefix="p", lease_duration=2)
    assert "s3cret" not in str(error.value)


@pytest.mark.quick
def test_a_password_is_in_no_repr() -> None:
    """Of nothing that holds one."""
    for scheme, tail in (("redis", "h"), ("redis+sentinel", "h:1/x"), ("redis+cluster", "h:1,h:2")):
        backend = RedisBackend(f"{scheme}://user:s3cret@{tail}", prefix="p", lease_duration=2)
        buses = backend.session_bus, backend.room_bus
        held = [backend, *vars(backend).values(), *(value for bus in buses for value in vars(bus).values())]
        assert "s3cret" not in "".join(map(repr, held))


@pytest.mark.quick
def test_credentials_twice() -> None:
    """A provider beside a password is refused, as is an ssl_context without TLS."""
    with pytest.raises(ValueError, match="not both"):
        RedisBackend("redis://:pw@h", prefix="p", lease_duration=2, credential_provider=object())
    context = ssl.create_default_context()
    with pytest.raises(ValueError, match="rediss"):
        RedisBackend("redis://h", prefix="p", lease_duration=2, ssl_context=context)
