"""A logout that an asynchronous failover has lost: the nodes remember it, and end the session again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import httpx
import pytest
import websockets

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, SessionConfig, StoreUnavailable
from asgi_cluster.ids import Handle, new_handle
from asgi_cluster.sessions.reads import SessionReader
from asgi_cluster.sessions.store import EndResult
from asgi_cluster.sessions.tombstones import Tombstones
from tests.bus.nodes import opened
from tests.contract.drafts import create, end, end_all
from tests.sessions.app import make_app
from tests.support.machine import LOCAL
from tests.support.nodes import serve
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.topologies import start_redis_cluster, start_sentinel_set
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(180)

SESSIONS = SessionConfig(cookie=CookieConfig(secure=False))


def replica_of(primary: Server) -> Server:
    """A replica of ``primary``, in sync."""
    return start_valkey("--replicaof", LOCAL, str(primary.port), "--repl-diskless-sync-delay", "0")


async def in_sync(primary: Server, replica: Server) -> None:
    with primary.client() as at, replica.client() as there:
        await eventually(lambda: there.info("replication")["master_link_status"] == "up", timeout=10)
        await eventually(
            lambda: (
                at.info("replication")["master_repl_offset"] == there.info("replication")["slave_repl_offset"]
            ),
            timeout=10,
        )


def cut_off(primary: Server, replica: Server) -> None:
    """From here on nothing that is written reaches the replica."""
    replica.pause()
    with primary.client() as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "replica")


class Visitor:
    """A browser that keeps its cookie, whatever the answer: a thief's, say."""

    def __init__(self, cookie: str = "") -> None:
        self.cookie = cookie

    async def login(self, url: str, user: str = "ada") -> str:
        async with httpx.AsyncClient(base_url=url) as client:
            handle: str = (await client.post(f"/login?user={user}")).json()["handle"]
            self.cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
        return handle

    async def post(self, url: str, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=url) as client:
            return await client.post(path, headers={"Cookie": self.cookie})

    async def user(self, url: str) -> str | None:
        user: str | None = (await self.post(url, "/show")).json()["user"]
        return user

    @asynccontextmanager
    async def socket(self, ws_url: str) -> AsyncIterator[websockets.ClientConnection]:
        address = f"{ws_url}/realtime/websocket"
        async with websockets.connect(address, additional_headers={"Cookie": self.cookie}) as connection:
            await connection.send('{"id":1,"connect":{}}')
            await connection.recv()
            yield connection


def node(url: str, prefix: str) -> Cluster:
    return Cluster(url, prefix=prefix, sessions=SESSIONS)


FAULTS = pytest.mark.faults


@pytest.mark.parametrize(
    "way",
    [
        "by the session",
        pytest.param("by another node", marks=FAULTS),
        pytest.param("all of the user", marks=FAULTS),
        pytest.param("all of the user, by another node", marks=FAULTS),
    ],
)
async def test_a_logout_that_a_failover_lost(prefix: str, way: str) -> None:
    """The session is back on the new primary, a node without the tombstone serves it; when the nodes that
    have it arrive it ends again, everywhere, with its sockets. What the user began meanwhile goes on.
    """
    visitor = Visitor()
    with start_valkey() as old, replica_of(old) as new:
        await in_sync(old, new)
        async with Proxy(old.url) as proxy, AsyncExitStack() as stack:
            first, second = node(proxy.url, prefix), node(proxy.url, prefix)
            there = await stack.enter_async_context(serve(ClusterMiddleware(make_app(), first)))
            if way.endswith("by another node"):
                origin = await stack.enter_async_context(AsyncExitStack())
                await origin.enter_async_context(second)
            handle = await visitor.login(there.url)
            other = Visitor()
            await other.login(there.url, "bob")
            await in_sync(old, new)
            cut_off(old, new)
            match way:
                case "by the session":
                    await visitor.post(there.url, "/logout")
                case "by another node":
                    # The node that did it goes with the primary: those that received the message have it.
                    await second.session(handle).logout()
                    await origin.aclose()
                case "all of the user":
                    await first.user("ada").logout()
                case "all of the user, by another node":
                    await second.user("ada").logout()
                    await origin.aclose()
            assert await visitor.user(there.url) is None
            old.kill()
            proxy.cut()
            new.resume()
            with new.client() as client:
                client.execute_command("REPLICAOF", "NO", "ONE")
            late = await stack.enter_async_context(
                serve(ClusterMiddleware(make_app(), node(new.url, prefix)))
            )
            assert await visitor.user(late.url) == "ada", "the logout was not lost: nothing is tested"
            meanwhile = Visitor()
            await meanwhile.login(late.url)
            async with visitor.socket(late.ws_url) as socket:
                proxy.target = (LOCAL, new.port)
                proxy.heal()
                with pytest.raises(websockets.ConnectionClosed):
                    await asyncio.wait_for(socket.recv(), 6)
                assert socket.close_code == 4501
            assert await visitor.user(late.url) is None
            assert await visitor.user(there.url) is None
            assert await other.user(there.url) == "bob"
            assert await meanwhile.user(there.url) == "ada"


