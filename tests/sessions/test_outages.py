"""The table "When Redis is in trouble", cell by cell, against a real server that is stopped, killed, full,
read-only or refuses.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import httpx
import pytest
import websockets

from asgi_cluster import (
    BusUnavailable,
    Cluster,
    ClusterMiddleware,
    CookieConfig,
    RealtimeConfig,
    SessionConfig,
    SessionConflict,
    StoreUnavailable,
    get_session,
)
from asgi_cluster.bus.lease import boot_clock
from tests.bus.nodes import beats
from tests.sessions.app import client_for, make_app, nodes
from tests.sessions.test_security import grant, url_for
from tests.support.nodes import serve
from tests.support.servers import Server, start_valkey
from tests.support.waiting import eventually

DEADLINE = 1.0
SLACK = 0.7  # two noisy cores


@pytest.fixture
def own() -> Iterator[Server]:
    """A server of the test's own, to be mistreated."""
    with start_valkey() as server:
        yield server


async def timed(request: Any) -> tuple[httpx.Response, float]:
    started = monotonic()
    response = await request
    return response, monotonic() - started


def silence(server: Server, how: str) -> Callable[[], None]:
    """Make the server not answer; returns what makes it answer again."""
    if how == "stopped":
        server.pause()
        return server.resume
    server.kill()
    return server.restart


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_store_that_does_not_answer(own: Server, prefix: str, how: str) -> None:
    """Without a cookie nothing is noticed; without a look at the session neither; a look is 503 within the
    deadline.
    """
    async with (
        nodes(own.url, 1, prefix=prefix) as (cluster,),
        client_for(cluster) as client,
        client_for(cluster) as visitor,
    ):
        await client.post("/login?user=ada")
        await eventually(lambda: cluster.stats().bus.lease_remaining > 0)
        again = silence(own, how)
        try:
            await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)
            # Degraded, but taking this node out would help nobody. The bus may be missed before the store is.
            await eventually(lambda: cluster.ready)
            response, took = await timed(visitor.get("/show"))
            assert response.status_code == 200
            assert took < 0.3
            response, took = await timed(client.get("/nothing"))
            assert response.status_code == 200
            assert took < DEADLINE + SLACK
            for path in ("/show", "/put", "/logout"):
                response, took = await timed(client.post(path, json={"a": 1}))
                assert response.status_code == 503
                assert int(response.headers["retry-after"]) >= 1
                assert took < DEADLINE + SLACK
                assert "set-cookie" not in response.headers
            response, took = await timed(visitor.post("/put", json={"a": 1}))
            assert response.status_code == 503
            assert "set-cookie" not in response.headers
        finally:
            again()
        await eventually(lambda: cluster.stats().bus.lease_remaining > 0, timeout=6)
        seen = (await client.get("/show")).json()
        assert seen["user"] == ("ada" if how == "stopped" else None)  # the killed one kept nothing on disk


async def test_breaker_spares_later_requests_the_wait(own: Server, prefix: str) -> None:
    """Once the server is known not to answer, a request is refused at once; when it answers again, so do
    requests.
    """
    async with nodes(own.url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        own.pause()
        try:
            await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)

            async def spared() -> bool:
                waits = [(await timed(client.get("/show")))[1] for _ in range(10)]
                return sorted(waits)[7] < 0.2

            await eventually(spared, timeout=20)
        finally:
            own.resume()

        async def works() -> bool:
            return (await client.get("/show")).status_code == 200

        await eventually(works, timeout=5)


async def test_anonymous_on_store_error(own: Server, prefix: str) -> None:
    """The visitor is shown an empty session; nothing may be written, and the cookie stays."""
    options = SessionConfig(on_store_error="anonymous")
    async with (
        nodes(own.url, 1, prefix=prefix, sessions=options) as (cluster,),
        client_for(cluster) as client,
    ):
        await client.post("/login?user=ada")
        own.pause()
        try:
            await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)
            response = await client.get("/show")
            assert response.json()["user"] is None
            assert "set-cookie" not in response.headers
            assert (await client.post("/put", json={"a": 1})).status_code == 503
        finally:
            own.resume()
        await eventually(lambda: cluster.stats().bus.lease_remaining > 0, timeout=6)
        assert (await client.get("/show")).json()["user"] == "ada"


@asynccontextmanager
async def stale_visitor(
    own: Server, prefix: str, *, stale_for: float
) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    """One who is signed in and known to a node whose Redis does not answer while this is entered."""
    options = SessionConfig(on_store_error="stale", stale_for=stale_for)
    async with (
        nodes(own.url, 1, prefix=prefix, sessions=options) as (cluster,),
        client_for(cluster) as client,
    ):
        await client.post("/login?user=ada")
        await client.get("/show")
        own.pause()
        try:
            await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)
            yield cluster, client
        finally:
            own.resume()


