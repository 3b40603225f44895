"""``memory://``: the whole backend inside one process, for one node, or for several under one name."""

from __future__ import annotations

import math
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asgi_cluster.backends.memory.broker import Attachment, MemoryBroker
from asgi_cluster.backends.memory.bus import MemoryRoomBus, MemorySessionBus
from asgi_cluster.backends.memory.history import MemoryHistory
from asgi_cluster.backends.memory.presence import MemoryPresence
from asgi_cluster.backends.memory.store import MemorySessionStore
from asgi_cluster.bus.lease import Clock, Lease, boot_clock
from asgi_cluster.bus.room_bus import RoomReceiver
from asgi_cluster.bus.session_bus import SessionReceiver
from asgi_cluster.bus.stats import BusStats
from asgi_cluster.node import Node

__all__ = ["MemoryBackend"]


class _UnbrokenLease(Lease):
    """A lease that cannot lapse: nothing can be missed here."""

    __slots__ = ()

    def __init__(self, duration: float, *, clock: Clock) -> None:
        super().__init__(duration, clock=clock)
        self.until = math.inf

    def revoke(self) -> None:
        """There is no gap that this could be called for."""

    @property
    def remaining(self) -> float:
        """Always all of it."""
        return self.duration


class MemoryBackend:
    """One node of a memory cluster.

    ``name=None`` keeps it to itself; all backends of this process with the same name share sessions, rooms
    and messages, as long as one of them exists. ``clock`` is the store's clock, in seconds; the first of a
    name decides.
    """

    needs_start = False

    def __init__(
        self, name: str | None = None, *, lease_duration: float = 2.0, clock: Clock = boot_clock
    ) -> None:
        self._broker = broker = MemoryBroker.named(name, clock)
        self._attachment = attachment = Attachment()
        self._lease = lease = _UnbrokenLease(lease_duration, clock=broker.clock)
        self._opened = False
        self.session_bus = MemorySessionBus(broker, lease)
        self.room_bus = MemoryRoomBus(broker, attachment, lease)
        self.store = MemorySessionStore(broker)
        self.history = MemoryHistory(broker)
        self.presence = MemoryPresence(broker, attachment)

    @asynccontextmanager
    async def open(self, node: Node, sessions: SessionReceiver, rooms: RoomReceiver) -> AsyncIterator[None]:
        """See ``Backend.open``. Registers the node until it is left; that is all there is to do."""
        self._broker.attach(self._attachment, node, lambda: sessions, lambda: rooms)
        self._opened = True
        try:
            yield
        finally:
            self._opened = False
            self._broker.detach(self._attachment)

    def attach(self, node: Node, sessions: SessionReceiver, rooms: RoomReceiver) -> None:
        """Register a node that is not started, for as long as its receivers exist. Costs nothing when it is
        there already.
        """
        if self._opened or self._attachment.node == node.id:
            return
        self._broker.attach(self._attachment, node, weakref.ref(sessions), weakref.ref(rooms))

    @property
    def ready(self) -> bool:
        """See ``Backend.ready``: always."""
        return True

    def stats(self) -> BusStats:
        return BusStats(
            connected=True,
            lease_remaining=self._lease.remaining,
            gaps=0,
            reconnects=0,
            received=self._attachment.received,
            malformed=0,
            last_gap=None,
        )
