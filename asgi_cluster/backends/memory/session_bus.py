"""The session bus of ``memory://``: a message has arrived everywhere when ``publish`` returns."""

from __future__ import annotations

from collections.abc import Mapping

from asgi_cluster.backends.memory.broker import MemoryBroker
from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.stats import NodeInfo
from asgi_cluster.ids import NodeId

__all__ = ["MemorySessionBus"]


class MemorySessionBus:
    """``bus.session_bus.SessionBus`` of one broker. Receivers are called in the publisher's thread."""

    def __init__(self, broker: MemoryBroker, lease: Lease) -> None:
        self._broker = broker
        self._lease = lease

    def lease(self, bucket: int) -> Lease:
        """See ``SessionBus.lease``."""
        return self._lease

    def run_id(self, bucket: int) -> str:
        """See ``SessionBus.run_id``."""
        return ""

    async def publish(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        """See ``SessionBus.publish``."""
        self._broker.publish_sessions(payload)

    def post(self, node: str, payload: bytes) -> None:
        """See ``SessionBus.post``."""
        self._broker.post(node, payload)

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
