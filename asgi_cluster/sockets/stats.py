"""What the sockets of a node did, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Counters", "RealtimeStats"]


class Counters:
    """What the outboxes of one hub have done."""

    __slots__ = ("dropped", "sent", "slow")

    def __init__(self) -> None:
        self.sent = 0
        self.dropped = 0
        self.slow = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RealtimeStats:
    """What this node's sockets did, counted since the hub was made."""

    connections: int
    """Open sockets, the wrapped app's own among them."""
    rooms: int
    """Rooms with a member here."""
    sent: int
    """Messages handed to a server or a transport."""
    dropped: int
    """Messages not sent because of ``slow="drop"``, or replaced because of ``slow="latest"``."""
    slow: int
    """Sockets closed with 3008 because they did not read."""
    direct: int
    """Open sockets that are written to directly."""
    fallback: Mapping[str, int]
    """Open sockets that go through ASGI ``send``, by reason."""
