"""Where this node's connections are present, as the store has it or is to have it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from asgi_cluster.bus.room_bus import RoomBus
from asgi_cluster.exceptions import ClusterError
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.presence import PresenceStore

__all__ = ["PresenceTracker"]

logger = logging.getLogger("asgi_cluster.realtime")

T = TypeVar("T")

_AT_ONCE = 64
_RETRY = 0.5
_TRIES = 10


class PresenceTracker:
    """Keeps this node's entries in the presence store.

    ``info`` gives a connection's client info as JSON.
    """

    def __init__(
        self, store: PresenceStore, bus: RoomBus, *, info: Callable[[Connection], bytes], timeout: float
    ) -> None:
        self._store = store
        self._bus = bus
        self._info = info
        self._timeout = timeout
        self._left_over: set[tuple[str, str]] = set()
        self._incarnation: str | None = None

    async def add(self, connection: Connection, room: str, *, limit: int | None = None) -> bool:
        """The connection is in ``room``, unless its outbox is closed or is closed meanwhile; False when
        ``limit`` others are. Raises ``BusUnavailable``. ``remove`` is due in each case.
        """
        if connection.outbox.closed:
            return True
        connection._present[room] = None  # before: an entry whose reply was lost has to go, too
        self._left_over.discard((room, connection.id))  # it is there again
        if self._incarnation is None:
            self._incarnation = self._bus.incarnation
        info = self._info(connection)
        try:
            return await self._store.enter(room, connection.id, info, limit=limit, timeout=self._timeout)
        finally:
            if connection.outbox.closed:
                # The connection ended meanwhile, and what removed its entries may have come before this one.
                connection._present[room] = None
                await self.remove(connection, room)

    async def remove(self, connection: Connection, room: str) -> None:
        """It is not (any more). If the store does not answer now, the entry is removed when it is back."""
        if room not in connection._present:
            return
        connection._present.pop(room, None)
        try:
            await self._store.leave(room, connection.id, timeout=self._timeout)
        except ClusterError:
            self._left_over.add((room, connection.id))
        except asyncio.CancelledError:
            self._left_over.add((room, connection.id))  # it may not have been sent
            raise

    async def remove_from(self, connection: Connection, rooms: Iterable[str]) -> None:
        """``remove`` from several rooms at once."""
        await _together(lambda room: self.remove(connection, room), rooms)

    async def restore(self, connections: Callable[[], Iterable[Connection]]) -> None:
        """The bus is back: remove the entries that could not be removed; and where this node had to register
        anew, enter its connections again, because what its former incarnation entered counts as a dead
        node's.
        """
        for _ in range(_TRIES):
            try:
                await self._remove_left_over()
                incarnation = self._bus.incarnation
                if self._incarnation not in (None, incarnation):
                    present = [(found, room) for found in connections() for room in tuple(found._present)]
                    await _together(lambda pair: self._enter_again(*pair), present)
                    self._incarnation = incarnation
            except ClusterError as error:
                logger.debug("presence could not be restored (%s)", type(error).__name__)
                await asyncio.sleep(_RETRY * random.uniform(0.5, 1.0))
            else:
                return
        logger.warning(
            "presence of this node could not be restored: the next restoration of the bus tries again"
        )

    async def _remove_left_over(self) -> None:
        for entry in tuple(self._left_over):
            if entry in self._left_over:  # else it has entered again meanwhile
                await self._store.leave(*entry, timeout=self._timeout)
                self._left_over.discard(entry)

    async def _enter_again(self, connection: Connection, room: str) -> None:
        if room not in connection._present:
            return
        await self._store.enter(room, connection.id, self._info(connection), timeout=self._timeout)
        if room not in connection._present:
            # It left while its entry was being written.
            await self._store.leave(room, connection.id, timeout=self._timeout)

    def __repr__(self) -> str:
        return f"<PresenceTracker, {len(self._left_over)} entries to remove>"


async def _together(work: Callable[[T], Coroutine[Any, Any, None]], items: Iterable[T]) -> None:
    pending = list(items)
    for start in range(0, len(pending), _AT_ONCE):
        try:
            async with asyncio.TaskGroup() as group:
                for item in pending[start : start + _AT_ONCE]:
                    group.create_task(work(item))
        except* ClusterError as errors:
            failed = errors.exceptions[0]
        else:
            continue
        raise failed
