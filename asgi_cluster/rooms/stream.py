"""The order of one room with history on this node: nothing twice, nothing left out unnoticed.

All members of a room here stand at the same place: ``last`` is the position of what was delivered last. A
publication whose ``previous`` is ``last`` is delivered; an older one is dropped; anything else is a gap, and
the room waits while the missing part is read from history. If it is not there (any more), every member's
membership ends.

A client that comes back with a position gets what lies between it and ``last`` from the *tail*: publications
that this node keeps for a while, so that a thousand clients that come back at once cost one read.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from asgi_cluster.bus.lease import Lease
from asgi_cluster.exceptions import ClusterError
from asgi_cluster.rooms.history import Entry, HistoryStore, Page, Position

__all__ = ["RoomStream"]

logger = logging.getLogger("asgi_cluster.realtime")

_TAIL_KEPT = 30.0  # seconds after its last use
_HELD = 10_000  # messages that may wait for a repair
_TRIES = 2
_RETRY = 0.25
_LONGEST_RETRY = 5.0


class RoomStream:
    """One room's order. ``deliver`` gets each publication once, in order; ``lost`` is called when some are
    lost for good.

    ``spawn`` starts a repair in the background.
    """

    def __init__(
        self,
        room: str,
        *,
        history: HistoryStore,
        size: int,
        ttl: float,
        timeout: float,
        epoch: Callable[[], str],
        lease: Callable[[], Lease],
        deliver: Callable[[Entry], None],
        lost: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._room = room
        self._history = history
        self._size = size
        self._ttl = ttl
        self._timeout = timeout
        self._epoch = epoch
        self._lease = lease
        self._deliver = deliver
        self._lost = lost
        self._spawn = spawn
        self.last: Position | None = None
        """Where every member here stands; ``None`` before the room was first read."""
        self._held: list[tuple[Position, int, bytes]] = []
        self._reads = 0
        self._flight: asyncio.Future[bool] | None = None
        self._tail: deque[Entry] | None = None
        self._tail_timer: asyncio.TimerHandle | None = None
        self._repairing = False
        self._first = 0  # the offset with which the numbering began; 0: not seen
        self._begun_anew = False  # a numbering began below ``last``: read what became of this one
        self._trusted = True
        # memory:// delivers on the publisher's thread.
        self._lock = threading.RLock()

    # Receiving

    def receive(self, position: Position, previous: int, payload: bytes) -> None:
        """A publication from the bus."""
        with self._lock:
            if self._reads or self._repairing or self.last is None:
                if self.last is not None or self._reads:
                    self._hold(position, previous, payload)
                return
            if not self._accept(position, previous, payload):
                self._hold(position, previous, payload)
                self._repair()
            elif self._begun_anew:
                self._repair()

    def _accept(self, position: Position, previous: int, payload: bytes) -> bool:
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
        self._advance(Entry(position.offset, previous, payload), position)
        return True

    def _advance(self, entry: Entry, position: Position) -> None:
        self.last = position
        if entry.previous == 0:
            self._first = entry.offset
        if self._tail is not None:
            self._tail.append(entry)
        self._deliver(entry)

    def _hold(self, position: Position, previous: int, payload: bytes) -> None:
        if len(self._held) >= _HELD:
            self._held.clear()  # the repair's read will find these, or find that they are lost
        self._held.append((position, previous, payload))

    # Repair

    def gap(self) -> None:
        """Publications may have been missed; wait for ``restored``."""
        self._trusted = False

    def restored(self) -> None:
        """The subscription stands again: see what was missed."""
        with self._lock:
            if self.last is not None and not self._repairing:
                self._repair()

    def _repair(self) -> None:
        self._repairing = True
        self._spawn(self._repaired())

    async def _repaired(self) -> None:
        delay = _RETRY
        tries = 0
        try:
            while True:
                self._begun_anew = False
                try:
                    await self._read(full=False)
                    tries += 1
                except ClusterError as error:
                    logger.debug("a room's history cannot be read (%s)", type(error).__name__)
                    # The room stays as it is until the history can be read; the pause is random, so that the
                    # rooms do not all read at once when the store is back.
                    await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                    delay = min(delay * 2, _LONGEST_RETRY)
                else:
                    with self._lock:
                        self._replay()
                        if not self._held and (not self._begun_anew or tries >= _TRIES):
                            return
                        if self._held and tries >= _TRIES:
                            # History does not have what came before these: they are where the room goes on.
                            position = self._held[-1][0]
                            self._held.clear()
                            self._give_up(position)
                            return
        finally:
            self._repairing = False

    async def _read(self, *, full: bool) -> None:
        """Read history and deliver what is missing. ``full``: all of it, and keep it as the tail. Concurrent
        reads are one.
        """
        loop = asyncio.get_running_loop()
        while (flight := self._flight) is not None and flight.get_loop() is loop:
            if await asyncio.shield(flight) and (self._tail is not None or not full):
                return
        self._flight = flight = loop.create_future()
        with self._lock:
            self._reads += 1
            last = self.last
        trusted_before, self._trusted = self._trusted, True  # unless another gap comes while we read
        page: Page | None = None
        failure: ClusterError | None = None
        try:
            page = await self._history.read(
                self._room,
                since=None if full else last,
                limit=0 if last is None and not full else None,
                epoch=self._epoch(),
                ttl=self._ttl,
                timeout=self._timeout,
            )
        except ClusterError as error:
            failure = error
            raise
        finally:
            with self._lock:
                self._reads -= 1
                if page is not None:
                    self._apply(page, full=full)
                else:
                    self._trusted = self._trusted and trusted_before
                if not self._reads and not self._repairing:
                    self._replay()
                    if self._begun_anew and not self._repairing:
                        self._repair()
            if self._flight is flight:
                self._flight = None
            if failure is None:
                flight.set_result(page is not None)
            else:
                flight.set_exception(failure)
                flight.exception()  # retrieved here: it may have no other waiter

    def _apply(self, page: Page, *, full: bool) -> None:
        last = self.last
        if last is None:
            self.last = page.top
        elif page.top.epoch != last.epoch:
            self._give_up(page.top)
        else:
            for entry in page.entries:
                if entry.offset <= last.offset:
                    continue
                if entry.previous != last.offset:
                    self._give_up(page.top)
                    break
                last = Position(entry.offset, last.epoch)
                self._advance(entry, last)
            else:
                if page.top.offset > last.offset or not (full or page.complete):
                    self._give_up(page.top)
        if full:
            self._keep_tail(page)

    def _keep_tail(self, page: Page) -> None:
        last = self.last
        assert last is not None
        self._tail = deque(
            (entry for entry in page.entries if entry.offset <= last.offset), maxlen=self._size
        )
        self._use_tail()

    def _replay(self) -> None:
        """What was held while a read was under way."""
        held, self._held = self._held, []
        for index, (position, previous, payload) in enumerate(held):
            if self.last is not None and not self._accept(position, previous, payload):
                self._held = held[index:]
                if not self._repairing:
                    self._repair()
                return

    def _give_up(self, top: Position) -> None:
        # Before anything else is delivered: the present members are out then, and what follows is not for
        # them.
        self._lost()
        self.last = top
        self._tail = None

    # Recovery

    async def recover(self, since: Position | None) -> tuple[list[Entry] | None, Position]:
        """What lies between ``since`` and ``last`` (``None``: not all of it is there), and ``last``.

        Nothing is delivered between the return and the caller's next ``await``: a member that attaches before
        that misses nothing. ``since=None`` asks for the position only.

        Raises:
            BusUnavailable: the history could not be read.
        """
        if self.last is None:
            await self._read(full=since is not None)
        elif not self._trusted or not self._lease().live or self._repairing:
            await self._read(full=False)
        last = self._known()
        if since is None:
            return None, last
        if since.offset > last.offset and since.epoch in ("", last.epoch):
            # The client has got what has not reached this node yet.
            await self._read(full=False)
            last = self._known()
        if since.epoch not in ("", last.epoch) or since.offset > last.offset:
            return None, last
        if since.offset == last.offset:
            return [], last
        if self._tail is None:
            await self._read(full=True)
            last = self._known()
            if since.epoch not in ("", last.epoch):
                return None, last
        return self._after(since.offset), last

    def _known(self) -> Position:
        assert self.last is not None
        return self.last

    def _after(self, offset: int) -> list[Entry] | None:
        self._use_tail()
        found: list[Entry] | None = None
        for entry in self._tail or ():
            # A position inside a jump (a failover lost what it stood for) is no entry's ``previous``: not
            # recovered.
            if entry.previous == offset and found is None:
                found = []
            if found is not None:
                found.append(entry)
        return found

    def _use_tail(self) -> None:
        if self._tail_timer is not None:
            self._tail_timer.cancel()
        self._tail_timer = asyncio.get_running_loop().call_later(_TAIL_KEPT, self._drop_tail)

    def _drop_tail(self) -> None:
        self._tail = None
        self._tail_timer = None

    def close(self) -> None:
        """The room has no members here any more."""
        if self._tail_timer is not None:
            self._tail_timer.cancel()
        self._drop_tail()

    def __repr__(self) -> str:
        return f"<RoomStream at {self.last}, {len(self._held)} held>"
