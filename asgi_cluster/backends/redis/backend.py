"""Redis as a backend: topology, bus and stores, and their lifetime."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ssl import SSLContext
from typing import Any

from asgi_cluster.backends.redis.bus import RedisBus
from asgi_cluster.backends.redis.history import RedisHistory
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.presence import RedisPresence
from asgi_cluster.backends.redis.sentinel import SentinelTopology
from asgi_cluster.backends.redis.sharded import ClusterTopology
from asgi_cluster.backends.redis.single import Topology, single_server
from asgi_cluster.backends.redis.store import RedisSessionStore
from asgi_cluster.backends.redis.urls import Target, parse_targets
from asgi_cluster.bus.bus import Receiver
from asgi_cluster.ids import Handle, NodeId
from asgi_cluster.tasks import Failing

__all__ = ["RedisBackend"]


def make_topology(target: Target) -> Topology:
    """The topology that ``target`` names; connects to nothing yet."""
    match target.kind:
        case "sentinel":
            return SentinelTopology(target)
        case "cluster":
            return ClusterTopology(target)
        case "single":
            return single_server(target.primary)


class RedisBackend:
    """Sessions, bus, history and presence on one Redis or Valkey; rooms on another one if ``rooms_url`` is
    given.

    Raises:
        ValueError: a URL cannot work.
    """

    needs_start = True

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        lease_duration: float,
        stale_for: float = 0.0,
        rooms_url: str | None = None,
        ssl_context: SSLContext | None = None,
        credential_provider: Any = None,
        wait_replicas: int = 0,
    ) -> None:
        target, rooms_target = parse_targets(
            url, rooms_url, ssl_context=ssl_context, credential_provider=credential_provider
        )
        self._topology = make_topology(target)
        names = Names(prefix, db=target.db, sharded=self._topology.sharded)
        self._topologies = [self._topology]
        rooms_topology, rooms_names, rooms = self._topology, names, None
        if rooms_target is not None:
            rooms_topology = make_topology(rooms_target)
            rooms_names = Names(prefix, db=rooms_target.db, sharded=rooms_topology.sharded, apart=True)
            rooms = (rooms_topology, rooms_names)
            self._topologies.append(rooms_topology)
        self.bus = RedisBus(
            self._topology, names, lease_duration=lease_duration, stale_for=stale_for, rooms=rooms
        )
        self.store = RedisSessionStore(self._topology, names, wait_replicas=wait_replicas)
        self.history = RedisHistory(rooms_topology, rooms_names)
        self.presence = RedisPresence(rooms_topology, rooms_names, self.bus)

    @asynccontextmanager
    async def open(
        self, node: NodeId, receiver: Receiver, *, listen: bool, failing: Failing | None = None
    ) -> AsyncIterator[None]:
        """See ``Backend.open``."""
        async with AsyncExitStack() as stack:
            for topology in self._topologies:
                await stack.enter_async_context(topology.opened(failing))
            # A right to run scripts that is missing should stop the start, and not the first visitor.
            await self.store.read(Handle(f"00.{'-' * 22}"), timeout=1.0)
            enter = self.bus.opened if listen else self.bus.publishing
            await stack.enter_async_context(enter(node, receiver, failing))
            yield

    def attach(self, node: NodeId, receiver: Receiver, *, listen: bool) -> None:
        """Redis needs a start: nothing to attach to without one."""

    @property
    def ready(self) -> bool:
        """See ``Backend.ready``."""
        return not self.bus.receiving_nothing
