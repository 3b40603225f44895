"""The access lists of docs/security.md, as they stand there, are enough for everything on every topology."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_cluster import BusUnavailable, Cluster, RealtimeConfig, RoomRule, SessionConfig, get_session
from asgi_cluster.backends.redis import registration
from asgi_cluster.sessions.config import CookieConfig
from tests.realtime.site import Node, Raw, Site
from tests.support.machine import LOCAL, ROOT
from tests.support.servers import Server, debian_binary, start_valkey
from tests.support.topologies import RedisCluster, start_redis_cluster, start_sentinel_set
from tests.support.waiting import eventually

KEPT = RoomRule("kept:{name}", subscribe=True, publish=True, history=5, presence=True, join_leave=True)


def documented() -> dict[str, list[list[str]]]:
    """By user, the rights of each ``ACL SETUSER`` in the document, in order; without passwords."""
    text = (ROOT / "docs" / "security.md").read_text()
    lists: dict[str, list[list[str]]] = {}
    for block in re.findall(r"```\nACL SETUSER (.*?)```", text, re.DOTALL):
        user, *rules = block.split()
        lists.setdefault(user, []).append([rule for rule in rules if not rule.startswith(">")])
    return lists


BASE, NEWER, ON_A_CLUSTER, WITH_SENTINEL = documented()["myapp"]
(AT_A_SENTINEL,) = documented()["watcher"]


@dataclass
class Place:
    """Servers on which only the documented users may do anything."""

    url: str
    servers: list[Server]
    rooms_url: str | None = None
    sentinels: list[Server] = field(default_factory=list)
    cluster: RedisCluster | None = None

    def refused(self) -> list[Any]:
        """What the servers have refused since they were granted."""
        found: list[Any] = []
        for server in (*self.servers, *self.sentinels):
            with server.client() as client:
                entries = client.execute_command("ACL", "LOG")
                found += [
                    entry for entry in entries if _fields(entry).get("username") in ("least", "watcher")
                ]
        return found


def _fields(entry: Any) -> dict[str, str]:
    items = entry.items() if isinstance(entry, dict) else zip(entry[::2], entry[1::2], strict=True)
    return {_text(key): _text(value) for key, value in items}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def grant(servers: Iterable[Server], name: str, rules: Iterable[str], prefix: str) -> None:
    said = [rule.replace("asgi-cluster:", f"{prefix}:") for rule in rules]
    for server in servers:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", name, "reset", "on", ">pw", *said)
            client.execute_command("ACL", "LOG", "RESET")


@pytest.fixture(scope="module")
def granted() -> Iterator[dict[str, Any]]:
    """Topologies, started when they are first needed."""
    with_stack: dict[str, Any] = {}
    yield with_stack
    for each in with_stack.values():
        each.stop()


@pytest.fixture(params=["valkey", "redis", "sentinel", "cluster", "rooms apart"])
def place(request: pytest.FixtureRequest, granted: dict[str, Any], valkey: Server, prefix: str) -> Place:
    def started(name: str, start: Any) -> Any:
        if name not in granted:
            granted[name] = start()
        return granted[name]

    def user(url: str) -> str:
        return url.replace("://", "://least:pw@")

    match request.param:
        case "valkey":
            grant([valkey], "least", [*BASE, *NEWER], prefix)
            return Place(user(valkey.url), [valkey])
        case "redis":
            debian = started("redis", lambda: start_valkey(binary=debian_binary()))
            grant([debian], "least", BASE, prefix)
            return Place(user(debian.url), [debian])
        case "rooms apart":
            debian = started("redis", lambda: start_valkey(binary=debian_binary()))
            grant([valkey], "least", [*BASE, *NEWER], prefix)
            grant([debian], "least", BASE, prefix)
            return Place(user(valkey.url), [valkey, debian], rooms_url=user(debian.url))
        case "sentinel":
            watched = started("sentinel", start_sentinel_set)
            grant(watched.servers, "least", [*BASE, *NEWER, *WITH_SENTINEL], prefix)
            grant(watched.sentinels, "watcher", [*AT_A_SENTINEL, *NEWER], prefix)
            url = f"{user(watched.url)}?sentinel_username=watcher&sentinel_password=pw"
            return Place(url, watched.servers, sentinels=watched.sentinels)
        case _:
            servers = started("cluster", lambda: start_redis_cluster(replicas=0))
            grant(servers.nodes, "least", [*BASE, *NEWER, *ON_A_CLUSTER], prefix)
            return Place(user(servers.url), servers.nodes, cluster=servers)


@pytest.fixture
async def site(place: Place, prefix: str) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(place.url, prefix, stack)


async def add_to_cart(request: Request) -> JSONResponse:
    get_session(request)["cart"], get_session(request)["seen"] = 1, 1
    return JSONResponse(None)


async def empty_cart(request: Request) -> JSONResponse:
    return JSONResponse(get_session(request).pop("cart"))


ROUTES = [Route("/add", add_to_cart), Route("/empty", empty_cart)]


async def everything(first: Node, second: Node, user: str) -> None:
    """Sessions, rooms with history and presence, and logouts, on two nodes."""
    store = second.cluster._parts.service.store
    async with httpx.AsyncClient(base_url=first.http) as http:
        response = await http.get("/login", params={"user": user})
        cookie, handle = response.headers["set-cookie"].partition(";")[0], response.json()
        assert len(await second.cluster.user(user).sessions()) == 1
        assert await store.touch(handle, timeout=5)
        assert (await http.get("/add")).status_code == 200
        assert (await http.get("/empty")).json() == 1
        async with first.client(cookie) as one, second.client(cookie) as two:
            for client in (one, two):
                assert "subscribe" in await client.call("subscribe", {"channel": "kept:a"})
            assert "publish" in await one.call("publish", {"channel": "kept:a", "data": {"n": 1}})
            await until_published(two)
            stats = await two.call("presence_stats", {"channel": "kept:a"})
            assert stats["presence_stats"]["num_clients"] == 2
            recovered = await two.call("history", {"channel": "kept:a", "limit": 10, "reverse": True})
            assert recovered["history"]["publications"][0]["data"] == {"n": 1}
            assert "unsubscribe" in await two.call("unsubscribe", {"channel": "kept:a"})

            async def refreshed() -> bool:
                return sum(node.sockets for node in await first.cluster.nodes()) == 2

            await eventually(refreshed, timeout=15)
            receipt = await second.cluster.session(handle).logout()
            assert (receipt.complete, receipt.sockets_closed) == (True, 2)
            assert (await one.drained())[0] == (await two.drained())[0] == 4501
        await http.get("/login", params={"user": user})
    assert (await second.cluster.user(user).logout()).complete
    assert len(await second.cluster.nodes()) == 2


async def until_published(client: Raw) -> None:
    while "pub" not in await client.push():
        continue


async def test_least_privilege_is_enough(
    place: Place, site: Site, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing fails, and the servers have refused nothing, not even what would be tried another way."""
    monkeypatch.setattr(registration, "_REFRESH_EVERY", 0.0)
    sessions = SessionConfig(wait_replicas=1, cookie=CookieConfig(secure=False))
    options: dict[str, Any] = {"rooms_url": place.rooms_url}
    first, second = [await site.node(cluster=options, rules=[KEPT], routes=ROUTES) for _ in range(2)]
    await everything(first, second, "ada")
    async with Cluster(place.url, prefix=prefix, listen=False, sessions=sessions, **options) as worker:
        assert await worker.room("kept:b").broadcast("from a worker", idempotency_key="k") is not None
        await worker.room("news").broadcast("hello")
        assert await worker.room("kept:b").history() is not None
    if place.cluster is not None:
        # Slots that were just used, sessions' and rooms', with what is subscribed there.
        for key in (f"{prefix}:{{room:kept:a}}:log", f"{prefix}:{{rooms}}:rules"):
            slot = place.cluster.slot(key)
            owner = place.cluster.primary_of(slot)
            place.cluster.move([slot], next(node for node in place.cluster.primaries() if node is not owner))
        await everything(first, second, "ada")
    assert place.refused() == []


