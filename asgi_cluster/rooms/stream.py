"""The order of one room with history on this node: nothing twice, and nothing left out without ``LOST``.
Without I/O.

All members of a room here have the same position, ``last``: that of what was delivered last. A
publication whose ``previous`` is ``last`` is delivered; an older one is dropped; anything else is a gap, and
the room waits while the missing part is read from history. If it is not there (any more), every member's
membership ends.

A client that comes back with a position gets what lies between it and ``last`` from the *tail*: publications
that this node keeps for a while, so that a thousand clients that come back at once cost one read.

Events go in: what the bus brought, a gap, a page of history. Each returns what to do, in that order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from asgi_cluster.rooms.history import Entry, Page, Position

__all__ = ["Action", "Read", "Recovered", "RoomStream"]

_HELD = 10_000  # messages that may wait for a repair
_TRIES = 2


class Action(Enum):
    """What is to be done besides a delivery."""

    LOST = "lost"
    """Publications are lost for good: every membership here ends, before anything later is delivered."""
    REPAIR = "repair"
    """A repair has begun: read history (``begin_try``, a read, ``end_try``) as long as ``repairing``."""


Actions = Sequence[Entry | Action]
"""In order: publications to deliver, and what else is to be done."""


@dataclass(frozen=True, slots=True)
class Read:
    """A read of the history that has begun: entries after ``since`` (``None``: from the oldest), at most
    ``limit`` (``None``: all).
    """

    since: Position | None
    limit: int | None
    full: bool
    trusted_before: bool


class Recovered(NamedTuple):
    """What a client has missed (``None``: not all of it is there), and the room's position."""

    missed: Sequence[Entry] | None
    position: Position


