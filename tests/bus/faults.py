# ruff: noqa: ASYNC110, E501 - real processes have no events to wait for; a table is as wide as it is
"""The table of faults: ``python -m tests.bus.faults`` writes ``docs/faults.md``.

In each scenario one node writes a counter into sixteen sessions, over and over; another reads them through
its cache, and is the one that the fault hits, with the server or alone. A read is *stale* when a newer value
had been confirmed to the writer a lease earlier.
"""

from __future__ import annotations

import asyncio
import sys
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from asgi_cluster.backends.redis.slots import slot_of
from asgi_cluster.bus.messages import Changed, MalformedMessage, decode, encode
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, new_token
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.cached import CachedStore
from tests.bus.nodes import LEASE, Receiver, opened, our_tasks
from tests.contract.drafts import create
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.topologies import RedisCluster, SentinelSet, start_redis_cluster, start_sentinel_set

DEADLINE = 1.0
KNOWN_WITHIN = 2.0
TRUSTED_WITHIN = 1.0
TABLE = Path(__file__).parents[2] / "docs" / "faults.md"

Fault = Callable[["Scene"], Awaitable[float]]
"""Does its worst, and returns the moment at which the server answers again."""


@dataclass
class Scene:
    """What a fault can lay its hands on."""

    server: Server
    proxy: Proxy | None
    sentinels: SentinelSet | None = None
    cluster: RedisCluster | None = None


@dataclass
class Row:
    """What was seen."""

    name: str
    known: float | None = None
    trusted: float | None = None
    reads: int = 0
    hits: int = 0
    refused: int = 0
    stale: int = 0
    longest: float = 0.0
    left: list[str] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether every target was."""
        known = self.known is None or self.known <= KNOWN_WITHIN
        trusted = self.trusted is not None and self.trusted <= TRUSTED_WITHIN
        # A loop that shares two cores with the servers adds a little to a deadline.
        return known and trusted and self.stale == 0 and self.longest <= DEADLINE + 0.25 and not self.left

    def cells(self) -> list[str]:
        """As they stand in the table."""
        known = "no gap" if self.known is None else f"{self.known:.2f} s"
        trusted = "never" if self.trusted is None else f"{max(0.0, self.trusted):.2f} s"
        share = f"{100 * self.hits / max(1, self.reads):.0f} %"
        figures = [
            known,
            trusted,
            f"{self.reads}",
            share,
            f"{self.refused}",
            f"{self.longest:.2f} s",
            f"{self.stale}",
        ]
        return [self.name, *figures, "met" if self.met else "**not met**"]


class CacheReceiver(Receiver):
    """Does with what arrives what the cluster's dispatch does."""

    cache: SessionCache

    def session_message(self, payload: bytes) -> None:
        try:
            message = decode(payload)
        except MalformedMessage:
            self.cache.flush()
            return
        if isinstance(message, Changed):
            self.cache.drop(Handle(message.handle))

    def gap(self, reason: str, buckets: frozenset[int] | None) -> None:
        super().gap(reason, buckets)
        self.cache.flush(buckets)


async def play(
    name: str, fault: Fault, url: str, scene: Scene, *, calm: float = 0.7, after: float = LEASE + 1.0
) -> Row:
    """One scenario, from a healthy start to the end of its consequences."""
    row = Row(name)
    prefix = f"f{new_token()}"
    faulted = scene.proxy.url if scene.proxy is not None else url
    receiver = CacheReceiver()
    async with (
        opened(url, prefix, listen=False) as writer,
        opened(faulted, prefix, receiver=receiver) as reader,
    ):
        cache = receiver.cache = SessionCache(reader.bus.lease, ttl=30, max_entries=1000)
        store = CachedStore(reader.backend.store, cache)
        handles = [(await create(writer.backend.store)).handle for _ in range(16)]
        confirmed: dict[Handle, tuple[list[float], list[int]]] = {handle: ([0.0], [0]) for handle in handles}

        async def write() -> None:
            number = 0
            while True:
                number += 1
                handle = handles[number % len(handles)]
                try:
                    outcome = await writer.backend.store.write(
                        handle,
                        changed={"n": msgspec.msgpack.encode(number)},
                        removed=(),
                        write_id=new_token(),
                        expected=None,
                        message=encode(Changed(handle, "writer")),
                        timeout=DEADLINE,
                    )
                except StoreUnavailable:
                    outcome = "gone"
                if outcome == "written":
                    times, numbers = confirmed[handle]
                    times.append(time.monotonic())
                    numbers.append(number)
                await asyncio.sleep(0.003)

        async def read(offset: int) -> None:
            turn = offset
            while True:
                turn += 1
                handle = handles[turn % len(handles)]
                asked = time.monotonic()
                before = cache.stats().hits
                try:
                    entry = await store.read(handle, timeout=DEADLINE)
                except StoreUnavailable:
                    row.refused += 1
                else:
                    row.hits += cache.stats().hits > before
                    times, numbers = confirmed[handle]
                    bound = numbers[bisect_right(times, time.monotonic() - LEASE) - 1]
                    if entry.record is not None:
                        number = msgspec.msgpack.decode(entry.record.fields.get("n", b"\x00"))
                        row.stale += number < bound
                row.reads += 1
                row.longest = max(row.longest, time.monotonic() - asked)
                await asyncio.sleep(0.001)

        running = [asyncio.ensure_future(each) for each in (write(), read(0), read(5))]
        try:
            await asyncio.sleep(calm)
            began = time.monotonic()
            answers = await fault(scene)
            while not reader.live and time.monotonic() - answers < 10:
                await asyncio.sleep(0.005)
            row.trusted = time.monotonic() - answers if reader.live else None
            await asyncio.sleep(after)
            told = [event[3] for event in receiver.of("gap") if event[3] >= began]
            row.known = told[0] - began if told else None
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)
    row.left = our_tasks()
    return row


