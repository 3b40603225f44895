"""On the real stack: a writer on one node, readers on two, faults in between; afterwards the record is
judged.

A read that began at *t* may return a value only if that value was still the current one at *t - L*, or later.
"""

from __future__ import annotations

import asyncio
import random
from time import monotonic

import httpx
import pytest

from asgi_cluster import CacheConfig, SessionConfig
from asgi_cluster.sessions.cache import SessionCache
from tests.sessions.app import client_for, nodes
from tests.support.proxy import Proxy
from tests.support.servers import start_valkey
from tests.support.waiting import eventually

LEASE = 1.0


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["cut", "blackhole", "stall", "stop", "client kill"])
async def test_no_read_is_staler_than_the_lease(prefix: str, fault: str) -> None:
    """Eight seconds of writes every few milliseconds while the readers' links, or the server, fail again and
    again.
    """
    late = await record(prefix, fault)
    assert not late, f"{len(late)} reads broke the bound, the worst by {max(late)}"


@pytest.mark.faults
@pytest.mark.timeout(120)
async def test_record_shows_a_cache_that_ignores_its_lease(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge can judge: with the lease taken out of the cache, a silent link shows as stale reads. Not in
    each record: the session has to be cached when the link falls silent, and read before that is noticed.
    """
    monkeypatch.setattr(SessionCache, "get", lambda self, handle: self._entries.get(handle))
    monkeypatch.setattr(SessionCache, "_may_keep", lambda self, flight: flight.attached)
    for attempt in range(6):
        if await record(f"{prefix}{attempt}", "blackhole", judge_only=True):
            return
    raise AssertionError("six records, and no stale read in any")


async def record(prefix: str, fault: str, *, judge_only: bool = False) -> list[tuple[float, int]]:
    """The reads that broke the bound: by how much, and what they returned."""
    rng = random.Random(fault)
    options = {"sessions": SessionConfig(cache=CacheConfig(lease=LEASE)), "deadline": 0.5}
    with start_valkey() as server:
        async with (
            Proxy(server.url) as proxy,
            nodes(server.url, 1, prefix=prefix, **options) as (writer,),
            nodes(proxy.url, 2, prefix=prefix, **options) as readers,
            client_for(writer) as w,
            client_for(readers[0]) as first,
            client_for(readers[1]) as second,
        ):
            await w.post("/put", json={"n": 0})
            for client in (first, second):
                client.cookies = httpx.Cookies(w.cookies)
            superseded = [0.0]  # superseded[n]: when n + 1 was certainly committed
            reads: list[tuple[float, int]] = []
            until = monotonic() + 8.0

            async def write() -> None:
                n = 0
                while monotonic() < until:
                    n += 1
                    response = await w.post("/put", json={"n": n})
                    if response.status_code != 200:
                        # It may have happened all the same: then the next write of it changes nothing.
                        n -= 1
                        continue
                    superseded.append(monotonic())
                    await asyncio.sleep(0.005)

            async def read(client: httpx.AsyncClient) -> None:
                while monotonic() < until:
                    began = monotonic()
                    response = await client.get("/show")
                    if response.status_code == 200:
                        reads.append((began, response.json()["data"]["n"]))
                    await asyncio.sleep(0.002)

            async def break_things() -> None:
                raw = server.client()
                while monotonic() < until - 2.5:
                    await asyncio.sleep(rng.uniform(0.1, 0.5))
                    match fault:
                        case "cut":
                            proxy.cut()
                        case "blackhole":
                            proxy.blackhole()
                        case "stall":
                            proxy.stall("down")
                        case "stop":
                            server.pause()
                        case "client kill":
                            await asyncio.to_thread(raw.execute_command, "CLIENT", "KILL", "TYPE", "pubsub")
                    await asyncio.sleep(rng.uniform(0.1, 1.8))
                    if fault == "stop":
                        server.resume()
                    else:
                        proxy.heal()
                raw.close()

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write())
                tasks.create_task(read(first))
                tasks.create_task(read(second))
                tasks.create_task(break_things())

            late = []
            for began, n in reads:
                if n + 1 < len(superseded) and began - superseded[n + 1] > LEASE:
                    late.append((began - superseded[n + 1], n))
            assert len(reads) > 500
            if judge_only:
                return late
            hits = sum(cluster.stats().cache.hits for cluster in readers)
            assert hits > 50, "the readers never used their caches: this run shows nothing"
            assert sum(cluster.stats().bus.gaps for cluster in readers) > 0
            await eventually(lambda: all(c.stats().bus.lease_remaining > 0 for c in readers), timeout=5)

            async def agree() -> bool:
                seen = [(await client.get("/show")).json()["data"] for client in (w, first, second)]
                return bool(seen[0] == seen[1] == seen[2])

            await eventually(agree, timeout=3)
            return late