class RoomStream:
    """One room's order. Each publication is to be delivered once, in order, or ``LOST`` says that some are
    missing.

    ``size`` is the number of publications that the room keeps.
    """

    def __init__(self, *, size: int) -> None:
        self._size = size
        self.last: Position | None = None
        """The position of every member here; ``None`` before the room was first read."""
        self.repairing = False
        """Whether a repair is under way."""
        self._tries = 0  # of the repair under way
        self._held: list[tuple[Position, int, bytes]] = []
        self._reads = 0
        self._tail: deque[Entry] | None = None
        self._first = 0  # the offset with which the numbering began; 0: not seen
        self._begun_anew = False  # a numbering began below ``last``: read what became of this one
        self._trusted = True

    # Receiving

    def receive(self, position: Position, previous: int, payload: bytes) -> Actions:
        """A publication from the bus."""
        actions: list[Entry | Action] = []
        if self._reads or self.repairing or self.last is None:
            if self.last is not None or self._reads:
                self._hold(position, previous, payload)
        elif not self._accept(position, previous, payload, actions):
            self._hold(position, previous, payload)
            self._repair(actions)
        elif self._begun_anew:
            self._repair(actions)
        return actions

    def _accept(
        self, position: Position, previous: int, payload: bytes, actions: list[Entry | Action]
    ) -> bool:
        """Deliver what comes next, drop what is old; False when something is missing in between."""
        last = self.last
        if last is None or position.epoch != last.epoch:
            return False
        if position.offset <= last.offset:
            if previous == 0 and position.offset not in (last.offset, self._first):
                # The first of a numbering: a late copy, or this numbering was lost and another one has begun,
                # of the same epoch and with lower numbers. A read decides.
                self._begun_anew = True
            return True
        if previous != last.offset:
            return False
        self._advance(Entry(position.offset, previous, payload), position, actions)
        return True

    def _advance(self, entry: Entry, position: Position, actions: list[Entry | Action]) -> None:
        self.last = position
        if entry.previous == 0:
            self._first = entry.offset
        if self._tail is not None:
            self._tail.append(entry)
        actions.append(entry)

    def _hold(self, position: Position, previous: int, payload: bytes) -> None:
        if len(self._held) >= _HELD:
            self._held.clear()  # the repair's read will find these, or find that they are lost
        self._held.append((position, previous, payload))

    def gap(self) -> None:
        """Publications may have been missed; ``restored`` follows."""
        self._trusted = False

    def restored(self) -> Actions:
        """The room is subscribed to again: read what was missed."""
        actions: list[Entry | Action] = []
        if self.last is not None and not self.repairing:
            self._repair(actions)
        return actions

    # Repair

    def _repair(self, actions: list[Entry | Action]) -> None:
        self.repairing = True
        self._tries = 0
        actions.append(Action.REPAIR)

    def begin_try(self) -> None:
        """The repair reads history now, or waits for a read that is under way. After a read that failed it
        begins again.
        """
        self._begun_anew = False

    def end_try(self) -> Actions:
        """History was read for the repair. ``repairing`` says whether it has to be read again."""
        actions: list[Entry | Action] = []
        self._tries += 1
        self._replay(actions)
        if self._held and self._tries >= _TRIES:
            # History does not have what came before these: they are where the room goes on.
            position = self._held[-1][0]
            self._held.clear()
            self._give_up(position, actions)
            self.repairing = False
        elif not self._held and (not self._begun_anew or self._tries >= _TRIES):
            self.repairing = False
        return actions

    def abandon_repair(self) -> None:
        """The repair was cancelled: the next arrival begins another, and the next recovery reads history."""
        self.repairing = self._trusted = False

    # Reading

    def begin_read(self, *, full: bool) -> Read:
        """Read what is missing, or (``full``) all of the history, to keep it as the tail. ``end_read`` is
        due.
        """
        self._reads += 1
        last, trusted_before = self.last, self._trusted
        self._trusted = True  # unless another gap comes during the read
        limit = 0 if last is None and not full else None
        return Read(None if full else last, limit, full, trusted_before)

    def end_read(self, read: Read, page: Page | None) -> Actions:
        """The read gave ``page``; ``None``: it failed or was cancelled."""
        actions: list[Entry | Action] = []
        self._reads -= 1
        if page is None:
            self._trusted = self._trusted and read.trusted_before
        else:
            self._apply(page, actions, full=read.full)
        if not self._reads and not self.repairing:
            self._replay(actions)
            if self._begun_anew and not self.repairing:
                self._repair(actions)
        return actions

    def _apply(self, page: Page, actions: list[Entry | Action], *, full: bool) -> None:
        last = self.last
        if last is None:
            self.last = page.top
        elif page.top.epoch != last.epoch:
            self._give_up(page.top, actions)
        else:
            for entry in page.entries:
                if entry.offset <= last.offset:
                    continue
                if entry.previous != last.offset:
                    self._give_up(page.top, actions)
                    break
                last = Position(entry.offset, last.epoch)
                self._advance(entry, last, actions)
            else:
                if page.top.offset > last.offset or not (full or page.complete):
                    self._give_up(page.top, actions)
        if full:
            last = self._known()
            self._tail = deque(
                (entry for entry in page.entries if entry.offset <= last.offset), maxlen=self._size
            )

    def _replay(self, actions: list[Entry | Action]) -> None:
        """What arrived while a read was under way."""
        held, self._held = self._held, []
        for index, (position, previous, payload) in enumerate(held):
            if self.last is not None and not self._accept(position, previous, payload, actions):
                self._held = held[index:]
                if not self.repairing:
                    self._repair(actions)
                return

    def _give_up(self, top: Position, actions: list[Entry | Action]) -> None:
        actions.append(Action.LOST)
        self.last = top
        self._tail = None

    # Recovery

    def recover(self, since: Position | None, *, live: bool) -> Generator[bool, None, Recovered]:
        """What lies between ``since`` and ``last``. Yields when history has to be read first: whether
        ``full``. ``since=None``: only the position is wanted. ``live``: the rooms' lease is.
        """
        if self.last is None:
            yield since is not None
        elif not self._trusted or not live or self.repairing:
            yield False
        if since is None:
            return Recovered(None, self._known())
        if since.offset > self._known().offset and since.epoch in ("", self._known().epoch):
            # The client has got what has not reached this node yet.
            yield False
        last = self._known()
        if since.epoch not in ("", last.epoch) or since.offset > last.offset:
            return Recovered(None, last)
        if since.offset == last.offset:
            return Recovered([], last)
        if self._tail is None:
            yield True
            last = self._known()
            if since.epoch not in ("", last.epoch):
                return Recovered(None, last)
        return Recovered(self._after(since.offset), last)

    def _known(self) -> Position:
        assert self.last is not None
        return self.last

    def _after(self, offset: int) -> list[Entry] | None:
        found: list[Entry] | None = None
        for entry in self._tail or ():
            # A position inside a jump (a failover lost what it stood for) is no entry's ``previous``: not
            # recovered.
            if entry.previous == offset and found is None:
                found = []
            if found is not None:
                found.append(entry)
        return found

    @property
    def has_tail(self) -> bool:
        """Whether the tail is kept."""
        return self._tail is not None

    def drop_tail(self) -> None:
        """Keep it no longer."""
        self._tail = None

    def __repr__(self) -> str:
        return f"<RoomStream at {self.last}, {len(self._held)} held>"
