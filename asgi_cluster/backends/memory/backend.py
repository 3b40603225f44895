"""``memory://``: the whole backend inside one process, for one node, or for several under one name."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asgi_cluster.backends.memory.bus import MemoryBus
from asgi_cluster.backends.memory.history import MemoryHistory
from asgi_cluster.backends.memory.presence import MemoryPresence
from asgi_cluster.backends.memory.store import MemorySessionStore
from asgi_cluster.backends.memory.world import Attachment, MemoryBroker
from asgi_cluster.bus.bus import Receiver
from asgi_cluster.bus.lease import Clock, boot_clock
from asgi_cluster.exceptions import NotStarted
from asgi_cluster.ids import NodeId
from asgi_cluster.tasks import Failing

__all__ = ["MemoryBackend"]


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
        self._world = MemoryBroker.named(name, clock)
        self._presence = MemoryPresence(self._world, self._incarnation)
        self._bus = MemoryBus(self._world, lease_duration=lease_duration)
        self.store = MemorySessionStore(self._world)
        self.history = MemoryHistory(self._world)
        self._opened = False
        self._letterbox: Attachment | None = None  # of a publisher

    @property
    def bus(self) -> MemoryBus:
        """See ``Backend.bus``."""
        return self._bus

    @property
    def presence(self) -> MemoryPresence:
        """See ``Backend.presence``."""
        return self._presence

    def _incarnation(self) -> str:
        if self._bus.seat is None:
            raise NotStarted("presence")
        return self._bus.seat.incarnation

    @asynccontextmanager
    async def open(
        self, node: NodeId, receiver: Receiver, *, listen: bool, failing: Failing | None = None
    ) -> AsyncIterator[None]:
        """See ``Backend.open``. Registers the node until it is left; that is all there is to do."""
        self._sit(Attachment(node, lambda: receiver, self._bus.rooms, listens=listen))
        self._opened = True
        try:
            yield
        finally:
            self._opened = False
            self._rise()

    def attach(self, node: NodeId, receiver: Receiver, *, listen: bool = True) -> None:
        """Register a node that is not started, for as long as its ``receiver`` exists. Costs nothing when it
        is there already.
        """
        seat = self._bus.seat or self._letterbox
        if self._opened or (seat is not None and seat.node == node):
            return
        self._sit(Attachment(node, weakref.ref(receiver), self._bus.rooms, listens=listen))

    def _sit(self, seat: Attachment) -> None:
        with self._world.lock:
            self._rise()
            if seat.listens:
                self._bus.seat = seat
            else:
                self._letterbox = seat
            self._world.sit(seat)

    def _rise(self) -> None:
        with self._world.lock:
            seat = self._bus.seat or self._letterbox
            self._bus.seat = self._letterbox = None
            if seat is not None:
                self._world.leave(seat)

    @property
    def ready(self) -> bool:
        """See ``Backend.ready``: always."""
        return True
