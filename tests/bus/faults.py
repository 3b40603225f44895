# ruff: noqa: ASYNC110, E501 - real processes have no events to wait for; a table is as wide as it is
"""The table of faults: ``python -m tests.bus.faults`` writes ``docs/faults.md``.

In each scenario one node writes a counter into sixteen sessions, over and over; another reads them through
its cache, and is the one that the fault hits, with the server or alone. A read is *stale* when a newer value
had been confirmed to the writer a lease earlier.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from asgi_cluster.backends.redis.scripts import Script
from asgi_cluster.backends.redis.slots import slot_of
from asgi_cluster.bus.messages import Changed, encode
from tests.bus.nodes import LEASE, our_tasks
from tests.bus.partition import LAGS, Limit, partition
from tests.bus.traffic import DEADLINE, Traffic
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.topologies import RedisCluster, SentinelSet, start_redis_cluster, start_sentinel_set
from tests.support.waiting import eventually

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
    gaps: int = 0
    reconnects: int = 0
    unready: float = 0.0
    untrue: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether every target was."""
        known = self.known is None or self.known <= KNOWN_WITHIN
        trusted = self.trusted is not None and self.trusted <= TRUSTED_WITHIN
        # A loop that shares two cores with the servers adds a little to a deadline.
        prompt = self.longest <= DEADLINE + 0.25
        return known and trusted and prompt and self.stale == 0 and not self.untrue and not self.left

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
            f"{self.gaps} / {self.reconnects}",
            f"false for {self.unready:.2f} s" if self.unready else "true",
            ", ".join(self.left) or "nothing",
        ]
        return [self.name, *figures, "met" if self.met else "**not met**"]


async def play(
    name: str, fault: Fault, url: str, scene: Scene, *, calm: float = 0.7, after: float = LEASE + 1.0
) -> Row:
    """One scenario, from a healthy start to the end of its consequences."""
    row = Row(name)
    connections, objects = open_connections(), our_objects()
    row.left += await _scenario(row, fault, url, scene, calm, after)

    def left() -> list[str]:
        count = (open_connections() - connections).total()
        kinds = [f"{count} {kind}" for kind, count in (our_objects() - objects).items()]
        return [f"{count} connections", *kinds] if count else kinds

    with suppress(AssertionError):  # what does not go in the next ticks stays, and is in the row
        await eventually(lambda: not left(), timeout=2.0, interval=0.05)
    row.left += left()
    return row


async def _scenario(row: Row, fault: Fault, url: str, scene: Scene, calm: float, after: float) -> list[str]:
    async with Traffic(url, url if scene.proxy is None else scene.proxy.url) as traffic:
        reader = traffic.reader
        await eventually(lambda: reader.live and traffic.hits)
        await asyncio.sleep(calm)  # so much traffic before the fault
        began = time.monotonic()
        answers = await fault(scene)
        while not reader.live and time.monotonic() - answers < 10:
            await asyncio.sleep(0.005)
        row.trusted = time.monotonic() - answers if reader.live else None
        await asyncio.sleep(after)  # and so much after it, in which a stale entry would be read
        told = [event[3] for event in reader.receiver.of("gap") if event[3] >= began]
        row.known = told[0] - began if told else None
        await traffic.stop()
        traffic.health.judge_the_end()
        stats = reader.backend.stats()
        row.reads, row.hits, row.refused = traffic.reads, traffic.hits, traffic.refused
        row.stale, row.longest = traffic.stale, traffic.longest
        row.gaps, row.reconnects = stats.gaps, stats.reconnects
        row.unready, row.untrue = traffic.health.unready, list(traffic.health.untrue)
    return our_tasks()


def open_connections() -> Counter[tuple[int, int]]:
    """TCP connections of this process, by their ports."""
    found = psutil.Process().net_connections("tcp")
    return Counter(
        (each.laddr.port, each.raddr.port) for each in found if each.raddr and each.status == "ESTABLISHED"
    )


def our_objects() -> Counter[str]:
    """Objects of this package's classes, by name. But scripts: they are read once and stay."""
    gc.collect()
    kinds = [type(found) for found in gc.get_objects()]
    # Some classes of extension modules have a descriptor as ``__module__``, and not a name.
    ours = [kind for kind in kinds if str(kind.__module__).startswith("asgi_cluster.") and kind is not Script]
    return Counter(kind.__qualname__ for kind in ours)


# The faults


async def lasts(seconds: float) -> None:
    """The fault goes on for so long: a part of the scenario, and not a wait for something."""
    await asyncio.sleep(seconds)


async def _kill(scene: Scene, *, data: bool) -> float:
    if data:
        with scene.server.client() as client:
            client.save()
    scene.server.kill()
    await lasts(1.0)
    await asyncio.to_thread(scene.server.restart, data=data)
    return time.monotonic()


async def kill_empty(scene: Scene) -> float:
    return await _kill(scene, data=False)


async def kill_with_data(scene: Scene) -> float:
    return await _kill(scene, data=True)


def stop(seconds: float) -> Fault:
    async def fault(scene: Scene) -> float:
        scene.server.pause()
        await lasts(seconds)
        scene.server.resume()
        return time.monotonic()

    return fault


async def black_hole(scene: Scene) -> float:
    assert scene.proxy is not None
    scene.proxy.blackhole()
    await lasts(4.0)
    scene.proxy.heal()
    return time.monotonic()