@pytest.mark.parametrize("way", ["by the session", "all of the user"])
async def test_a_logout_that_a_restart_from_a_snapshot_lost(prefix: str, way: str) -> None:
    """The server comes back with the ended session. No node that received the logout serves it for a moment,
    nor lists it; then it is ended again.
    """
    visitor, other = Visitor(), Visitor()
    with start_valkey() as server:
        async with (
            serve(ClusterMiddleware(make_app(), (first := node(server.url, prefix)))) as one,
            serve(ClusterMiddleware(make_app(), (second := node(server.url, prefix)))) as two,
        ):
            handle = await visitor.login(one.url)
            bob = await other.login(one.url, "bob")
            with server.client() as client:
                client.save()
            if way == "by the session":
                await visitor.post(one.url, "/logout")
            else:
                await second.user("ada").logout()
            server.kill()
            server.restart(data=True)
            with server.client() as client:
                assert client.exists(record_key(prefix, handle)), "the logout was not lost: nothing is tested"
                seen: set[str | None] = set()
                while client.exists(record_key(prefix, handle)):
                    for url in (one.url, two.url):
                        response = await visitor.post(url, "/show")
                        seen.add(response.json()["user"] if response.status_code == 200 else None)
                    for cluster in (first, second):
                        with suppress(StoreUnavailable):
                            seen |= {device.handle for device in await cluster.user("ada").sessions()}
            assert seen == {None}
            assert await other.user(two.url) == "bob"
            assert {device.handle for device in await first.user("bob").sessions()} == {bob}


async def test_the_receipt_says_how_many_replicas_have_it(prefix: str) -> None:
    """``wait_replicas``: 1 while the replica follows, 0 when it does not, None without the option."""
    with start_valkey() as primary, replica_of(primary) as replica:
        await in_sync(primary, replica)
        asking = Cluster(primary.url, prefix=prefix, sessions=SessionConfig(wait_replicas=1))
        async with asking, node(primary.url, prefix) as other:
            store = asking._parts.service.store
            made = [await create(store) for _ in range(3)]
            assert (await asking.session(made[0].handle).logout()).replicas == 1
            assert (await other.session(made[1].handle).logout()).replicas is None
            replica.pause()
            try:
                assert (await asking.session(made[2].handle).logout()).replicas == 0
            finally:
                replica.resume()


@pytest.mark.parametrize("kind", ["end", "end_all"])
async def test_a_logout_that_is_refused_is_not_heard_of(prefix: str, kind: str) -> None:
    """A demoted primary takes no writes and carries messages: no node may keep an end that did not happen."""
    with start_valkey() as server:
        async with opened(server.url, prefix) as node:
            heard: list[bytes] = []
            node.receiver.session_message = heard.append  # type: ignore[assignment, method-assign]
            store = node.backend.store
            made = await create(store, "ada")

            async def logout() -> EndResult:
                return await (end(store, made.handle) if kind == "end" else end_all(store, "ada"))

            with server.client() as client:
                client.config_set("min-replicas-to-write", "1")
                with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
                    await logout()
                client.config_set("min-replicas-to-write", "0")
            assert heard == []
            assert (await logout()).sessions == 1
            await eventually(lambda: heard)


async def test_a_logout_everywhere_says_what_it_ended(valkey: Server, prefix: str) -> None:
    """Those that were living, by their handles; not the one that is kept, and no other user's."""
    async with node(valkey.url, prefix) as one, node(valkey.url, prefix) as two:
        store = one._parts.service.store
        kept, *ended = [await create(store, "ada") for _ in range(20)]
        await create(store, "bob")
        assert (await one.user("ada").logout(exclude=kept.handle)).complete
        for cluster in (one, two):
            assert set(cluster._parts.service.logouts.tombstones) == {made.handle for made in ended}
        assert (await one.user("ada").logout()).sessions == 1
        assert kept.handle in set(two._parts.service.logouts.tombstones)
        assert (await one.user("nobody").logout()).sessions == 0


async def test_a_logout_in_doubt_is_not_remembered(valkey: Server, prefix: str) -> None:
    """Lost on the way there: no node has committed it, so no node may do it later."""
    async with Proxy(valkey.url) as proxy, node(proxy.url, prefix) as cluster:
        store = cluster._parts.service.store
        made = await create(store)
        proxy.lose(b"EVALSHA")
        with pytest.raises(StoreUnavailable) as error:
            await cluster.session(made.handle).logout()
        assert error.value.outcome_unknown
        assert len(cluster._parts.service.logouts.tombstones) == 0
        await eventually(lambda: _exists(cluster._parts.service.reader, made.handle))
        await cluster.session(made.handle).logout()
        assert len(cluster._parts.service.logouts.tombstones) == 1


