"""Everything that rooms offer, with the rooms on a server of their own: plain, with TLS and users, and when
it is the server of the sessions after all.
"""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import pytest
import redis
from redis.credentials import UsernamePasswordCredentialProvider

from asgi_cluster import BusUnavailable, Cluster, RealtimeConfig, RoomRule
from loadtest.ports import free_port
from tests.realtime.conftest import sign_in
from tests.realtime.site import Node, Site
from tests.support.machine import LOCAL, end, self_signed, spawn
from tests.support.proxy import Proxy
from tests.support.servers import debian_binary, start_valkey
from tests.support.waiting import eventually

KEPT = RoomRule("kept:{name}", subscribe=True, publish=True, history=5, presence=True, join_leave=True)
_DEAD = 15.0  # seconds, on a busy machine: a node counts as dead after four


class Apart:
    """Two servers: ``urls`` of sessions and rooms, and what ``Cluster`` needs to reach them."""

    def __init__(self, urls: tuple[str, str], options: dict[str, Any], rooms: redis.Redis) -> None:
        self.urls = urls
        self.options = options
        self.rooms = rooms


@pytest.fixture(scope="module")
def plain() -> Iterator[Apart]:
    with start_valkey() as sessions, start_valkey() as rooms, rooms.client() as client:
        yield Apart((sessions.url, rooms.url), {}, client)


@pytest.fixture(scope="module")
def same() -> Iterator[Apart]:
    """One server, as ``url`` and as ``rooms_url``."""
    with start_valkey() as server, server.client() as client:
        yield Apart((server.url, server.url), {}, client)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Debian's redis-server, TLS only, and the user ``worker`` (the embedded Valkey is built without TLS)."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = self_signed(directory, f"IP:{LOCAL}")
    urls: list[str] = []
    with ExitStack() as stack:
        for name in ("sessions", "rooms"):
            port = free_port()
            home = directory / name
            home.mkdir()
            command = [debian_binary(), "--port", "0", "--tls-port", str(port), "--bind", LOCAL, "--save", ""]
            command += ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no"]
            command += ["--user", "worker", "on", ">pw", "~*", "&*", "+@all", "--user", "default", "off"]
            stack.callback(end, spawn([*command, "--dir", str(home)], log=subprocess.DEVNULL))
            urls.append(f"rediss://{LOCAL}:{port}/0")
        context = ssl.create_default_context(cafile=certificate)
        rooms = redis.Redis.from_url(
            urls[1], username="worker", password="pw", ssl_ca_certs=certificate, retry_on_timeout=True
        )
        stack.callback(rooms.close)
        provider = UsernamePasswordCredentialProvider("worker", "pw")
        options = {"ssl_context": context, "credential_provider": provider}
        yield Apart((urls[0], urls[1]), options, rooms)


@pytest.fixture(params=["plain", "secured", "same"])
async def apart(request: pytest.FixtureRequest) -> Apart:
    found: Apart = request.getfixturevalue(request.param)

    def answers() -> bool:
        try:
            return bool(found.rooms.ping())
        except redis.ConnectionError:
            return False

    await eventually(answers, timeout=15)
    return found


@pytest.fixture
async def apart_site(apart: Apart, prefix: str) -> Any:
    async with AsyncExitStack() as stack:
        yield Site(apart.urls[0], prefix, stack)


async def start(site: Site, apart: Apart, **realtime: Any) -> Node:
    return await site.node(cluster={"rooms_url": apart.urls[1], **apart.options}, **realtime)


async def present(node: Node, room: str = "kept:a") -> set[str | None]:
    return {member.user_id for member in await node.cluster.room(room).presence()}


async def eventually_present(node: Node, users: set[str]) -> None:
    async def there() -> bool:
        try:
            return await present(node) == users
        except BusUnavailable:  # the machine is busy
            return False

    await eventually(there, timeout=_DEAD, interval=0.1)


async def test_presence_and_joins_with_rooms_apart(apart: Apart, apart_site: Site) -> None:
    """Both nodes show who is there, stats count them, and members are told who comes and goes."""
    one, two = await start(apart_site, apart, rules=[KEPT]), await start(apart_site, apart, rules=[KEPT])
    ada, bob = await sign_in(one, "ada"), await sign_in(two, "bob")
    async with one.client(ada) as first:
        await first.call("subscribe", {"channel": "kept:a"})
        assert (await first.push())["join"]["info"]["user"] == "ada"
        async with two.client(bob) as second:
            await second.call("subscribe", {"channel": "kept:a"})
            assert (await first.push())["join"]["info"]["user"] == "bob"
            for node in (one, two):
                assert await present(node) == {"ada", "bob"}
            stats = await second.call("presence_stats", {"channel": "kept:a"})
            assert stats["presence_stats"] == {"num_clients": 2, "num_users": 2}
            await two.cluster.room("kept:a").broadcast({"n": 1})
            assert (await first.push())["pub"]["data"] == {"n": 1}
        assert (await first.push())["leave"]["info"]["user"] == "bob"
        assert await present(one) == await present(two) == {"ada"}
    assert apart.rooms.exists(f"{apart_site.prefix}:{{room:kept:a}}:log")


