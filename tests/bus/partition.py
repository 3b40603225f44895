"""A partition in which the old primary still answers: what is promised there, and what is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tests.bus.nodes import LEASE
from tests.bus.traffic import Traffic
from tests.support.machine import LOCAL
from tests.support.proxy import Proxy
from tests.support.servers import start_valkey
from tests.support.topologies import SentinelSet, start_sentinels
from tests.support.waiting import eventually

LAGS = (None, 2)
_BACK_WITHIN = 3.0  # a sentinel is tried again once a second, and asked then
_MARGIN = 0.25  # seconds: a loop that shares two cores with the servers
_CALM = 1.0  # seconds of traffic before the partition
_HELD = 8.0  # seconds that it lasts, from the election on
_SOON = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")


@dataclass
class Limit:
    """What was seen by a node that is on the old primary's side."""

    lag: int | None
    """``min-replicas-max-lag`` in seconds, with one replica to write to; ``None``: neither is set."""
    elected: float = 0.0
    """Seconds from the partition to the new primary, as the other side saw it."""
    refused: float | None = None
    """Seconds from the partition to the last write that the old primary took; ``None``: it took all."""
    cached: float | None = None
    """Seconds from the partition to the last stale read from the cache; ``None``: there was none."""
    stored: float | None = None
    """The same, of those from the old primary itself."""
    healed: float | None = None
    """Seconds from the end of the partition to a lease of the new primary's; ``None``: never."""

    @property
    def met(self) -> bool:
        """Whether the cache kept its bound, a lease from the last heartbeat that the old primary took, and
        the node came back. Without a lag it takes all of them, and there is no bound.
        """
        bounded = self.lag is None or (
            self.refused is not None and (self.cached or 0.0) <= self.refused + LEASE + _MARGIN
        )
        return bounded and self.healed is not None and self.healed <= _BACK_WITHIN

    def cells(self) -> list[str]:
        """As they stand in the table."""

        def seconds(figure: float | None, none: str) -> str:
            return none if figure is None else f"{figure:.1f} s"

        setting = "not set" if self.lag is None else f"1 replica, lag {self.lag} s"
        over = f"to its end ({self.elected + _HELD:.0f} s)"
        return [
            setting,
            seconds(self.refused, over),
            over if self.cached and self.cached > self.elected + _HELD - 1 else seconds(self.cached, "never"),
            over if self.stored and self.stored > self.elected + _HELD - 1 else seconds(self.stored, "never"),
            seconds(self.healed, "never"),
            "met" if self.met else "**not met**",
        ]


@dataclass
class Split:
    """A Sentinel set that a partition can go through."""

    servers: SentinelSet
    primary: Proxy
    sentinels: Sequence[Proxy]

    @property
    def old_side(self) -> str:
        """For a node that stays with the old primary."""
        hosts = ",".join(f"{LOCAL}:{proxy.port}" for proxy in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.servers.name}/0"

    def part(self) -> None:
        """The old primary, with all who speak to it but sentinels and replicas, from the rest."""
        self.primary.isolate(b"sentinel-", b"REPLCONF")
        for proxy in self.sentinels:
            proxy.cut()

    def heal(self) -> None:
        for proxy in (self.primary, *self.sentinels):
            proxy.heal()


@asynccontextmanager
async def split_set(*options: str) -> AsyncIterator[Split]:
    """All nodes and servers reach the first primary through one proxy."""
    async with AsyncExitStack() as stack:
        first = stack.enter_context(start_valkey(*_SOON, *options))
        primary = await stack.enter_async_context(Proxy(first.url))
        follow = ("--replicaof", LOCAL, str(primary.port))
        replicas = []
        for _ in range(2):
            replicas.append(await asyncio.to_thread(start_valkey, *_SOON, *options, *follow))
            stack.callback(replicas[-1].stop)
        servers = await asyncio.to_thread(start_sentinels, first, replicas, port=primary.port)
        stack.callback(servers.stop)
        sentinels = [await stack.enter_async_context(Proxy(each.url)) for each in servers.sentinels]
        yield Split(servers, primary, sentinels)


async def partition(lag: int | None) -> Limit:
    """One run. ``lag``: ``min-replicas-max-lag``; ``None``: a primary that is alone takes writes."""
    limit = Limit(lag)
    options = () if lag is None else ("--min-replicas-to-write", "1", "--min-replicas-max-lag", str(lag))
    async with split_set(*options) as split, Traffic(split.servers.url, split.old_side) as traffic:
        replicas = split.servers.servers[1:]
        await eventually(lambda: traffic.reader.live and traffic.hits)
        await asyncio.sleep(_CALM)
        began = time.monotonic()
        split.part()
        new = await eventually(
            lambda: [server for server in replicas if server.role() == "master"], timeout=60, interval=0.02
        )
        limit.elected = time.monotonic() - began
        await asyncio.sleep(_HELD)
        limit.cached = _since(began, traffic.stale_from_cache)
        limit.stored = _since(began, traffic.stale_from_store)
        limit.refused = None if traffic.reader.live else traffic.last_beat - began
        ended = time.monotonic()
        split.heal()
        await eventually(lambda: str(new[0].port) in repr(traffic.reader.backend._topology), timeout=20)
        await eventually(lambda: traffic.reader.live, timeout=20)
        limit.healed = time.monotonic() - ended
    return limit


def _since(began: float, moments: Sequence[float]) -> float | None:
    return max(moments) - began if moments else None