# The faults


async def _kill(scene: Scene, *, data: bool) -> float:
    if data:
        with scene.server.client() as client:
            client.save()
    scene.server.kill()
    await asyncio.sleep(1.0)
    await asyncio.to_thread(scene.server.restart, data=data)
    return time.monotonic()


async def kill_empty(scene: Scene) -> float:
    return await _kill(scene, data=False)


async def kill_with_data(scene: Scene) -> float:
    return await _kill(scene, data=True)


def stop(seconds: float) -> Fault:
    async def fault(scene: Scene) -> float:
        scene.server.pause()
        await asyncio.sleep(seconds)
        scene.server.resume()
        return time.monotonic()

    return fault


async def black_hole(scene: Scene) -> float:
    assert scene.proxy is not None
    scene.proxy.blackhole()
    await asyncio.sleep(4.0)
    scene.proxy.heal()
    return time.monotonic()


async def deaf(scene: Scene) -> float:
    assert scene.proxy is not None
    scene.proxy.stall("down", only=b"SUBSCRIBE")
    await asyncio.sleep(4.0)
    scene.proxy.heal()
    return time.monotonic()


async def cut(scene: Scene) -> float:
    assert scene.proxy is not None
    scene.proxy.cut()
    await asyncio.sleep(2.0)
    scene.proxy.heal()
    return time.monotonic()


def command(*words: str, lasts: float = 0.0) -> Fault:
    async def fault(scene: Scene) -> float:
        with scene.server.client() as client:
            client.execute_command(*words)
        await asyncio.sleep(lasts)
        return time.monotonic()

    return fault


async def output_buffer(scene: Scene) -> float:
    assert scene.proxy is not None
    with scene.server.client() as client:
        client.config_set("client-output-buffer-limit", "pubsub 64kb 32kb 1")
        scene.proxy.stall("down", only=b"SUBSCRIBE")
        channel = next(name for name in client.pubsub_channels() if name.endswith(b":sessions"))
        await asyncio.to_thread(
            lambda: [client.publish(channel, encode(Changed("00." + "x" * 50_000, ""))) for _ in range(400)]
        )
    await asyncio.sleep(0.2)
    scene.proxy.heal()
    return time.monotonic()


async def nothing(scene: Scene) -> float:
    """To see whether the measurement would notice."""
    await asyncio.sleep(1.0)
    return time.monotonic()


async def full(scene: Scene) -> float:
    with scene.server.client() as client:
        client.config_set("maxmemory", "1mb")
        await asyncio.sleep(3.0)
        client.config_set("maxmemory", "0")
    return time.monotonic()


def failover(how: str) -> Fault:
    async def fault(scene: Scene) -> float:
        servers = scene.sentinels
        assert servers is not None
        old = servers.primary
        old.kill() if how == "kill" else old.pause()
        while await asyncio.to_thread(lambda: servers.primary) is old:
            await asyncio.sleep(0.02)
        return time.monotonic()

    return fault


def replacement(how: str) -> Fault:
    async def fault(scene: Scene) -> float:
        cluster = scene.cluster
        assert cluster is not None
        old = cluster.primaries()[0]
        replica = cluster.replica_of(old)
        old.kill() if how == "kill" else old.pause()
        while replica.role() != "master":
            await asyncio.sleep(0.02)
        return time.monotonic()

    return fault


async def migration(scene: Scene) -> float:
    cluster = scene.cluster
    assert cluster is not None
    (first, last, _), (_, _, target), *_ = sorted(cluster.slots(), key=lambda row: row[0])
    slots = {slot_of(f"{{{bucket:02x}}}") for bucket in range(256)}
    await asyncio.to_thread(cluster.move, sorted(slot for slot in slots if first <= slot <= last), target)
    return time.monotonic()


