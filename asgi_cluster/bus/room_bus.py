"""The port that carries the messages of rooms to the nodes that have members in them.

What arrives is handed over synchronously, in order, on the event loop of the receiver. Delivery is at most
once. Rooms may be on servers of their own: their leases, gaps and incarnations are not those of the session
bus then.
"""

from __future__ import annotations

from typing import Protocol

from asgi_cluster.bus.lease import Lease

__all__ = ["RoomBus", "RoomReceiver"]


class RoomReceiver(Protocol):
    """Gets what the room bus brings. Called on the event loop, never concurrently; must not block and must
    not raise.
    """

    def room_message(self, room: str, payload: bytes) -> None:
        """A message for a room that this node has subscribed to: the envelope of ``rooms.history`` and a
        message.
        """
        ...

    def rooms_gap(self, rooms: frozenset[str]) -> None:
        """Messages of these rooms may have been lost."""
        ...

    def rooms_restored(self, rooms: frozenset[str]) -> None:
        """A subscriber is connected again, and these rooms (maybe none) are subscribed again: their positions
        can be checked now. This node may have had to register again: see ``RoomBus.incarnation``.
        """
        ...


class RoomBus(Protocol):
    """Carries messages of rooms between nodes."""

    @property
    def incarnation(self) -> str:
        """Changes when this node had to register again; ``""`` while it is not registered."""
        ...

    def lease(self, room: str) -> Lease:
        """The lease that proves that no message of this (subscribed) room was missed."""
        ...

    async def subscribe(self, room: str) -> None:
        """Returns when messages to ``room`` will be received: the server has acknowledged. Idempotent per
        room.

        While the bus is down it returns at once: ``rooms_restored`` is called when the room is subscribed.

        Raises:
            BusUnavailable: the server refused the channel.
        """
        ...

    def unsubscribe(self, room: str) -> None:
        """No more messages to ``room``. What was published before may still arrive."""
        ...

    async def publish(self, room: str, payload: bytes, *, timeout: float) -> None:
        """Publish to a room without history.

        Raises:
            BusUnavailable: it could not be sent, or no reply came in ``timeout`` seconds.
        """
        ...
