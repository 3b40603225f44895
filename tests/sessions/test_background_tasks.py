"""Background work that fails: said at once, started again, and ``ready`` is false while it is down."""

from __future__ import annotations

import asyncio
import gc
import logging
import warnings
import weakref
from typing import Any

import msgspec
import pytest
import websockets

from asgi_cluster import Cluster, CookieConfig, SessionConfig
from asgi_cluster.backends.redis.client import PrimaryClient
from asgi_cluster.backends.redis.heartbeat import HeartbeatLoop
from asgi_cluster.backends.redis.registration import Registration
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.sessions.tombstones import Tombstones
from asgi_cluster.sockets.hub import Hub
from asgi_cluster.tasks import Failing, keep_running, spawn
from tests.sessions.app import Gate, client_for
from tests.sessions.test_live_logout import cookies, place, sign_in
from tests.support.waiting import eventually


class Broken:
    """Raises until it is mended."""

    def __init__(self, works: Any) -> None:
        self.works = works
        self.mended = False
        self.called = 0

    def __get__(self, owner: Any, kind: Any) -> Any:
        return lambda *args, **options: self(owner, *args, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.called += 1
        if not self.mended:
            raise KeyError("injected")
        return self.works(*args, **options)


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [("verification", Hub, "handles"), ("tombstones", Tombstones, "_expire")],
)
async def test_background_work_that_fails(
    cluster_url: str,
    prefix: str,
    name: str,
    kind: type,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An unexpected exception is logged with its traceback; requests are served; ``ready`` is false and
    ``stats`` names the work until it has gone on for a while.
    """
    broken = Broken(getattr(kind, method))
    async with Cluster(cluster_url, prefix=prefix) as cluster, client_for(cluster) as browser:
        assert cluster.ready
        assert cluster.stats().failing == {}
        monkeypatch.setattr(kind, method, broken)
        cluster._parts.revalidator.wake()
        await eventually(lambda: not cluster.ready)
        assert cluster.stats().failing == {name: "KeyError"}
        assert "KeyError: 'injected'" in caplog.text
        assert f"{name} failed" in caplog.text
        assert (await browser.post("/login?user=ada")).json()["user"] == "ada"
        await eventually(lambda: broken.called > 1)  # started again
        broken.mended = True
        await eventually(lambda: cluster.ready, timeout=20)
        assert cluster.stats().failing == {}
        assert (await browser.get("/show")).json()["user"] == "ada"
        assert (await cluster.user("ada").logout()).complete


@pytest.mark.parametrize(
    ("kind", "method", "name"),
    [
        (Registration, "observe", "registry"),
        (HeartbeatLoop, "register", "subscriber"),
        (SubscriberSet, "gap", "subscriber"),
        (PrimaryClient, "_probe", "commands"),
    ],
)
async def test_work_of_the_backend_that_fails(
    redis_url: str,
    prefix: str,
    kind: type,
    method: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The registry, the subscriber or the link for commands runs into a fault of its own: logged, started
    again, and the node goes on. Until then it is not ready, and its ``stats`` name the work.
    """
    broken = Broken(getattr(kind, method))
    async with (
        Cluster(redis_url, prefix=prefix) as cluster,
        Cluster(redis_url, prefix=prefix) as other,
        client_for(cluster) as browser,
    ):
        monkeypatch.setattr(kind, method, broken)
        backend: Any = cluster._parts.backend
        for subscriber in list(backend._subscribers._subscribers.values()):
            subscriber._connection.abort("broken by the test")
        if kind is PrimaryClient:
            backend._topology._commands.drop("broken by the test")
        await eventually(lambda: cluster.stats().failing == {name: "KeyError"}, timeout=15)
        assert not cluster.ready
        assert "KeyError: 'injected'" in caplog.text
        if kind is not PrimaryClient:
            assert (await browser.post("/login?user=ada")).json()["user"] == "ada"
        broken.mended = True
        await eventually(lambda: cluster.ready, timeout=20)
        assert cluster.stats().failing == {}
        assert (await browser.post("/login?user=ada")).json()["user"] == "ada"
        await eventually(lambda: cluster.stats().bus.lease_remaining > 0, timeout=15)

        async def complete() -> bool:
            return (await other.user("ada").logout()).complete

        await eventually(complete, timeout=15)
        assert (await browser.get("/show")).json()["user"] is None


@pytest.mark.quick
async def test_cluster_that_ends_says_so(
    cluster_url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever ends a node's cluster is an error in the log at that moment, and the node is not ready."""

    async def fails() -> None:
        raise KeyError("injected")

    cluster = Cluster(cluster_url, prefix=prefix)
    await cluster.__aenter__()
    assert cluster._parts.node.tasks is not None
    cluster._parts.node.tasks.create_task(fails())
    await eventually(lambda: "KeyError: 'injected'" in caplog.text)
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.CRITICAL]
    await eventually(lambda: not cluster.started)
    assert cluster.ready is False
    with pytest.raises(ExceptionGroup):
        await cluster.__aexit__(None, None, None)


@pytest.mark.quick
async def test_spawn_in_a_group_that_has_ended() -> None:
    """Refused, and nothing is left that was never awaited."""
    async with asyncio.TaskGroup() as group:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError):
            spawn(group, asyncio.sleep(0), name="late")
        gc.collect()


@pytest.mark.quick
async def test_spawned_task_that_is_cancelled_before_its_first_step() -> None:
    """Nothing is left that was never awaited either."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with asyncio.TaskGroup() as group:
            spawn(group, asyncio.sleep(0), name="early").cancel()
        gc.collect()


async def test_socket_that_is_gone_while_its_session_is_checked(
    cluster_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check was under way when the client left: no timer is set any more, and nothing keeps the
    socket.
    """
    sessions = SessionConfig(cookie=CookieConfig(secure=False), idle_timeout=0.5, absolute_timeout=60)
    gate = Gate()
    async with place(cluster_url, prefix, 1, sessions=sessions) as here:
        (cluster,) = here.clusters
        browser = await sign_in(here.nodes[0])
        address = f"{here.nodes[0].ws_url}/ws/careful"
        async with websockets.connect(address, additional_headers=cookies(browser)):
            await eventually(lambda: cluster.stats().realtime.connections == 1)
            (socket,) = (weakref.ref(found) for found in cluster._parts.hub._sockets.values())
            read = cluster._parts.service.reader.read_fresh

            async def slowly(*args: Any, **options: Any) -> Any:
                await gate.pass_through()
                return record

            handle = (await browser.get("/show")).json()["handle"]
            record = await read(handle, timeout=5)
            assert record is not None
            record = msgspec.structs.replace(record, expires_in=600.0)  # as if it had been used meanwhile
            monkeypatch.setattr(cluster._parts.service.reader, "read_fresh", slowly)
            await gate.reached.wait()
        await eventually(lambda: cluster.stats().realtime.connections == 0)
        gate.open.set()

        def gone() -> bool:
            gc.collect()
            return socket() is None

        await eventually(gone, timeout=20)
        await browser.aclose()


@pytest.mark.quick
async def test_work_of_one_name_that_fails_apart() -> None:
    """One that recovers, or ends, leaves the entry of another one with the same name."""
    failing: Failing = {}

    async def fails() -> None:
        raise KeyError("injected")

    async def ends() -> None:
        await eventually(lambda: failing)

    async with asyncio.TaskGroup() as group:
        broken = group.create_task(keep_running(fails, name="subscriber", failing=failing))
        await keep_running(ends, name="subscriber", failing=failing)
        assert list(failing.values()) == [("subscriber", "KeyError")]
        broken.cancel()
    assert failing == {}
