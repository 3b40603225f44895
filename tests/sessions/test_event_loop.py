"""Nothing of ours holds the event loop: neither in I/O nor with work, whatever Redis does."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, thread_time
from typing import Any

import pytest

from asgi_cluster.sessions.cache import SessionCache
from tests.sessions.app import client_for, nodes
from tests.sessions.test_users import login, many
from tests.support.servers import start_valkey
from tests.support.waiting import eventually


class Watch:
    """The longest time one callback has held the loop, in CPU time and by the clock."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.clock = 0.0


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch = Watch()
    original = asyncio.events.Handle._run

    def run(self: Any) -> Any:
        cpu, clock = thread_time(), monotonic()
        try:
            return original(self)
        finally:
            watch.cpu = max(watch.cpu, thread_time() - cpu)
            watch.clock = max(watch.clock, monotonic() - clock)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.events.Handle, "_run", run)
        yield watch


@contextmanager
def surroundings_set_apart() -> Iterator[None]:
    """Garbage collections inside see only objects that were made inside.

    A full collection walks every object of the process. After some hundred other tests these are so many that
    it takes longer than what is measured here.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def through_an_outage(prefix: str, monkeypatch: pytest.MonkeyPatch) -> Watch:
    with surroundings_set_apart(), start_valkey() as server:
        async with nodes(server.url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
            await client.post("/login?user=ada")
            pairs = [login(cluster, f"user-{number}") for number in range(10_000)]
            await many([creation for _, creation in pairs])
            for start in range(0, len(pairs), 500):
                await asyncio.gather(
                    *[
                        cluster._parts.service.reader.read(handle, timeout=5)
                        for handle, _ in pairs[start : start + 500]
                    ]
                )
            assert cluster.stats().cache.size > 9_000
            with watching(monkeypatch) as watch:
                server.pause()
                await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=6)
                await asyncio.gather(*[client.get("/show") for _ in range(20)])
                server.resume()
                await eventually(lambda: cluster.stats().bus.lease_remaining > 0, timeout=6)
                server.kill()
                await asyncio.gather(*[client.get("/show") for _ in range(20)])
                server.restart()
                await eventually(lambda: cluster.stats().bus.lease_remaining > 0, timeout=6)
                await client.post("/login?user=ada")
            return watch


async def test_no_callback_holds_the_loop_through_an_outage(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full cache, a server that stops, is killed and comes back: no callback takes 100 ms of CPU."""
    watch = await through_an_outage(prefix, monkeypatch)
    assert watch.cpu < 0.1


async def test_watch_notices_a_callback_that_holds_the_loop(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measure can fail: a flush that works for 150 ms shows."""
    flush = SessionCache.flush

    def slow(self: SessionCache, buckets: frozenset[int] | None = None) -> None:
        until = thread_time() + 0.15
        while thread_time() < until:
            pass
        flush(self, buckets)

    monkeypatch.setattr(SessionCache, "flush", slow)
    watch = await through_an_outage(prefix, monkeypatch)
    assert watch.cpu > 0.1


def test_watch_ignores_the_objects_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection while a callback runs does not walk what was there before the measurement."""
    others = [{"number": [number]} for number in range(300_000)]
    collected = thread_time()
    gc.collect()
    with_others = thread_time() - collected

    async def collect() -> None:
        asyncio.get_running_loop().call_soon(gc.collect)
        await asyncio.sleep(0)

    with surroundings_set_apart(), watching(monkeypatch) as watch:
        asyncio.run(collect())
    assert len(others) == 300_000
    assert watch.cpu < with_others / 2
