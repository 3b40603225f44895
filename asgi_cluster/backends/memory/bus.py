"""The two buses of ``memory://``: a message has arrived everywhere when ``publish`` returns."""

from __future__ import annotations

from collections.abc import Mapping

from asgi_cluster.backends.memory.broker import Attachment, MemoryBroker
from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.stats import NodeInfo
from asgi_cluster.ids import NodeId

__all__ = ["MemoryRoomBus", "MemorySessionBus"]


class MemorySessionBus:
    """``bus.session_bus.SessionBus`` of one broker. Receivers are called in the publisher's thread."""

    def __init__(self, broker: MemoryBroker, lease: Lease) -> None:
        self._broker = broker
        self._lease = lease

    def lease(self, bucket: int) -> Lease:
        return self._lease

    def run_id(self, bucket: int) -> str:
        return ""

    async def publish(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        self._broker.publish(payload)

    def post(self, node: str, payload: bytes) -> None:
        self._broker.publish(payload, node=node)

    async def reachable(self, *, timeout: float) -> None:
        """See ``SessionBus.reachable``: whatever is attached is."""

    async def nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        """See ``SessionBus.nodes``. A node of this process cannot lag."""
        found: dict[NodeId, NodeInfo] = {}
        with self._broker.lock:
            for node, attachment in self._broker.nodes().items():
                receiver = attachment.session_receiver()
                if receiver is not None:
                    sockets, rooms = receiver.load()
                    found[node] = NodeInfo(
                        id=node,
                        started_at=attachment.started_at,
                        sockets=sockets,
                        rooms=rooms,
                        lag=0.0,
                        incarnation=attachment.incarnation,
                        serves_for=0.0,
                    )
        return found


class MemoryRoomBus:
    """``bus.room_bus.RoomBus`` for one attachment. Receivers are called in the publisher's thread."""

    def __init__(self, broker: MemoryBroker, attachment: Attachment, lease: Lease) -> None:
        self._broker = broker
        self._attachment = attachment
        self._lease = lease

    @property
    def incarnation(self) -> str:
        return self._attachment.incarnation

    def lease(self, room: str) -> Lease:
        return self._lease

    async def subscribe(self, room: str) -> None:
        with self._broker.lock:
            self._attachment.rooms.add(room)

    def unsubscribe(self, room: str) -> None:
        with self._broker.lock:
            self._attachment.rooms.discard(room)

    async def publish(self, room: str, payload: bytes, *, timeout: float) -> None:
        self._broker.publish(payload, room=room)
