"""The port between the cluster and whatever carries its messages.

Two kinds of audience: a session bucket (everything about a handle or a user) and a room; and one node by its
id. What arrives is handed over synchronously, in order, on the event loop of the receiver; a receiver must
not block. Delivery is at most once. What makes that bearable is the lease: it proves when nothing can have
been missed, and a ``gap`` says when something may have been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from asgi_cluster.bus.lease import Lease
from asgi_cluster.ids import NodeId

__all__ = ["SUBSCRIBED_AGAIN", "Bus", "BusStats", "NodeInfo", "Receiver"]

SUBSCRIBED_AGAIN = "subscribed again"
"""The reason of the second gap of an outage: what was read between the two must not be kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BusStats:
    """The state of the bus."""

    connected: bool
    """Whether the subscriber's connection stands."""
    lease_remaining: float
    """Seconds for which the cache may still be trusted (the least of all leases); 0.0 when it may not."""
    gaps: int
    """How often messages may have been lost since start."""
    reconnects: int
    """How often the subscriber connected again since start."""
    received: int
    """Messages received since start."""
    malformed: int
    """Messages that could not be decoded since start."""
    last_gap: str | None
    """Why the last gap happened; ``None`` when there was none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeInfo:
    """One registered node."""

    id: NodeId
    started_at: float
    """Unix time of that node's clock, for people; nothing is computed from it."""
    sockets: int
    rooms: int
    lag: float
    """Seconds since the store last saw its beat."""
    incarnation: str
    """Changes when a node had to register again."""
    serves_for: float
    """Seconds for which it may go on serving a session whose end it has not received: its lease, or its
    ``stale_for`` if that is longer.
    """


class Receiver(Protocol):
    """Gets what the bus brings. Called on the event loop, never concurrently; must not block and must not
    raise.
    """

    def session_message(self, payload: bytes) -> None:
        """A message for a session bucket that this node watches (it watches all), or for this node itself."""
        ...

    def room_message(self, room: str, payload: bytes) -> None:
        """A message for a room that this node has subscribed to: the envelope of ``realtime.history`` and a
        message.
        """
        ...

    def gap(self, reason: str, buckets: frozenset[int] | None) -> None:
        """Session messages may have been lost, for these buckets, or for all when ``None``. The lease is
        already 0.
        """
        ...

    def rooms_gap(self, reason: str, rooms: frozenset[str] | None) -> None:
        """Room messages may have been lost, for these rooms, or for all when ``None``."""
        ...

    def rooms_restored(self, rooms: frozenset[str] | None) -> None:
        """These rooms (``None``: all) are subscribed again after a gap: positions can be checked now."""
        ...

    def load(self) -> tuple[int, int]:
        """Sockets and rooms of this node, for the registry."""
        ...


class Bus(Protocol):
    """Carries messages between nodes."""

    on_dead: Callable[[str, str], None] | None
    """Called with id and incarnation of a dead node that this one, and no other, has removed from the
    registry.
    """

    @property
    def incarnation(self) -> str:
        """Changes when this node had to register again; ``""`` while it is not registered."""
        ...

    def lease(self, bucket: int) -> Lease:
        """The lease that vouches for cached sessions of this bucket."""
        ...

    def run_id(self, bucket: int) -> str:
        """The server whose messages of this bucket are being received: the changes that they report are
        stored there, and maybe only there. ``""``: a store that loses nothing.
        """
        ...

    def room_lease(self, room: str) -> Lease:
        """The lease that proves that no message of this (subscribed) room was missed."""
        ...

    async def subscribe(self, room: str) -> None:
        """Returns when messages to ``room`` will be received: the server has acknowledged. Idempotent per
        room.

        While the bus is down it returns at once: the room is subscribed when it is back, and ``rooms_gap``
        has been called.

        Raises:
            BusUnavailable: the server refused the channel.
        """
        ...

    def unsubscribe(self, room: str) -> None:
        """No more messages to ``room``. What is in flight may still arrive."""
        ...

    async def publish_room(self, room: str, payload: bytes, *, timeout: float) -> None:
        """Publish to a room without history.

        Raises:
            BusUnavailable: it could not be sent, or no reply came in ``timeout`` seconds.
        """
        ...

    async def publish_bucket(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        """Publish to every node that watches the bucket; all nodes do. Raises as ``publish_room``."""
        ...

    def post(self, node: str, payload: bytes) -> None:
        """To one node, without waiting, best effort: acknowledgements."""
        ...

    async def reachable(self, *, timeout: float) -> None:
        """Returns when what is posted to this node will be received, or after ``timeout`` seconds.

        At once on a node that listens. A publisher (``listen=False``) opens its inbox at the first call.
        """
        ...

    async def nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        """The registered nodes, the dead ones already removed.

        Raises:
            StoreUnavailable: the registry did not answer.
        """
        ...

    def stats(self) -> BusStats: ...