async def test_stale_on_store_error(own: Server, prefix: str) -> None:
    """The last confirmed state is served for ``stale_for`` seconds, and then it is 503."""
    async with stale_visitor(own, prefix, stale_for=4.0) as (_, client):
        assert (await client.get("/show")).json()["user"] == "ada"

        async def refused() -> bool:
            return (await client.get("/show")).status_code == 503

        await eventually(refused, timeout=8)


async def test_stale_session_whose_idle_time_is_to_be_extended(own: Server, prefix: str) -> None:
    """That cannot be done in an outage, and is no reason to refuse a request that only reads. A change is
    refused.
    """
    async with stale_visitor(own, prefix, stale_for=60.0) as (cluster, client):
        cluster._parts.node.clock = lambda: boot_clock() + 1000
        for path in ("/nothing", "/show"):
            assert (await client.get(path)).status_code == 200
        assert (await client.post("/put", json={"a": 1})).status_code == 503


async def test_lapsed_lease_with_a_store_that_answers(own: Server, prefix: str) -> None:
    """A deaf node reads every session from Redis, caches nothing, and is not ready."""
    raw = own.client()
    grant(raw, "app", prefix)
    async with nodes(url_for(own, "app"), 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        await client.get("/show")
        raw.execute_command("ACL", "SETUSER", "app", "-pexpire")
        await eventually(lambda: not cluster.ready, timeout=8)
        before = cluster.stats().cache
        for _ in range(5):
            assert (await client.get("/show")).json()["user"] == "ada"
        after = cluster.stats().cache
        assert after.hits == before.hits
        assert after.size == 0 or after.bypassed > before.bypassed
        raw.execute_command("ACL", "SETUSER", "app", "+pexpire")
        await eventually(lambda: cluster.ready, timeout=8)
    raw.close()


async def test_full_memory(own: Server, prefix: str) -> None:
    """Writes are 503 and change nothing; reads and the heartbeat go on, so the cache stays trusted."""
    raw = own.client()
    async with nodes(own.url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        await client.post("/put", json={"a": 1})
        raw.config_set("maxmemory-policy", "noeviction")
        raw.config_set("maxmemory", "1")
        assert (await client.post("/put", json={"a": 2})).status_code == 503
        before = beats(raw)
        await eventually(lambda: beats(raw) >= before + 8, timeout=15)  # longer than the lease
        assert cluster.stats().bus.lease_remaining > 0
        assert (await client.get("/show")).json()["data"] == {"a": 1}
        raw.config_set("maxmemory", "0")
        assert (await client.post("/put", json={"a": 3})).status_code == 200
    raw.close()


async def test_read_only_server(own: Server, prefix: str) -> None:
    """A demoted primary: writes are 503, its echo renews nothing, reads go on."""
    raw = own.client()
    async with nodes(own.url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        raw.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            response, took = await timed(client.post("/put", json={"a": 2}))
            assert response.status_code == 503
            assert took < DEADLINE + SLACK
            await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)
        finally:
            raw.execute_command("REPLICAOF", "NO", "ONE")
        await eventually(lambda: cluster.stats().bus.lease_remaining > 0, timeout=6)
        assert (await client.post("/put", json={"a": 3})).status_code == 200
    raw.close()


async def test_refused_channel_leaves_no_silent_change(own: Server, prefix: str) -> None:
    """The script publishes first: when that is refused nothing has been changed that nobody heard of."""
    raw = own.client()
    grant(raw, "app", prefix)
    async with nodes(url_for(own, "app"), 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        handle = (await client.post("/login?user=ada")).json()["handle"]
        raw.execute_command("ACL", "SETUSER", "app", "-publish")
        assert (await client.post("/put", json={"a": 1})).status_code == 503
        assert (await client.post("/logout")).status_code == 503
        assert raw.hget(f"{prefix}:{{{handle[:2]}}}:s:{handle[3:]}", ".a") is None
        raw.execute_command("ACL", "SETUSER", "app", "+publish")
        assert (await client.get("/show")).json()["user"] == "ada"
    raw.close()


async def test_changed_password(own: Server, prefix: str) -> None:
    """Connections are cut, new ones are refused: 503 and no crash; with the password back everything is."""
    raw = own.client()
    grant(raw, "app", prefix)
    async with nodes(url_for(own, "app"), 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        raw.execute_command("ACL", "SETUSER", "app", "resetpass", ">other")
        raw.execute_command("CLIENT", "KILL", "USER", "app")
        await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)
        assert (await client.get("/show")).status_code == 503
        raw.execute_command("ACL", "SETUSER", "app", "resetpass", ">pa55-word")
        await eventually(lambda: cluster.stats().bus.lease_remaining > 0, timeout=6)
        assert (await client.get("/show")).json()["user"] == "ada"
    raw.close()


async def test_handshake_and_open_sockets(own: Server, prefix: str) -> None:
    """A new socket is accepted and closed with a code that says retry; open ones stay, up to
    ``unverified_limit``.
    """
    cluster = Cluster(
        own.url,
        prefix=prefix,
        sessions=SessionConfig(cookie=CookieConfig(secure=False)),
        realtime=RealtimeConfig(unverified_limit=5.0),
    )
    async with serve(ClusterMiddleware(make_app(), cluster)) as node:
        async with httpx.AsyncClient(base_url=node.url) as client:
            await client.post("/login?user=ada")
            cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
        address, headers = f"{node.ws_url}/realtime/websocket", {"Cookie": cookie}
        async with websockets.connect(address, additional_headers=headers) as early:
            await early.send('{"id":1,"connect":{}}')
            await early.recv()
            own.pause()
            try:
                await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)
                async with websockets.connect(address, additional_headers=headers) as late:
                    with pytest.raises(websockets.ConnectionClosed):
                        await late.recv()
                    assert late.close_code == 4100
                assert early.close_code is None
                with pytest.raises(websockets.ConnectionClosed):
                    await asyncio.wait_for(early.recv(), 15)
                assert early.close_code == 4101
            finally:
                own.resume()


async def test_denied_handshake_whose_session_cannot_be_saved(own: Server, prefix: str) -> None:
    """The close code of every handshake that Redis cannot answer for, and not a 500."""

    async def deny(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        get_session(scope)["denied"] = True
        await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b""})

    async with serve(ClusterMiddleware(deny, Cluster(own.url, prefix=prefix))) as node:
        with pytest.raises(websockets.InvalidStatus) as denied:
            await websockets.connect(node.ws_url)
        assert denied.value.response.status_code == 401
        own.pause()
        try:
            async with websockets.connect(node.ws_url) as late:
                with pytest.raises(websockets.ConnectionClosed):
                    await late.recv()
                assert late.close_code == 4100
        finally:
            own.resume()


@pytest.mark.parametrize("policy", ["raise", "local"])
async def test_broadcast_without_bus(own: Server, prefix: str, policy: Any) -> None:
    """BusUnavailable within the deadline; or this node's members only."""
    options = RealtimeConfig(on_bus_error=policy)
    async with nodes(own.url, 1, prefix=prefix, realtime=options) as (cluster,):
        own.pause()
        try:
            await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)
            started = monotonic()
            if policy == "raise":
                with pytest.raises(BusUnavailable):
                    await cluster.room("news").broadcast("hello")
            else:
                await cluster.room("news").broadcast("hello")
            assert monotonic() - started < DEADLINE + SLACK
        finally:
            own.resume()


