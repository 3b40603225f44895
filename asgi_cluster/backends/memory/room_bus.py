"""The room bus of ``memory://``."""

from __future__ import annotations

from asgi_cluster.backends.memory.broker import Attachment, MemoryBroker
from asgi_cluster.bus.lease import Lease

__all__ = ["MemoryRoomBus"]


class MemoryRoomBus:
    """``bus.room_bus.RoomBus`` for one attachment. Receivers are called in the publisher's thread."""

    def __init__(self, broker: MemoryBroker, attachment: Attachment, lease: Lease) -> None:
        self._broker = broker
        self._attachment = attachment
        self._lease = lease

    @property
    def incarnation(self) -> str:
        """See ``RoomBus.incarnation``."""
        return self._attachment.incarnation

    def lease(self, room: str) -> Lease:
        """See ``RoomBus.lease``."""
        return self._lease

    async def subscribe(self, room: str) -> None:
        """See ``RoomBus.subscribe``."""
        with self._broker.lock:
            self._attachment.rooms.add(room)

    def unsubscribe(self, room: str) -> None:
        """See ``RoomBus.unsubscribe``."""
        with self._broker.lock:
            self._attachment.rooms.discard(room)

    async def publish(self, room: str, payload: bytes, *, timeout: float) -> None:
        """See ``RoomBus.publish``."""
        self._broker.publish_room(room, payload)