@pytest.mark.parametrize("right", ["+spublish", "+ssubscribe", "+cluster|slots", "+cluster|info"])
async def test_missing_right_on_a_cluster_stops_the_start(
    redis_cluster: RedisCluster, prefix: str, right: str
) -> None:
    """It is found at start, as on one server."""
    rules = [rule for rule in (*BASE, *NEWER, *ON_A_CLUSTER) if rule != right]
    grant(redis_cluster.nodes, "lacking", rules, prefix)
    cluster = Cluster(redis_cluster.url.replace("://", "://lacking:pw@"), prefix=prefix)
    with pytest.raises(Exception, match=r"(?i)permission|NOPERM"):
        await cluster.__aenter__()


def test_the_lists_can_be_found() -> None:
    """A list that the document has lost would allow nothing here, or all."""
    assert "-@all" in BASE
    assert "+ssubscribe" in ON_A_CLUSTER


def test_every_command_of_a_script_is_in_the_lists() -> None:
    """Also one that is called with a variable: each upper-case word in the place of a command counts."""
    scripts = sorted((ROOT / "asgi_cluster" / "backends" / "redis" / "lua").glob("*.lua"))
    called: dict[str, set[str]] = {}
    for script in scripts:
        code = re.sub(r"--.*", "", script.read_text())
        for command in re.findall(r"[({]\s*'([A-Z]+)'", code):
            called.setdefault(command.lower(), set()).add(script.name)
    assert {"hdel", "hmget", "xrevrange", "zadd"} <= called.keys()
    assert {name: where for name, where in called.items() if f"+{name}" not in BASE} == {}


async def test_refused_refresh_of_the_registry_is_logged_once(
    valkey: Server, prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The node goes on; one warning says what the server answered."""
    monkeypatch.setattr(registration, "_OBSERVE_EVERY", 0.01)
    monkeypatch.setattr(registration, "_REFRESH_EVERY", 0.0)
    grant([valkey], "least", [rule for rule in (*BASE, *NEWER) if rule != "+hexists"], prefix)
    url = valkey.url.replace("://", "://least:pw@")

    def refusals() -> int:
        with valkey.client() as client:
            entries = [_fields(entry) for entry in client.execute_command("ACL", "LOG")]
        return sum(int(entry["count"]) for entry in entries if entry["object"] == "hexists")

    async with Cluster(url, prefix=prefix) as cluster:
        await eventually(lambda: refusals() >= 3)
        assert cluster.ready
    (told,) = [record for record in caplog.records if record.name == "asgi_cluster.registry"]
    assert told.levelname == "WARNING"
    assert "lacks the permission" in told.getMessage()


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_missing_right_of_a_script_is_named(kind: str, prefix: str) -> None:
    """A script that may not run one of its commands: the error says so, and where the rights are listed."""
    binary = debian_binary() if kind == "redis" else None
    with start_valkey(binary=binary) if binary else start_valkey() as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "least", "on", ">secret", "~*", "&*", "+@all", "-xadd")
        url = f"redis://least:secret@{LOCAL}:{server.port}/0"
        async with Cluster(url, prefix=prefix, realtime=RealtimeConfig(rules=[KEPT])) as cluster:
            with pytest.raises(BusUnavailable, match=r"lacks the permission .*docs/security\.md"):
                await cluster.room("kept:a").broadcast(1)
