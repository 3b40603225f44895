"""Figures of the bus and of the registered nodes."""

from __future__ import annotations

from dataclasses import dataclass

from asgi_cluster.ids import NodeId

__all__ = ["BusStats", "NodeInfo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BusStats:
    """The state of the bus."""

    connected: bool
    """Whether the subscriber's connection stands."""
    lease_remaining: float
    """Seconds for which the cache may still be served (the least of all leases); 0.0 when it may not."""
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
    """Seconds since its last heartbeat reached the store."""
    incarnation: str
    """Changes when a node had to register again."""
    serves_for: float
    """Seconds for which it may go on serving a session whose end it has not received: its lease, or its
    ``stale_for`` if that is longer.
    """
