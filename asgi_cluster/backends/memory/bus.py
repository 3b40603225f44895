"""The bus of one process: what is published has been received when publishing returns."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from asgi_cluster.backends.memory.state import Node, State
from asgi_cluster.bus.bus import BusStats, NodeInfo, Receiver
from asgi_cluster.bus.lease import Lease
from asgi_cluster.ids import NodeId

__all__ = ["MemoryBus"]


class MemoryBus:
    """``bus.bus.Bus`` without a server. Nothing can be missed, so the lease is always live."""

    def __init__(self, state: State, *, lease_duration: float) -> None:
        self._state = state
        self._lease = Lease(lease_duration)
        self._lease.until = math.inf
        self._node: Node | None = None
        self.id = NodeId("")

    def attach(self, node: NodeId, receiver: Receiver) -> None:
        """Take part under this id from now on."""
        with self._state.lock:
            if self._state.nodes.get(node) is self._node and self._node is not None:
                return
            rooms = self._node.rooms if self._node is not None else set()
            self.detach()
            self.id = node
            self._node = self._state.nodes[node] = Node(receiver, time.time(), rooms)

    def detach(self) -> None:
        """Take part no more."""
        with self._state.lock:
            self._state.nodes.pop(self.id, None)
            self._node = None

    def lease(self, bucket: int) -> Lease:
        """See ``Bus.lease``."""
        return self._lease

    def room_lease(self, room: str) -> Lease:
        """See ``Bus.room_lease``."""
        return self._lease

    async def subscribe(self, room: str) -> None:
        """See ``Bus.subscribe``."""
        with self._state.lock:
            if self._node is not None:
                self._node.rooms.add(room)

    def unsubscribe(self, room: str) -> None:
        """See ``Bus.unsubscribe``."""
        with self._state.lock:
            if self._node is not None:
                self._node.rooms.discard(room)

    async def publish_room(self, room: str, payload: bytes, *, timeout: float) -> None:
        """See ``Bus.publish_room``."""
        with self._state.lock:
            self._state.tell_room(room, payload)

    async def publish_bucket(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        """See ``Bus.publish_bucket``."""
        with self._state.lock:
            self._state.tell_everyone(payload)

    def post(self, node: str, payload: bytes) -> None:
        """See ``Bus.post``."""
        with self._state.lock:
            target = self._state.nodes.get(node)
            if target is not None:
                target.receiver.session_message(payload)

    async def nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        """See ``Bus.nodes``."""
        with self._state.lock:
            found: dict[NodeId, NodeInfo] = {}
            for name, node in self._state.nodes.items():
                sockets, rooms = node.receiver.load()
                found[NodeId(name)] = NodeInfo(
                    id=NodeId(name),
                    started_at=node.started_at,
                    sockets=sockets,
                    rooms=rooms,
                    lag=0.0,
                    incarnation=name,
                )
            return found

    def stats(self) -> BusStats:
        """See ``BusStats``. The lease is given as its full duration, since it never lapses."""
        return BusStats(
            connected=self._node is not None,
            lease_remaining=self._lease.duration,
            gaps=0,
            reconnects=0,
            received=0,
            malformed=0,
            last_gap=None,
        )
