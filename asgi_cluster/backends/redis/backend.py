"""Redis as a backend: topologies, the two buses and the stores, and their lifetime."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from ssl import SSLContext
from typing import Any

from asgi_cluster.backends.redis.bus import RedisRoomBus, RedisSessionBus
from asgi_cluster.backends.redis.history import RedisHistory
from asgi_cluster.backends.redis.inbox import Inbox
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.presence import RedisPresence
from asgi_cluster.backends.redis.registration import Registration
from asgi_cluster.backends.redis.registry import Registry
from asgi_cluster.backends.redis.sentinel import SentinelTopology
from asgi_cluster.backends.redis.sharded import ClusterTopology
from asgi_cluster.backends.redis.single import single_server
from asgi_cluster.backends.redis.store import RedisSessionStore
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.backends.redis.topology import Topology
from asgi_cluster.backends.redis.urls import Target, parse_targets
from asgi_cluster.bus.room_bus import RoomReceiver
from asgi_cluster.bus.session_bus import SessionReceiver
from asgi_cluster.bus.stats import BusStats
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from asgi_cluster.ids import Handle
from asgi_cluster.node import Node

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
    """Sessions, rooms, history and presence on one Redis or Valkey; rooms on another one if ``rooms_url`` is
    given.

    Sessions and rooms share one set of subscribers, with its leases and its registration. With a
    ``rooms_url`` each has its own: a spike of broadcasts that costs the rooms their connection costs no
    session.

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
        self._topology = topology = make_topology(target)
        names = Names(prefix, db=target.db, sharded=topology.sharded)
        registry = Registry(topology, names, lease=lease_duration, stale_for=stale_for)
        subscribers = SubscriberSet(topology, lease_duration=lease_duration)
        rooms_topology, rooms_names, rooms_registry, room_subscribers = topology, names, registry, subscribers
        if rooms_target is not None:
            rooms_topology = make_topology(rooms_target)
            rooms_names = Names(prefix, db=rooms_target.db, sharded=rooms_topology.sharded, apart=True)
            # Where only rooms are, no logout waits for a node.
            rooms_registry = Registry(rooms_topology, rooms_names, lease=0.0, stale_for=0.0)
            room_subscribers = SubscriberSet(rooms_topology, lease_duration=lease_duration)
        self._subscribers, self._room_subscribers = subscribers, room_subscribers
        self._registry, self._rooms_registry = registry, rooms_registry
        self._inbox = Inbox(topology, names, lease_duration=lease_duration)
        self.session_bus = RedisSessionBus(subscribers, names, registry, self._inbox)
        self.room_bus = RedisRoomBus(room_subscribers, rooms_names, rooms_registry)
        self.store = RedisSessionStore(topology, names, wait_replicas=wait_replicas)
        self.history = RedisHistory(rooms_topology, rooms_names)
        self.presence = RedisPresence(rooms_topology, rooms_names, rooms_registry)

    @asynccontextmanager
    async def open(self, node: Node, sessions: SessionReceiver, rooms: RoomReceiver) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for subscribers in self._sets():
                await stack.enter_async_context(subscribers.topology.opened(node.failing))
            # A right to run scripts that is missing should stop the start, and not the first visitor.
            await self.store.read(Handle(f"00.{'-' * 22}"), timeout=1.0)
            if not node.listens:
                await stack.enter_async_context(self._inbox.opened(node, sessions))
                yield
                return
            of_sessions = await self.session_bus.listen(node.id, sessions)
            of_rooms = await self.room_bus.listen(node.id, rooms)
            # Presence goes by the registry where the rooms are: what is removed from that one is reported.
            registration = Registration(
                self._rooms_registry, node, sessions.load, removed=sessions.node_removed
            )
            try:
                if self._rooms_registry is self._registry:
                    await stack.enter_async_context(
                        registration.opened(self._subscribers, [of_sessions, of_rooms])
                    )
                else:
                    await stack.enter_async_context(
                        Registration(self._registry, node, sessions.load).opened(
                            self._subscribers, [of_sessions]
                        )
                    )
                    await stack.enter_async_context(registration.opened(self._room_subscribers, [of_rooms]))
            except BusUnavailable as error:
                raise StoreUnavailable(error.reason) from error
            yield

    def _sets(self) -> Sequence[SubscriberSet]:
        return list(dict.fromkeys((self._subscribers, self._room_subscribers)))

    def attach(self, node: Node, sessions: SessionReceiver, rooms: RoomReceiver) -> None:
        """Redis needs a start: nothing to attach to without one."""

    @property
    def ready(self) -> bool:
        sessions = self._subscribers
        return not (sessions.open and not sessions.trusted and self._topology.answering)

    def stats(self) -> BusStats:
        sets = self._sets()
        last = max((each.last_gap for each in sets if each.last_gap is not None), default=None)
        return BusStats(
            connected=all(each.connected for each in sets),
            lease_remaining=self._subscribers.lease_remaining,
            gaps=sum(each.gaps for each in sets),
            reconnects=sum(each.reconnects for each in sets),
            received=sum(each.received for each in sets),
            malformed=0,
            last_gap=None if last is None else last[1],
        )
