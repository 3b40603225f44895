"""The two buses on Redis Pub/Sub: buckets and rooms are channels, and so is each node's inbox.

What is published goes over the command connections. What arrives comes from a ``SubscriberSet`` to a
listener, which turns its channels into buckets or rooms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asgi_cluster.backends.redis.channels import ChannelListener
from asgi_cluster.backends.redis.inbox import Inbox
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.registry import Registry
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.backends.redis.topology import Commands
from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.messages import Ack, encode
from asgi_cluster.bus.room_bus import RoomReceiver
from asgi_cluster.bus.session_bus import SUBSCRIBED_AGAIN, SessionReceiver
from asgi_cluster.bus.stats import NodeInfo
from asgi_cluster.exceptions import BusUnavailable, NotStarted, StoreUnavailable
from asgi_cluster.ids import BUCKETS, NodeId

__all__ = ["RedisRoomBus", "RedisSessionBus"]


class RedisSessionBus:
    """``bus.session_bus.SessionBus``. On a Redis Cluster each bucket has a channel; elsewhere all share
    one.
    """

    def __init__(self, subscribers: SubscriberSet, names: Names, registry: Registry, inbox: Inbox) -> None:
        self._subscribers = subscribers
        self._topology = subscribers.topology
        self._names = names
        self._registry = registry
        self._inbox = inbox
        self._channels = [names.sessions_channel(f"{bucket:02x}") for bucket in range(BUCKETS)]

    async def listen(self, node: NodeId, receiver: SessionReceiver) -> tuple[ChannelListener, Sequence[str]]:
        """What to subscribe to for ``node``. Raises ``StoreUnavailable`` when a right to publish is
        missing.
        """
        inbox = self._names.node_channel(node)
        harmless = encode(Ack("", node, 0))  # to no request
        await _check_right(self._topology, self._names, self._channels[0], harmless, "session messages")
        await _check_right(self._topology, self._names, inbox, harmless, "acknowledgements")
        buckets = {channel: bucket for bucket, channel in enumerate(self._channels)}
        return _SessionChannels(buckets, receiver, sharded=self._names.sharded), [*buckets, inbox]

    def lease(self, bucket: int) -> Lease:
        return self._subscribers.lease(self._channels[bucket])

    def run_id(self, bucket: int) -> str:
        return self._subscribers.run_id(self._channels[bucket])

    async def publish(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        await _publish(self._topology, self._names, self._channels[bucket], payload, timeout)

    def post(self, node: str, payload: bytes) -> None:
        channel = self._names.node_channel(node)
        self._topology.post(channel, self._names.publish, channel, payload)

    async def reachable(self, *, timeout: float) -> None:
        await self._inbox.reachable(timeout=timeout)

    async def nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        return await self._registry.nodes(timeout=timeout)


class _SessionChannels:
    """The listener of the buckets' channels, and of the node's inbox."""

    def __init__(self, buckets: Mapping[str, int], receiver: SessionReceiver, *, sharded: bool) -> None:
        self._buckets = buckets
        self._receiver = receiver
        self._sharded = sharded

    def message(self, channel: str, payload: bytes) -> None:
        self._receiver.session_message(payload)

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        buckets = frozenset(self._buckets[channel] for channel in channels if channel in self._buckets)
        if buckets:
            self._receiver.sessions_gap(reason, buckets if self._sharded else None)

    def restored(self, channels: frozenset[str]) -> None:
        # What was read between the gap and now may have changed without a message: it must not be kept.
        self.gap(SUBSCRIBED_AGAIN, channels)


class RedisRoomBus:
    """``bus.room_bus.RoomBus``: each room is a channel."""

    def __init__(self, subscribers: SubscriberSet, names: Names, registry: Registry) -> None:
        self._subscribers = subscribers
        self._topology = subscribers.topology
        self._names = names
        self._registry = registry
        self._listener: _RoomChannels | None = None

    async def listen(self, node: NodeId, receiver: RoomReceiver) -> tuple[ChannelListener, Sequence[str]]:
        """What to subscribe to for ``node`` before it has joined a room. Raises ``StoreUnavailable`` when the
        right to publish is missing.
        """
        names = self._names
        # No room has an empty name.
        await _check_right(self._topology, names, names.room_channel(""), b"", "room messages")
        self._listener = _RoomChannels(names, receiver)
        # Nothing is posted to an inbox where only rooms are. It makes the loss of a connection count as a gap
        # when no room is subscribed.
        return self._listener, [names.node_channel(node)] if names.apart else []

    @property
    def incarnation(self) -> str:
        return self._registry.incarnation

    def lease(self, room: str) -> Lease:
        return self._subscribers.lease(self._names.room_channel(room))

    async def subscribe(self, room: str) -> None:
        if self._listener is None:
            raise NotStarted("joining a room")
        await self._subscribers.subscribe(self._names.room_channel(room), self._listener)

    def unsubscribe(self, room: str) -> None:
        self._subscribers.unsubscribe(self._names.room_channel(room))

    async def publish(self, room: str, payload: bytes, *, timeout: float) -> None:
        await _publish(self._topology, self._names, self._names.room_channel(room), payload, timeout)


class _RoomChannels:
    """The listener of the rooms' channels."""

    def __init__(self, names: Names, receiver: RoomReceiver) -> None:
        self._room_of = names.room_of_channel
        self._receiver = receiver

    def message(self, channel: str, payload: bytes) -> None:
        room = self._room_of(channel)
        if room is not None:
            self._receiver.room_message(room, payload)

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        rooms = frozenset(filter(None, map(self._room_of, channels)))
        if rooms:
            self._receiver.rooms_gap(rooms)

    def restored(self, channels: frozenset[str]) -> None:
        self._receiver.rooms_restored(frozenset(filter(None, map(self._room_of, channels))))


async def _publish(topology: Commands, names: Names, channel: str, payload: bytes, timeout: float) -> None:
    try:
        await topology.call(channel, names.publish, channel, payload, timeout=timeout)
    except StoreUnavailable as error:
        raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error


async def _check_right(topology: Commands, names: Names, channel: str, payload: bytes, what: str) -> None:
    # A right that is missing should stop the start, and not the first logout.
    try:
        await _publish(topology, names, channel, payload, 1.0)
    except BusUnavailable as error:
        raise StoreUnavailable(f"cannot publish {what}: {error.reason}") from error
