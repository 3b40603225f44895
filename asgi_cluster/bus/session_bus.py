"""The port that carries what concerns sessions: to the nodes that watch a bucket, or to one node.

All nodes watch all buckets. What arrives is handed over synchronously, in order, on the event loop of the
receiver. Delivery is at most once. What makes that bearable is the lease: it proves when nothing can have
been missed, and a gap says when something may have been.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.stats import NodeInfo
from asgi_cluster.ids import NodeId

__all__ = ["SUBSCRIBED_AGAIN", "SessionBus", "SessionReceiver"]

SUBSCRIBED_AGAIN = "subscribed again"
"""The reason of the second gap of an outage: what was read between the two must not be kept."""


class SessionReceiver(Protocol):
    """Gets what the session bus brings. Called on the event loop, never concurrently; must not block."""

    def session_message(self, payload: bytes) -> None:
        """A message for a session bucket, or for this node itself."""
        ...

    def sessions_gap(self, reason: str, buckets: frozenset[int] | None) -> None:
        """Session messages may have been lost, for these buckets, or for all when ``None``. The lease is
        already 0.
        """
        ...

    def node_removed(self, node: str, incarnation: str) -> None:
        """This node, and no other, has removed a dead node from the registry that presence goes by."""
        ...

    def load(self) -> tuple[int, int]:
        """Sockets and rooms of this node, for the registry."""
        ...


class SessionBus(Protocol):
    """Carries session messages between nodes."""

    def lease(self, bucket: int) -> Lease:
        """The lease that vouches for cached sessions of this bucket."""
        ...

    def run_id(self, bucket: int) -> str:
        """The server whose messages of this bucket are being received: the changes that they report are
        stored there, and maybe only there. ``""``: a store that loses nothing.
        """
        ...

    async def publish(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        """Publish to every node that watches the bucket; all nodes do.

        Raises:
            BusUnavailable: it could not be sent, or no reply came in ``timeout`` seconds.
        """
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