async def deaf(scene: Scene) -> float:
    assert scene.proxy is not None
    scene.proxy.stall("down", only=b"SUBSCRIBE")
    await lasts(4.0)
    scene.proxy.heal()
    return time.monotonic()


async def cut(scene: Scene) -> float:
    assert scene.proxy is not None
    scene.proxy.cut()
    await lasts(2.0)
    scene.proxy.heal()
    return time.monotonic()


def command(*words: str, seconds: float = 0.0) -> Fault:
    async def fault(scene: Scene) -> float:
        with scene.server.client() as client:
            client.execute_command(*words)
        await lasts(seconds)
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
        killed = "client_output_buffer_limit_disconnections"
        await eventually(lambda: client.info("stats")[killed])
    scene.proxy.heal()
    return time.monotonic()


async def nothing(scene: Scene) -> float:
    """To see whether the measurement would notice."""
    await lasts(1.0)
    return time.monotonic()


async def full(scene: Scene) -> float:
    with scene.server.client() as client:
        client.config_set("maxmemory", "1mb")
        await lasts(3.0)
        client.config_set("maxmemory", "0")
    return time.monotonic()


def failover(how: str) -> Fault:
    async def fault(scene: Scene) -> float:
        servers = scene.sentinels
        assert servers is not None
        old = servers.primary
        old.kill() if how == "kill" else old.pause()

        async def replaced() -> bool:
            return await asyncio.to_thread(lambda: servers.primary) is not old

        await eventually(replaced, timeout=60, interval=0.02)
        return time.monotonic()

    return fault


def replacement(how: str) -> Fault:
    async def fault(scene: Scene) -> float:
        cluster = scene.cluster
        assert cluster is not None
        old = cluster.primaries()[0]
        replica = cluster.replica_of(old)
        old.kill() if how == "kill" else old.pause()
        await eventually(lambda: replica.role() == "master", timeout=60, interval=0.02)
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
        await lasts(0.05)  # about a second in all
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
    "CLIENT PAUSE for 3 s": (command("CLIENT", "PAUSE", "3000", "ALL", seconds=3.0), False),
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
    """All scenarios whose name holds ``chosen``; the tables are written when that was all of them."""
    rows: list[Row] = []
    limits: list[Limit] = []
    for name in [*SINGLE, *SENTINEL, *CLUSTER]:
        if chosen in name:
            row = await (single(name) if name in SINGLE else many(name))
            rows.append(row)
            print(" | ".join(row.cells()), *row.untrue, flush=True)
    for lag in LAGS:
        if chosen in "partition":
            limits.append(await partition(lag))
            print(" | ".join(limits[-1].cells()), flush=True)
    if not chosen:
        TABLE.write_text(PREFACE + table(FAULTS, rows) + PARTITION + table(LIMITS, limits))
    return 0 if all(row.met for row in (*rows, *limits)) else 1


def table(head: Sequence[str], rows: Sequence[Row | Limit]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


FAULTS = [
    "fault",
    "known after",
    "trusted again",
    "reads",
    "from cache",
    "refused",
    "longest",
    "stale",
    "gaps / reconnects",
    "ready",
    "left",
    "",
]
LIMITS = [
    "`min-replicas-to-write`, `-max-lag`",
    "old primary takes writes until",
    "stale from the cache until",
    "stale from the old primary until",
    "trusted again",
    "",
]
PREFACE = f"""# Faults, and what a node does

Written by `uv run --group test python -m tests.bus.faults`, against real servers. One node writes 16 sessions all the time,
another reads them through its cache (lease {LEASE:g} s, deadline {DEADLINE:g} s) and is hit by the fault.

- *known after*: from the fault to the gap, at most {KNOWN_WITHIN:g} s. *No gap*: nothing was lost and no gap reported.
- *trusted again*: from the moment the server answers (a new primary: is elected; slots: have moved) to a live
  lease, at most {TRUSTED_WITHIN:g} s.
- *refused*: reads that raised `StoreUnavailable`; *longest*: the longest read, whatever came of it.
- *stale*: reads older than the lease.
- *gaps / reconnects*: as `stats()` counts them. *ready*: what the node reported meanwhile; false is right
  while the store answers and the bus does not, and wrong while neither answers, or while the cache may be trusted.
- *left*: tasks, connections and objects that were there after the nodes had been stopped, and not before.

A row is met when the bounds hold, nothing was stale, nothing is left, and what `ready` and `stats()` said was true:
looked at every 10 ms, and at the end against the gaps that were reported.

"""
PARTITION = f"""
## A partition in which the old primary still answers

The limit of what is promised. Sentinels, replica and one node are on one side; the other node stays with the old
primary, which answers it, and cannot see a successor. Times are from the partition on, which lasts until 8 s after the
election. What the *cache* serves there is bounded, by a lease ({LEASE:g} s) from the last heartbeat on: an old primary that refuses
writes proves nothing any more. It refuses them some time after the lag: it counts in whole seconds, and looks once in
a second. Without `min-replicas-to-write` there is no bound, and the node says so when
it starts. What the old primary itself answers is as old as the partition in either case (*never*: the cache answered
everything), and a write that it takes before it refuses is lost when it follows the new one. *Trusted again*: from the
end of the partition to a lease of the new primary's.

"""

if __name__ == "__main__":
    sys.exit(asyncio.run(main(" ".join(sys.argv[1:]))))
