"""The room bus on Redis Pub/Sub: each room is a channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.publishing import check_right, publish
from asgi_cluster.backends.redis.registry import Registry
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.room_bus import RoomReceiver
from asgi_cluster.exceptions import NotStarted
from asgi_cluster.ids import NodeId

__all__ = ["RedisRoomBus"]


class RedisRoomBus:
    """``bus.room_bus.RoomBus``, and the listener of its channels."""

    def __init__(self, subscribers: SubscriberSet, names: Names, registry: Registry) -> None:
        self._subscribers = subscribers
        self._topology = subscribers.topology
        self._names = names
        self._registry = registry
        self._receiver: RoomReceiver | None = None

    # Lifetime

    def channels(self, node: NodeId) -> Sequence[str]:
        """What a node subscribes to before it has joined a room: its inbox. Nothing is posted to it where
        only rooms are; without a channel the loss of a connection would go uncounted.
        """
        return [self._names.node_channel(node)] if self._names.apart else []

    async def check_rights(self) -> None:
        """Raises ``StoreUnavailable`` when the right to publish is missing."""
        channel = self._names.room_channel("")  # no room has an empty name
        await check_right(self._topology, self._names, channel, b"", "room messages")

    @contextmanager
    def receiving(self, receiver: RoomReceiver) -> Iterator[None]:
        """``receiver`` gets what arrives while entered."""
        self._receiver = receiver
        try:
            yield
        finally:
            self._receiver = None

    # The port

    @property
    def incarnation(self) -> str:
        """See ``RoomBus.incarnation``."""
        return self._registry.incarnation

    def lease(self, room: str) -> Lease:
        """See ``RoomBus.lease``."""
        return self._subscribers.lease(self._names.room_channel(room))

    async def subscribe(self, room: str) -> None:
        """See ``RoomBus.subscribe``."""
        if self._receiver is None:
            raise NotStarted("joining a room")
        await self._subscribers.subscribe(self._names.room_channel(room), self)

    def unsubscribe(self, room: str) -> None:
        """See ``RoomBus.unsubscribe``."""
        self._subscribers.unsubscribe(self._names.room_channel(room))

    async def publish(self, room: str, payload: bytes, *, timeout: float) -> None:
        """See ``RoomBus.publish``."""
        channel = self._names.room_channel(room)
        await publish(self._topology, self._names, channel, payload, timeout)

    # Events of the channels

    def message(self, channel: str, payload: bytes) -> None:
        """See ``ChannelListener.message``."""
        room = self._names.room_of_channel(channel)
        if self._receiver is not None and room is not None:
            self._receiver.room_message(room, payload)

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        """See ``ChannelListener.gap``."""
        rooms = self._rooms_of(channels)
        if self._receiver is not None and rooms:
            self._receiver.rooms_gap(rooms)

    def restored(self, channels: frozenset[str]) -> None:
        """See ``ChannelListener.restored``."""
        if self._receiver is not None:
            self._receiver.rooms_restored(self._rooms_of(channels))

    def _rooms_of(self, channels: frozenset[str]) -> frozenset[str]:
        return frozenset(filter(None, map(self._names.room_of_channel, channels)))
