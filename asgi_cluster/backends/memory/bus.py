"""The bus of ``memory://``: a message has arrived everywhere when ``publish`` returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from asgi_cluster.backends.memory.world import Attachment, MemoryBroker
from asgi_cluster.bus.bus import BusStats, NodeInfo
from asgi_cluster.bus.lease import Clock, Lease
from asgi_cluster.ids import NodeId

__all__ = ["MemoryBus"]


class _Unbroken(Lease):
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


class MemoryBus:
    """``bus.Bus`` for one node of a world. Receivers are called in the publisher's thread."""

    def __init__(self, world: MemoryBroker, *, lease_duration: float) -> None:
        self._world = world
        self._lease = _Unbroken(lease_duration, clock=world.clock)
        self.rooms: set[str] = set()
        self.seat: Attachment | None = None
        self.on_dead: Callable[[str, str], None] | None = None
        """See ``Bus.on_dead``: never called, the members of a node of this process go with it."""

    @property
    def incarnation(self) -> str:
        """See ``Bus.incarnation``."""
        return "" if self.seat is None else self.seat.incarnation

    def lease(self, bucket: int) -> Lease:
        """See ``Bus.lease``."""
        return self._lease

    def run_id(self, bucket: int) -> str:
        """See ``Bus.run_id``."""
        return ""

    def room_lease(self, room: str) -> Lease:
        """See ``Bus.room_lease``."""
        return self._lease

    async def subscribe(self, room: str) -> None:
        """See ``Bus.subscribe``."""
        with self._world.lock:
            self.rooms.add(room)

    def unsubscribe(self, room: str) -> None:
        """See ``Bus.unsubscribe``."""
        with self._world.lock:
            self.rooms.discard(room)

    async def publish_room(self, room: str, payload: bytes, *, timeout: float) -> None:
        """See ``Bus.publish_room``."""
        self._world.tell_room(room, payload)

    async def publish_bucket(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        """See ``Bus.publish_bucket``."""
        self._world.tell_sessions(payload)

    def post(self, node: str, payload: bytes) -> None:
        """See ``Bus.post``."""
        self._world.tell_node(node, payload)

    async def reachable(self, *, timeout: float) -> None:
        """See ``Bus.reachable``: a registered node is."""

    async def nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        """See ``Bus.nodes``. A node of this process cannot lag."""
        found: dict[NodeId, NodeInfo] = {}
        with self._world.lock:
            for seat in self._world.living():
                receiver = seat.receiver()
                if receiver is not None:
                    sockets, rooms = receiver.load()
                    found[seat.node] = NodeInfo(
                        id=seat.node,
                        started_at=seat.started_at,
                        sockets=sockets,
                        rooms=rooms,
                        lag=0.0,
                        incarnation=seat.incarnation,
                        serves_for=0.0,
                    )
        return found

    def stats(self) -> BusStats:
        """See ``BusStats``."""
        return BusStats(
            connected=True,
            lease_remaining=self._lease.remaining,
            gaps=0,
            reconnects=0,
            received=self.seat.received if self.seat is not None else 0,
            malformed=0,
            last_gap=None,
        )