async def test_presence_with_rooms_apart_is_not_tidied_away(
    apart: Apart, apart_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking at a room removes nothing that belongs to a living node."""
    monkeypatch.setattr("asgi_cluster.backends.redis.presence._UNREGISTERED_FOR", 0.0)
    node = await start(apart_site, apart, rules=[KEPT])
    async with node.client(await sign_in(node, "ada")) as client:
        await client.call("subscribe", {"channel": "kept:a"})
        for _ in range(3):
            assert await present(node) == {"ada"}
        assert apart.rooms.hlen(f"{apart_site.prefix}:{{room:kept:a}}:in") == 1


async def test_connection_limits_with_rooms_apart(apart: Apart, apart_site: Site) -> None:
    """One connection too many of a user, anywhere in the cluster, is refused."""
    limit = {"max_connections_per_user": 2}
    one, two = await start(apart_site, apart, **limit), await start(apart_site, apart, **limit)
    ada = await sign_in(one, "ada")
    async with one.client(ada), two.client(ada), one.raw(ada) as third:
        await third.send({"id": 1, "connect": {}})
        assert await third.closed() == (3504, "connection limit")


async def test_dead_node_with_rooms_apart(apart: Apart, apart_site: Site) -> None:
    """Its people are taken out of its rooms by a living node, which tells the members and no others."""
    living = await start(apart_site, apart, rules=[KEPT])
    async with Proxy(apart.urls[0]) as sessions, Proxy(apart.urls[1]) as rooms, AsyncExitStack() as stack:
        behind = Apart((sessions.url, rooms.url), apart.options, apart.rooms)
        doomed = await start(Site(sessions.url, apart_site.prefix, stack), behind, rules=[KEPT])
        async with (
            living.client(await sign_in(living, "ada")) as member,
            doomed.client(await sign_in(doomed, "bob")) as client,
        ):
            await member.call("subscribe", {"channel": "kept:a"})
            await client.call("subscribe", {"channel": "kept:a"})
            assert [(await member.push())["join"]["info"]["user"] for _ in range(2)] == ["ada", "bob"]
            for proxy in (sessions, rooms):
                proxy.cut()
            await eventually_present(living, {"ada"})
            await eventually(
                lambda: apart.rooms.hlen(f"{apart_site.prefix}:{{room:kept:a}}:in") == 1, timeout=_DEAD
            )
            await living.cluster.room("kept:a").broadcast("sentinel")
            assert (await member.push())["leave"]["info"]["user"] == "bob"
            assert (await member.push())["pub"]["data"] == "sentinel"
            for proxy in (sessions, rooms):
                proxy.heal()
            await eventually_present(living, {"ada", "bob"})


async def test_publisher_with_rooms_apart(apart: Apart, apart_site: Site) -> None:
    """A worker that does not listen sees presence and history, and reaches the members."""
    node = await start(apart_site, apart, rules=[KEPT])
    async with node.client(await sign_in(node, "ada")) as client:
        await client.call("subscribe", {"channel": "kept:a"})
        await client.push()
        worker = Cluster(
            apart.urls[0],
            rooms_url=apart.urls[1],
            prefix=apart_site.prefix,
            listen=False,
            realtime=RealtimeConfig(rules=[KEPT]),
            **apart.options,
        )
        async with worker:
            await worker.room("kept:a").broadcast("from a worker")
            assert (await client.push())["pub"]["data"] == "from a worker"
            assert [member.user_id for member in await worker.room("kept:a").presence()] == ["ada"]
            assert len((await worker.room("kept:a").history()).publications) == 1


async def test_logout_counts_each_socket_once_with_rooms_apart(apart: Apart, apart_site: Site) -> None:
    """Each node acknowledges once, whichever server the rooms are on, and is registered once for logouts."""
    one, two = await start(apart_site, apart, rules=[KEPT]), await start(apart_site, apart, rules=[KEPT])
    async with one.client(await sign_in(one, "ada")) as client:
        receipt = await two.cluster.user("ada").logout(timeout=20)
        assert (receipt.sockets_closed, receipt.complete) == (1, True)
        assert {*receipt.nodes_acked} == {one.cluster.node, two.cluster.node}
        assert [node.serves_for for node in await one.cluster.nodes()] == [2.0, 2.0]
        assert await client.closed() == (4501, "logged out everywhere")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("urls", "option", "words"),
    [
        (("redis://h", "redis://r"), "ssl_context", "neither the URL nor rooms_url"),
        (("redis://u:p@h", "redis://:p@r"), "credential_provider", "have their own"),
        (("redis://h?password=p", "redis+cluster://u:p@r:1,s:2"), "credential_provider", "have their own"),
        (("rediss://h", "redis://r"), "ssl_context", None),
        (("redis://h", "rediss+sentinel://r:1/m"), "ssl_context", None),
        (("redis://u:p@h", "redis://r"), "credential_provider", None),
        (("redis://h", "redis://u:p@r"), "credential_provider", None),
    ],
)
def test_option_for_neither_server_is_refused(urls: tuple[str, str], option: str, words: str | None) -> None:
    """An option goes to the servers that it fits; one that fits none would be ignored, and that is never
    done.
    """
    value: Any = (
        ssl.create_default_context()
        if option == "ssl_context"
        else UsernamePasswordCredentialProvider("u", "secret")
    )
    if words is None:
        Cluster(urls[0], rooms_url=urls[1], **{option: value})
        return
    with pytest.raises(ValueError, match=words):
        Cluster(urls[0], rooms_url=urls[1], **{option: value})


async def test_cache_with_rooms_apart_is_trusted_when_the_rooms_server_is_gone(prefix: str) -> None:
    """``lease_remaining`` is the cache's: an outage of the rooms alone does not take it away."""
    with start_valkey() as sessions, start_valkey() as rooms:
        async with Cluster(sessions.url, rooms_url=rooms.url, prefix=prefix) as cluster:
            rooms.kill()
            await eventually(lambda: not cluster.stats().bus.connected)
            assert cluster.stats().bus.lease_remaining > 0
            assert cluster.ready
