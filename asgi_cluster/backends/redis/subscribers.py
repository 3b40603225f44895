"""What the primaries of one topology push to this node: which channel is subscribed where, and its lease."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from asgi_cluster.backends.redis.errors import ConnectionBroken
from asgi_cluster.backends.redis.lifetime import Background, background
from asgi_cluster.backends.redis.listener import Heartbeat
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.quorum import common_ground
from asgi_cluster.backends.redis.registry import InboxBeat, Registry, SideBeat
from asgi_cluster.backends.redis.single import Topology
from asgi_cluster.backends.redis.subscriber import Subscriber
from asgi_cluster.bus.bus import SUBSCRIBED_AGAIN, Receiver
from asgi_cluster.bus.lease import Lease
from asgi_cluster.exceptions import NotStarted
from asgi_cluster.ids import BUCKETS, NodeId
from asgi_cluster.tasks import Failing

__all__ = ["SubscriberSet"]

logger = logging.getLogger("asgi_cluster.bus")

_UNKNOWN = "?"


class SubscriberSet:
    """One subscriber, and one lease, per primary. Carries sessions, or rooms, or both.

    With neither it carries only what is posted to this node: the node is not registered then, and there is
    one subscriber, at the primary that has the node's channel.
    """

    def __init__(
        self,
        topology: Topology,
        names: Names,
        *,
        lease_duration: float,
        sessions: bool,
        rooms: bool,
        stale_for: float = 0.0,
    ) -> None:
        self.topology = topology
        self.names = names
        self._duration = lease_duration
        self._stale_for = stale_for
        self._carries_sessions = sessions
        self._carries_rooms = rooms
        self._lease = Lease(lease_duration)  # of the only primary, when there is only one
        self._no_lease = Lease(lease_duration)  # never renewed: of channels without a subscriber
        self._subscribers: dict[Primary, Subscriber] = {}
        self._running: dict[Primary, asyncio.Task[None]] = {}
        self._homes: dict[str, Subscriber] = {}
        self._wanted: set[str] = set()
        self._lost: set[str] = set()
        self._buckets: dict[str, int] = {}
        self._fixed: frozenset[str] = frozenset()
        self._receiver: Receiver | None = None
        self._tasks: Background | None = None
        self._open = False
        self._node = NodeId("")
        self.registry: Registry | None = None
        self.gaps = 0
        self.last_gap: tuple[float, str] | None = None
        """When (the loop's time) and why."""
        self._received = self._reconnects = 0

    @asynccontextmanager
    async def opened(
        self, node: NodeId, receiver: Receiver, failing: Failing | None = None
    ) -> AsyncIterator[None]:
        """Registered and receiving while entered. Raises ``StoreUnavailable``, ``BusUnavailable``."""
        if self._carries_sessions or self._carries_rooms:
            self.registry = self.registry_for(node, receiver.load)
        registry, self._node = self.registry, node
        self._receiver = receiver
        self._wanted = {self.names.node_channel(node)}
        if self._carries_sessions:
            buckets = range(BUCKETS) if self.names.sharded else range(1)
            self._buckets = {self.names.sessions_channel(f"{bucket:02x}"): bucket for bucket in buckets}
            self._wanted |= self._buckets.keys()
        self._fixed = frozenset(self._wanted)
        try:
            async with background(failing) as tasks:
                self._tasks = tasks
                await asyncio.gather(*self._plan())
                self._open = True
                self.topology.watch(self._replan)
                self._replan()
                if registry is not None:
                    lease = partial(self.lease_of, self.names.nodes())
                    tasks.keep(partial(registry.run, lease), name="registry")
                try:
                    yield
                finally:
                    self.topology.watch(None)
                    self._open = False
            # Only now: a beat of ours must not find the registration gone and renew it.
            if registry is not None and self.topology.answering:
                await registry.leave()
        finally:
            self._received, self._reconnects = self.received, self.reconnects
            for subscriber in self._subscribers.values():
                subscriber.lease.revoke()
            self._subscribers.clear()
            self._running.clear()
            self._homes.clear()
            self._wanted.clear()
            self._lost.clear()
            self._tasks = self._receiver = None

    def registry_for(self, node: NodeId, load: Callable[[], tuple[int, int]]) -> Registry:
        """The registry at these servers, for a node that may not be in it."""
        # Where only rooms are, no logout waits for a node.
        lease = self._duration if self._carries_sessions else 0.0
        return Registry(self.topology, self.names, node, load, lease=lease, stale_for=self._stale_for)

    # Subscribers and their channels

    def _plan(self) -> list[asyncio.Future[None]]:
        """One subscriber per primary, and each channel at the primary that has it now."""
        assert self._tasks is not None
        started: list[asyncio.Future[None]] = []
        primaries = self.topology.primaries()
        if self.registry is None:
            home = self.topology.home(self.names.node_channel(self._node))
            primaries = [primary for primary in primaries if primary is home]
        fresh = [primary for primary in primaries if primary not in self._subscribers]
        for primary in fresh:
            lease = Lease(self._duration) if self.names.sharded else self._lease
            self._subscribers[primary] = Subscriber(
                primary, lease, self, sharded=self.names.sharded, vital=self._fixed
            )
        for channel in sorted(self._wanted):
            self._settle(channel)
        for primary in fresh:
            reconnecting = self._subscribers[primary].reconnecting
            started.append(reconnecting.started)
            self._running[primary] = self._tasks.keep(reconnecting.run, name="subscriber")
        for primary in [primary for primary in self._subscribers if primary not in primaries]:
            subscriber = self._subscribers.pop(primary)
            self._running.pop(primary).cancel()
            self._received += subscriber.received
            self._reconnects += max(0, subscriber.connections - 1)
        return started

    def _replan(self) -> None:
        if self._open:
            self._plan()

    def _settle(self, channel: str) -> Subscriber | None:
        primary = self.topology.home(channel)
        home = None if primary is None else self._subscribers.get(primary)
        before = self._homes.get(channel)
        if before is home:
            return home
        if home is None:
            del self._homes[channel]
        else:
            self._homes[channel] = home
            home.want(channel)
        if before is not None:
            before.unsubscribe(channel)
            self.gap("a channel has moved", frozenset((channel,)))
        return home

    def lease_of(self, key: str) -> Lease:
        """The lease of the primary that has ``key``."""
        primary = self.topology.home(key)
        subscriber = None if primary is None else self._subscribers.get(primary)
        return self._no_lease if subscriber is None else subscriber.lease

    def lease(self, channel: str) -> Lease:
        """The lease that vouches for ``channel``."""
        if not self.names.sharded:
            return self._lease
        home = self._homes.get(channel)
        # A primary's lease says nothing of a channel that has yet to be subscribed there.
        return home.lease if home is not None and home.is_subscribed(channel) else self._no_lease

    def run_id(self, channel: str) -> str:
        """Of the server where ``channel`` is subscribed."""
        home = self._homes.get(channel)
        # A message may still come from a channel's old home, whose run id is not kept.
        return _UNKNOWN if home is None else home.run_id

    # Rooms

    async def subscribe(self, room: str) -> None:
        """See ``Bus.subscribe``."""
        if self._receiver is None:
            raise NotStarted("joining a room")
        channel = self.names.room_channel(room)
        self._wanted.add(channel)
        home = self._settle(channel)
        if home is None or not home.connected:
            self._lost.add(channel)
        if home is not None:
            await home.subscribe(channel)

    def unsubscribe(self, room: str) -> None:
        """See ``Bus.unsubscribe``."""
        channel = self.names.room_channel(room)
        self._wanted.discard(channel)
        self._lost.discard(channel)
        home = self._homes.pop(channel, None)
        if home is not None:
            home.unsubscribe(channel)

    # Events of the subscribers

    def heartbeat(self, primary: Primary) -> Heartbeat:
        """See ``Listener.heartbeat``."""
        if self.registry is None:
            return InboxBeat(self.names, self._node)
        if self.topology.home(self.names.nodes()) is primary:
            return self.registry
        tag = self.topology.tag_at(primary)
        if tag is None:
            raise ConnectionBroken("this primary has no slots", sent=False)
        return SideBeat(self.names, self.registry.node, tag)

    def message(self, channel: str, payload: bytes) -> None:
        """See ``Listener.message``."""
        if self._receiver is None:
            return
        room = self.names.room_of_channel(channel) if self._carries_rooms else None
        if room is not None:
            self._receiver.room_message(room, payload)
        else:
            self._receiver.session_message(payload)

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        """See ``Listener.gap``."""
        self.topology.refresh_soon()
        fresh = channels - self._lost  # the others' gap was reported, and nothing was trusted since
        self._lost |= channels & self._wanted
        if self._receiver is None or not self._open or not fresh:
            return
        self.gaps += 1
        self.last_gap = asyncio.get_running_loop().time(), reason
        buckets, rooms = self._split(fresh)
        if buckets is None or buckets:
            self._receiver.gap(reason, buckets)
        if rooms is None or rooms:
            self._receiver.rooms_gap(reason, rooms)

    def acknowledged(self, primary: Primary, channels: frozenset[str]) -> None:
        """See ``Listener.acknowledged``."""
        self.topology.reconnect_now(primary)
        back = channels & self._lost
        self._lost -= back
        if self._receiver is None or not self._open or not back:
            return
        buckets, rooms = self._split(back)
        if buckets is None or buckets:
            # What was read between the gap and now may have changed without a message: it must not be kept.
            self._receiver.gap(SUBSCRIBED_AGAIN, buckets)
        if rooms is None or rooms:
            self._receiver.rooms_restored(rooms)

    def reported(self) -> None:
        """See ``Listener.reported``."""
        heartbeats = [each.heartbeats for each in self._subscribers.values()]
        reports = [each.report for each in heartbeats if each.report is not None]
        ground = common_ground(reports, len(heartbeats))
        if len({report.epoch for report in reports}) > 1:
            # A primary has been replaced, maybe one in our table: look it up soon.
            self.topology.refresh_soon()
        if ground is None:
            return
        epoch, moment = ground
        for each in heartbeats:
            if each.report is not None and each.report.epoch == epoch:
                each.confirm(moment)

    def moved(self) -> None:
        """See ``Listener.moved``."""
        self.topology.refresh_soon()

    def _split(self, channels: frozenset[str]) -> tuple[frozenset[int] | None, frozenset[str] | None]:
        """The buckets and the rooms; ``None`` for all of them, as it always is with one primary."""
        rooms = frozenset(filter(None, map(self.names.room_of_channel, channels)))
        if self.names.sharded:
            return frozenset(
                self._buckets[channel] for channel in channels if channel in self._buckets
            ), rooms
        if channels.isdisjoint(self._fixed):
            return frozenset(), rooms
        return (None if self._carries_sessions else frozenset()), (
            None if self._carries_rooms else frozenset()
        )

    # Figures

    @property
    def connected(self) -> bool:
        """Whether every subscriber is."""
        return bool(self._subscribers) and all(each.connected for each in self._subscribers.values())

    @property
    def trusted(self) -> bool:
        """Whether every lease is live."""
        return all(each.lease.live for each in self._subscribers.values())

    @property
    def lease_remaining(self) -> float:
        """Seconds, of the lease that lapses first."""
        return min((each.lease.remaining for each in self._subscribers.values()), default=0.0)

    @property
    def received(self) -> int:
        """Messages since the start."""
        return self._received + sum(each.received for each in self._subscribers.values())

    @property
    def reconnects(self) -> int:
        """Connections but the first ones since the start."""
        return self._reconnects + sum(max(0, each.connections - 1) for each in self._subscribers.values())

    def __repr__(self) -> str:
        return f"<SubscriberSet of {len(self._wanted)} channels from {len(self._subscribers)} primaries>"
