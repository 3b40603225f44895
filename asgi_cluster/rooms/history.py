"""The port for a room's history, and the envelope in which a room message travels.

A room with history numbers its publications. ``epoch`` names one numbering; when it changes, offsets cannot
be compared. ``previous`` is the offset of the publication before: normally ``offset - 1``, but a store that
lost its last writes (a failover) jumps ahead instead of giving a number twice. A subscriber has
everything if and only if each publication's ``previous`` is the ``offset`` that it received last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

__all__ = [
    "EPOCH_LASTS",
    "JUMP",
    "NUMBERING_OUTLIVES",
    "ONCE",
    "Declarations",
    "Entry",
    "HistoryStore",
    "Page",
    "Position",
    "open_envelope",
    "seal_envelope",
]

ONCE = 300.0
"""Seconds for which the result of an idempotency key is kept."""

NUMBERING_OUTLIVES = 24 * 3600.0
"""Seconds by which a room's numbering outlives its last publication, or its last reader after that: so long a
position means something.
"""

EPOCH_LASTS = 23 * 3600.0
"""Seconds for which all rooms in which nothing has been published share one epoch. Less than
``NUMBERING_OUTLIVES``: while the epoch of such a position is current, a numbering that began after it cannot
have expired, so that a client that missed something is always informed.
"""

JUMP = 1 << 20
"""A numbering that may follow a lost one begins a random multiple of this later, so that no number is given
twice: more publications than a primary can have accepted and lost at a failover, by far."""


class Position(msgspec.Struct, frozen=True):
    """A place in a room's history: after the publication with this offset (0: before the first)."""

    offset: int
    epoch: str


class Entry(msgspec.Struct, frozen=True):
    """One publication of a history: ``payload`` is the encoded ``bus.messages.Published``."""

    offset: int
    previous: int
    payload: bytes


class Page(msgspec.Struct, frozen=True):
    """What a history read gave: entries, and where the room stood at that moment.

    ``complete`` says, for a read ``since`` a position, whether nothing between it and ``top`` is missing
    from what the store had (``limit`` aside).
    """

    entries: Sequence[Entry]
    top: Position
    complete: bool


class Declarations(msgspec.Struct, frozen=True):
    """The rules that the processes of the cluster have declared."""

    epoch: str
    """What ``publish`` and ``read`` are to be given: the epoch of all rooms without a numbering. Nothing is
    stored for such a room, and yet its first publication follows a position that was read before."""
    wait: float
    """Seconds until no process relies on a reading from before this declaration; 0.0 when it was there."""
    others: Sequence[tuple[str, bytes]]
    """Rules other than the caller's own, each once, with one of the nodes that declared them."""


class HistoryStore(Protocol):
    """Where publications are kept, and the nodes' rules for that."""

    @property
    def in_process(self) -> bool:
        """Whether ``declare`` costs nothing and may be called each time."""
        ...

    async def declare(
        self, digest: str, rules: bytes, *, node: str, view: float, timeout: float
    ) -> Declarations:
        """Declare the ``rules`` of ``node`` and read those of the others, in one step. An empty ``digest``
        declares nothing.

        The caller may rely on what it got for at most ``view`` seconds from the call. A declaration
        outlives its node: a caller that declares removes it when no node has renewed it for a minute. While
        no caller declares it stays for a week (Redis). Raises ``BusUnavailable`` as ``publish``.
        """
        ...

    async def publish(
        self,
        room: str,
        payload: bytes,
        *,
        size: int,
        ttl: float,
        idempotency_key: str | None,
        epoch: str,
        timeout: float,
    ) -> Position:
        """Number, keep and publish in one atomic step; return the position it got.

        ``size`` publications are kept, for ``ttl`` seconds after the last. ``epoch`` names the numbering if
        the room has none; it begins with a random offset then. The same ``idempotency_key`` within five
        minutes returns the first result and publishes nothing.

        Raises:
            BusUnavailable: not sent, or no reply in ``timeout`` seconds (``outcome_unknown``).
        """
        ...

    async def read(
        self,
        room: str,
        *,
        since: Position | None,
        limit: int | None,
        reverse: bool = False,
        epoch: str,
        ttl: float,
        timeout: float,
    ) -> Page:
        """Entries after ``since`` (``None``: from the oldest), at most ``limit`` (``None``: all; 0: only the
        position).

        ``reverse``: the newest first; with ``since`` those *before* it, as the Centrifuge protocol has it. A
        ``since`` of another epoch gives no entries and is not complete.

        ``epoch`` is the epoch of a room without numbering; its position has offset 0, and reading it stores
        nothing. Raises ``BusUnavailable`` as ``publish``.
        """
        ...


def seal_envelope(position: Position | None, previous: int, payload: bytes) -> bytes:
    """``payload`` as it is published in a room: ``offset previous epoch`` (or nothing), a newline, the
    message.

    Plain text in front, so that a Redis script can write it without decoding the message.
    """
    if position is None:
        return b"\n" + payload
    return b"%d %d %s\n%s" % (position.offset, previous, position.epoch.encode(), payload)


def open_envelope(data: bytes) -> tuple[Position | None, int, bytes]:
    """The position (``None`` without history), the previous offset, and the message.

    Raises:
        ValueError: this is no envelope.
    """
    head, separator, payload = data.partition(b"\n")
    if not separator:
        raise ValueError("a room message without envelope")
    if not head:
        return None, 0, payload
    try:
        offset, previous, epoch = head.split(b" ")
        return Position(int(offset), epoch.decode()), int(previous), payload
    except ValueError:
        raise ValueError("a room message with a malformed envelope") from None