async def cluster_links(scene: Scene) -> float:
    cluster = scene.cluster
    assert cluster is not None

    def kill() -> None:
        for node in cluster.primaries():
            for other in cluster.primaries():
                if other is not node:
                    with node.client() as client, other.client() as asked:
                        identity = asked.execute_command("CLUSTER", "MYID")
                        client.execute_command("DEBUG", "CLUSTERLINK", "KILL", "ALL", identity)

    for _ in range(20):
        await asyncio.to_thread(kill)
        await asyncio.sleep(0.05)
    return time.monotonic()


SINGLE: dict[str, tuple[Fault, bool]] = {
    "kill -9, back empty after 1 s": (kill_empty, False),
    "kill -9, back with data and another run id": (kill_with_data, False),
    "SIGSTOP for 1 s": (stop(1.0), False),
    "SIGSTOP for 3 s": (stop(3.0), False),
    "SIGSTOP for 10 s": (stop(10.0), False),
    "black hole without RST for 4 s": (black_hole, True),
    "the subscriber's connection alone is stalled for 4 s": (deaf, True),
    "connections cut and refused for 2 s": (cut, True),
    "CLIENT KILL of the subscribers": (command("CLIENT", "KILL", "TYPE", "pubsub"), False),
    "CLIENT PAUSE for 3 s": (command("CLIENT", "PAUSE", "3000", "ALL", lasts=3.0), False),
    "output-buffer kill of the subscriber": (output_buffer, True),
    "memory full for 3 s": (full, False),
    "FLUSHALL": (command("FLUSHALL"), False),
}
SENTINEL = {"Sentinel: primary killed": failover("kill"), "Sentinel: primary stopped": failover("stop")}
CLUSTER = {
    "Cluster: the slots of a third of all sessions migrated": migration,
    "Cluster: links between the nodes killed": cluster_links,
    "Cluster: a primary killed": replacement("kill"),
    "Cluster: a primary stopped": replacement("stop"),
}


async def single(name: str) -> Row:
    """One scenario on a server of its own."""
    fault, proxied = SINGLE[name]
    async with AsyncExitStack() as stack:
        server = stack.enter_context(start_valkey("--dbfilename", "dump.rdb"))
        proxy = await stack.enter_async_context(Proxy(server.url)) if proxied else None
        return await play(name, fault, server.url, Scene(server, proxy))


async def many(name: str) -> Row:
    """One scenario on a Sentinel set or a Cluster of its own."""
    if name in SENTINEL:
        with start_sentinel_set() as servers:
            return await play(
                name, SENTINEL[name], servers.url, Scene(servers.primary, None, sentinels=servers)
            )
    with start_redis_cluster() as cluster:
        return await play(name, CLUSTER[name], cluster.url, Scene(cluster.nodes[0], None, cluster=cluster))


async def main(chosen: str) -> int:
    """All scenarios whose name holds ``chosen``; the table is written when that was all of them."""
    head = ["fault", "known after", "trusted again", "reads", "from cache", "refused", "longest", "stale", ""]
    lines = [head, ["---"] * len(head)]
    rows: list[Row] = []
    for name in [*SINGLE, *SENTINEL, *CLUSTER]:
        if chosen in name:
            rows.append(await (single(name) if name in SINGLE else many(name)))
            print(" | ".join(rows[-1].cells()), *rows[-1].left, flush=True)
    lines += [row.cells() for row in rows]
    if not chosen:
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        TABLE.write_text(PREFACE + table + "\n")
    return 0 if all(row.met for row in rows) else 1


PREFACE = f"""# Faults, and what a node does

Written by `uv run python -m tests.bus.faults`, against real servers. One node writes 16 sessions all the time,
another reads them through its cache (lease {LEASE:g} s, deadline {DEADLINE:g} s) and is hit by the fault.

- *known after*: from the fault to the gap, at most {KNOWN_WITHIN:g} s. *No gap*: nothing was lost and nothing told.
- *trusted again*: from the moment the server answers (a new primary: is elected; slots: have moved) to a live
  lease, at most {TRUSTED_WITHIN:g} s.
- *refused*: reads that raised `StoreUnavailable`; *longest*: the longest read, whatever came of it.
- *stale*: reads older than the lease. A row is met when there is none, the bounds hold and no task is left behind.

Not bounded, and not in the table: a partition in which an old primary still takes writes. A node on its side reads
there what the others cannot have changed, until `min-replicas-max-lag` stops that primary.

"""

if __name__ == "__main__":
    sys.exit(asyncio.run(main(" ".join(sys.argv[1:]))))
