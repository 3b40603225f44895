"""What the local session cache keeps and counts: entries, reads under way, statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asgi_cluster.bus.lease import Lease
from asgi_cluster.ids import Handle
from asgi_cluster.sessions.codec import Decoded
from asgi_cluster.sessions.store import Record

__all__ = ["CacheStats", "Entry", "PendingRead"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """Counted since the cluster object was made."""

    hits: int
    """Reads answered without Redis."""
    misses: int
    """Reads that went to Redis."""
    bypassed: int
    """Misses because the lease had lapsed: read from Redis, and not kept."""
    evictions: int
    """Entries that went because the cache was full."""
    invalidations: int
    """Entries dropped because their session changed, here or elsewhere."""
    flushes: int
    """Times everything was dropped because messages may have been lost."""
    size: int
    """Entries now."""
    max_entries: int

    @property
    def hit_rate(self) -> float:
        """Hits among all reads, 0.0 to 1.0; 0.0 when there were none."""
        reads = self.hits + self.misses
        return self.hits / reads if reads else 0.0


class Entry:
    """One cached answer. ``record`` is ``None`` when the store has no such session."""

    __slots__ = ("_decoded", "expires_at", "lease", "read_at", "record", "until")

    def __init__(self, record: Record | None, read_at: float, ttl: float, lease: Lease) -> None:
        self.record = record
        self.read_at = read_at
        # The remaining time was measured by the store after the read was sent: counting from the sending can
        # only be early.
        self.expires_at = read_at + record.expires_in if record is not None else read_at + ttl
        self.until = min(self.expires_at, read_at + ttl)
        self.lease = lease
        self._decoded: Decoded | None = None

    def fill(self, target: dict[str, Any]) -> None:
        """Put the record's values into ``target``. Raises ``msgspec.DecodeError`` when it is corrupt."""
        if self._decoded is None:
            self._decoded = Decoded(self.record.fields if self.record is not None else {})
        self._decoded.into(target)


class PendingRead:
    """One read of the store under way."""

    __slots__ = ("attached", "begun_at", "handle", "lease", "waiters")

    def __init__(self, handle: Handle, begun_at: float, lease: Lease) -> None:
        self.handle = handle
        self.begun_at = begun_at
        self.lease = lease
        self.attached = True
        self.waiters: object = None
        """Whatever the readers share while they wait; the cache does not look at it."""
