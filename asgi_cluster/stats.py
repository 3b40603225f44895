"""A node's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asgi_cluster.bus.stats import BusStats
from asgi_cluster.ids import NodeId
from asgi_cluster.sessions.entry import CacheStats
from asgi_cluster.sockets.stats import RealtimeStats

__all__ = ["ClusterStats"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStats:
    """A snapshot of one node, counted since the cluster object was made; cheap enough to take at every
    scrape.
    """

    node: NodeId | None
    """``None`` before the first start."""
    ready: bool
    failing: Mapping[str, str]
    """Background work of this node that failed and is being started again: its name, and the kind of the
    error. The log has the traceback. ``ready`` is false meanwhile.
    """
    cache: CacheStats
    bus: BusStats
    realtime: RealtimeStats