async def test_server_that_is_not_there_at_start(prefix: str) -> None:
    """The start fails, and says where and why."""
    with start_valkey() as server:
        url = server.url
    cluster = Cluster(url, prefix=prefix)
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:\d+|localhost:\d+"):
        await cluster.__aenter__()
    assert not cluster.started


async def test_events_between_two_outages_are_not_lost(own: Server, prefix: str) -> None:
    """A logout that happens while a node is cut off from the bus is seen by it when it is back."""
    name = secrets.token_hex(4)
    raw = own.client()
    async with (
        nodes(own.url, prefix=prefix) as (first, second),
        client_for(first) as a,
        client_for(second) as b,
    ):
        await a.post(f"/login?user={name}")
        b.cookies = httpx.Cookies(a.cookies)
        assert (await b.get("/show")).json()["user"] == name
        for _ in range(5):
            raw.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await a.post("/put", json={"x": secrets.token_hex(4)})
            expected = (await a.get("/show")).json()["data"]

            async def agrees(expected: Any = expected) -> bool:
                return bool((await b.get("/show")).json()["data"] == expected)

            await eventually(agrees, timeout=2.0)  # the lease: no read may be staler
            await eventually(lambda: second.stats().bus.lease_remaining > 0, timeout=6)
        assert second.stats().bus.gaps >= 5
    raw.close()


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ([BusUnavailable("no reply"), StoreUnavailable("no reply")], 503),
        ([SessionConflict("h"), ExceptionGroup("inner", [BusUnavailable("no reply")])], 503),
        ([SessionConflict("h"), SessionConflict("h")], 409),
        ([BusUnavailable("no reply"), ZeroDivisionError()], 500),
        ([ZeroDivisionError(), BusUnavailable("no reply")], 500),
    ],
)
async def test_several_operations_of_a_task_group_fail(
    prefix: str, errors: list[Exception], status: int
) -> None:
    """503 when all that failed is the store or the bus, 409 when all are conflicts; an error of the app's
    own among them is its 500.
    """

    async def fail(error: Exception) -> None:
        await asyncio.sleep(0)  # all of them have begun
        raise error

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with asyncio.TaskGroup() as tasks:
            for error in errors:
                tasks.create_task(fail(error))

    cluster = Cluster(f"memory://{prefix}")
    async with serve(ClusterMiddleware(app, cluster)) as node, httpx.AsyncClient(base_url=node.url) as client:
        assert (await client.get("/")).status_code == status
