"""The port for who is in a room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

__all__ = ["PresenceStore"]


class PresenceStore(Protocol):
    """Who is in a room, across the cluster. Entries belong to a node's incarnation and go with it."""

    async def enter(self, room: str, client: str, info: bytes, *, timeout: float) -> None:
        """``client`` (a connection id) is in the room; ``info`` is its client info as JSON."""
        ...

    async def leave(self, room: str, client: str, *, timeout: float) -> bool:
        """It is no longer. False when it was not."""
        ...

    async def members(self, room: str, *, timeout: float) -> Mapping[str, bytes]:
        """Connection id to client info, of every living node."""
        ...

    async def stats(self, room: str, *, timeout: float) -> tuple[int, int]:
        """Connections and distinct users."""
        ...

    async def reap(self, room: str, node: str, incarnation: str, *, timeout: float) -> Mapping[str, bytes]:
        """Remove what a dead incarnation of a node left behind; returns what this very call removed."""
        ...