async def _exists(reader: SessionReader, handle: Handle) -> bool:
    try:
        return await reader.read_fresh(handle, timeout=1) is not None
    except StoreUnavailable:
        return False


async def test_what_is_remembered_is_bounded(valkey: Server, prefix: str) -> None:
    """The oldest go first, and all of them when their time is over."""
    now = 0.0
    async with node(valkey.url, prefix) as cluster:

        async def never(handle: Handle) -> None:
            raise AssertionError(handle)

        stones = Tombstones(
            cluster._parts.service.store, never, deadline=1, clock=lambda: now, limit=100, kept=60
        )
        for _ in range(150):
            stones.remember(new_handle(None), "gone")
        assert len(stones) == 100
        now = 59.0
        stones.remember(new_handle(None), "gone")
        stones.remember(new_handle(None), "")
        running = asyncio.ensure_future(stones.run())
        try:
            # No server has them: each is asked about once, and then belongs to the server that answered.
            await eventually(lambda: not stones._uncertain_servers(), timeout=5)
            assert len(stones) == 100
            now = 60.0
            await eventually(lambda: len(stones) == 1)
        finally:
            running.cancel()
            await asyncio.wait([running])


async def test_a_logout_of_very_many_sessions_says_a_thousand(valkey: Server, prefix: str) -> None:
    """Those that would have lived longest; the node that asked for it has them all."""
    async with node(valkey.url, prefix) as one, node(valkey.url, prefix) as two:
        store = one._parts.service.store
        short = [await create(store, "ada", idle=50.0) for _ in range(20)]
        long = [await create(store, "ada") for _ in range(1000)]
        assert (await one.user("ada").logout()).sessions == 1020
        assert set(two._parts.service.logouts.tombstones) == {made.handle for made in long}
        assert set(one._parts.service.logouts.tombstones) == {made.handle for made in short + long}


@pytest.mark.faults
@pytest.mark.parametrize("way", ["by the session", "all of the user"])
async def test_a_logout_that_sentinel_lost(prefix: str, way: str) -> None:
    """The same with a failover by the sentinels: dead again some seconds after the election, also when the
    node that did it is gone.
    """
    visitor, other = Visitor(), Visitor()
    with start_sentinel_set() as servers:
        old = servers.primary
        new = next(server for server in servers.servers if server is not old)
        async with serve(ClusterMiddleware(make_app(), node(servers.url, prefix))) as there:
            handles = [await visitor.login(there.url) for _ in range(3 if way == "all of the user" else 1)]
            await other.login(there.url, "bob")
            async with node(servers.url, prefix) as origin:
                await in_sync(old, new)
                cut_off(old, new)
                if way == "by the session":
                    await visitor.post(there.url, "/logout")
                else:
                    assert (await origin.user("ada").logout()).sessions == len(handles)
            old.kill()
            new.resume()
            keys = [record_key(prefix, handle) for handle in handles]
            with new.client() as client:
                assert client.exists(*keys) == len(keys), "the logout was not lost: nothing is tested"
                await eventually(lambda: servers.primary is new, timeout=40, interval=0.05)
                await eventually(lambda: not client.exists(*keys), timeout=5)
            assert await visitor.user(there.url) is None
            assert await other.user(there.url) == "bob"


@pytest.mark.faults
@pytest.mark.parametrize("way", ["by the session", "all of the user"])
async def test_a_logout_that_a_redis_cluster_lost(prefix: str, way: str) -> None:
    """The node that did it goes with the primary of that session; the replica that is elected does not have
    it, the nodes that are left do.
    """
    visitor, other = Visitor(), Visitor()
    with start_redis_cluster() as servers:
        async with serve(ClusterMiddleware(make_app(), node(servers.url, prefix))) as there:
            handle = await visitor.login(there.url)
            await other.login(there.url, "bob")
            key = record_key(prefix, handle)
            old = servers.primary_of(servers.slot(key))
            new = servers.replica_of(old)
            async with node(servers.url, prefix) as origin:
                await in_sync(old, new)
                cut_off(old, new)
                if way == "by the session":
                    receipt = await origin.session(handle).logout()
                else:
                    receipt = await origin.user("ada").logout()
                assert receipt.sessions == 1
            assert await visitor.user(there.url) is None
            old.kill()
            new.resume()
            with new.client() as client:
                client.execute_command("READONLY")
                assert client.exists(key), "the logout was not lost: nothing is tested"
                await eventually(lambda: new.role() == "master", timeout=40, interval=0.05)
                await eventually(lambda: not client.exists(key), timeout=8)
            assert await visitor.user(there.url) is None
            assert await other.user(there.url) == "bob"


def record_key(prefix: str, handle: str) -> str:
    return f"{prefix}:{{{handle[:2]}}}:s:{handle[3:]}"
