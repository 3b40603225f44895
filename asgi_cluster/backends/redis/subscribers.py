"""What the primaries of one topology push to this node: which channel is subscribed where, and its lease.

It deals with channels alone: a listener turns its channels into buckets or rooms.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from asgi_cluster.backends.redis.channels import ChannelListener, Channels, HeartbeatSource
from asgi_cluster.backends.redis.lifetime import Background, background
from asgi_cluster.backends.redis.listener import Heartbeat
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.quorum import common_ground
from asgi_cluster.backends.redis.subscriber import Subscriber
from asgi_cluster.backends.redis.topology import Topology
from asgi_cluster.bus.lease import Lease
from asgi_cluster.tasks import Failing

__all__ = ["SubscriberSet"]

logger = logging.getLogger("asgi_cluster.bus")

_UNKNOWN = "?"


class SubscriberSet:
    """One subscriber, and one lease, per primary."""

    def __init__(self, topology: Topology, *, lease_duration: float) -> None:
        self.topology = topology
        self._duration = lease_duration
        self._lease = Lease(lease_duration)  # of the only primary, when there is only one
        self._no_lease = Lease(lease_duration)  # never renewed: of channels without a subscriber
        self._subscribers: dict[Primary, Subscriber] = {}
        self._running: dict[Primary, asyncio.Task[None]] = {}
        self._homes: dict[str, Subscriber] = {}
        self._wanted: dict[str, ChannelListener] = {}
        self._vital: frozenset[str] = frozenset()
        self._lost: set[str] = set()
        self._listeners: Sequence[ChannelListener] = ()
        self._source: HeartbeatSource | None = None
        self._tasks: Background | None = None
        self._open = False
        self.gaps = 0
        self.last_gap: tuple[float, str] | None = None
        """When (the loop's time) and why."""
        self._received = self._reconnects = 0

    @asynccontextmanager
    async def opened(
        self, source: HeartbeatSource, channels: Channels, failing: Failing | None = None
    ) -> AsyncIterator[None]:
        """Receiving while entered. ``channels``: each listener, with the channels that it cannot do without;
        gaps are reported to the listeners in this order.

        Raises:
            BusUnavailable: such a channel was refused, or a primary could not be reached.
        """
        self._source = source
        self._listeners = tuple(listener for listener, _ in channels)
        self._wanted = {name: listener for listener, names in channels for name in names}
        self._vital = frozenset(self._wanted)
        try:
            async with background(failing) as tasks:
                self._tasks = tasks
                await asyncio.gather(*self._plan())
                self._open = True
                self.topology.watch(self._replan)
                self._replan()
                try:
                    yield
                finally:
                    self.topology.watch(None)
                    self._open = False
        finally:
            self._received, self._reconnects = self.received, self.reconnects
            for subscriber in self._subscribers.values():
                subscriber.lease.revoke()
            self._subscribers.clear()
            self._running.clear()
            self._homes.clear()
            self._wanted.clear()
            self._lost.clear()
            self._listeners = ()
            self._tasks = self._source = None

    # Subscribers and their channels

    def _plan(self) -> list[asyncio.Future[None]]:
        """One subscriber per primary, and each channel at the primary that has it now."""
        assert self._tasks is not None
        assert self._source is not None
        started: list[asyncio.Future[None]] = []
        primaries = self._source.primaries()
        fresh = [primary for primary in primaries if primary not in self._subscribers]
        for primary in fresh:
            lease = Lease(self._duration) if self.topology.sharded else self._lease
            self._subscribers[primary] = Subscriber(
                primary, lease, self, sharded=self.topology.sharded, vital=self._vital
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
        if not self.topology.sharded:
            return self._lease
        home = self._homes.get(channel)
        # A primary's lease does not cover a channel that has yet to be subscribed there.
        return home.lease if home is not None and home.is_subscribed(channel) else self._no_lease

    def run_id(self, channel: str) -> str:
        """Of the server where ``channel`` is subscribed."""
        home = self._homes.get(channel)
        # A message may still come from a channel's old home, whose run id is not kept.
        return _UNKNOWN if home is None else home.run_id

    async def subscribe(self, channel: str, listener: ChannelListener) -> None:
        """Returns when the server has acknowledged; at once while the connection is down: then ``restored``
        is called when it is back.

        Raises:
            BusUnavailable: the server refused.
        """
        self._wanted[channel] = listener
        home = self._settle(channel)
        if home is None or not home.connected:
            self._lost.add(channel)
        if home is not None:
            await home.subscribe(channel)

    def unsubscribe(self, channel: str) -> None:
        """No more of it."""
        self._wanted.pop(channel, None)
        self._lost.discard(channel)
        home = self._homes.pop(channel, None)
        if home is not None:
            home.unsubscribe(channel)

    # Events of the subscribers

    def heartbeat(self, primary: Primary) -> Heartbeat:
        assert self._source is not None
        return self._source.heartbeat(primary)

    def message(self, channel: str, payload: bytes) -> None:
        listener = self._wanted.get(channel)
        if listener is not None:
            listener.message(channel, payload)

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        self.topology.refresh_soon()
        fresh = channels - self._lost  # the others' gap was reported, and no lease was live since
        self._lost |= channels & self._wanted.keys()
        if not self._open or not fresh:
            return
        self.gaps += 1
        self.last_gap = asyncio.get_running_loop().time(), reason
        for listener in self._listeners:
            listener.gap(reason, self._of(listener, fresh))

    def acknowledged(self, primary: Primary, channels: frozenset[str]) -> None:
        self.topology.reconnect_now(primary)
        back = channels & self._lost
        self._lost -= back
        if not self._open or (channels and not back):
            return
        # Each listener is called, one without channels at this primary too: the node may have registered
        # again there.
        for listener in self._listeners:
            listener.restored(self._of(listener, back))

    def _of(self, listener: ChannelListener, channels: frozenset[str]) -> frozenset[str]:
        return frozenset(channel for channel in channels if self._wanted.get(channel) is listener)

    def reported(self) -> None:
        heartbeats = [each.heartbeats for each in self._subscribers.values()]
        reports = [each.report for each in heartbeats if each.report is not None]
        ground = common_ground(reports, len(heartbeats))
        if len({report.epoch for report in reports}) > 1:
            # A primary has been replaced, maybe one in this node's table: look it up soon.
            self.topology.refresh_soon()
        if ground is None:
            return
        epoch, moment = ground
        for each in heartbeats:
            if each.report is not None and each.report.epoch == epoch:
                each.confirm(moment)

    def moved(self) -> None:
        self.topology.refresh_soon()

    # Figures

    @property
    def open(self) -> bool:
        """Whether it has started, and has not been left."""
        return self._open

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
