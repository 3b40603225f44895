"""What rooms remember, in memory."""

from __future__ import annotations

from collections import deque
from itertools import islice

import msgspec

from asgi_cluster.backends.memory.expiring import Expiring
from asgi_cluster.backends.memory.world import World
from asgi_cluster.realtime.history import NUMBERING_OUTLIVES, ONCE, Entry, Page, Position, seal_envelope

__all__ = ["MemoryHistory"]


class _Numbering(msgspec.Struct):
    epoch: str
    offset: int = 0


class _Logs:
    def __init__(self, world: World) -> None:
        self.numbering: Expiring[str, _Numbering] = Expiring(world.clock)
        self.entries: Expiring[str, deque[Entry]] = Expiring(world.clock)
        self.once: Expiring[str, Position] = Expiring(world.clock)


class MemoryHistory:
    """``realtime.history.HistoryStore`` for ``memory://``."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._logs: _Logs = world.part(_Logs)

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
        """See ``HistoryStore.publish``."""
        logs = self._logs
        # Room names hold no control characters, so no two pairs make one key.
        once = None if idempotency_key is None else f"{room}\n{idempotency_key}"
        with self._world.lock:
            if once is not None and (done := logs.once.get(once)) is not None:
                return done
            now = self._world.clock()
            numbering = self._numbering(room, epoch, ttl)
            previous = numbering.offset
            numbering.offset += 1
            position = Position(numbering.offset, numbering.epoch)
            entries = logs.entries.get(room) or deque()
            entries.append(Entry(position.offset, previous, payload))
            while len(entries) > size:
                entries.popleft()
            logs.entries.set(room, entries, now + ttl)
            if once is not None:
                logs.once.set(once, position, now + ONCE)
            self._world.tell_room(room, seal_envelope(position, previous, payload))
            return position

    def _numbering(self, room: str, epoch: str, ttl: float) -> _Numbering:
        numbering = self._logs.numbering.get(room)
        if numbering is None:
            numbering = _Numbering(epoch)
            self._logs.entries.pop(room)
        self._logs.numbering.set(room, numbering, self._world.clock() + ttl + NUMBERING_OUTLIVES)
        return numbering

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
        """See ``HistoryStore.read``."""
        with self._world.lock:
            numbering = self._numbering(room, epoch, ttl)
            top = Position(numbering.offset, numbering.epoch)
            held = self._logs.entries.get(room) or deque()
            if since is None:
                return Page(list(islice(reversed(held) if reverse else held, limit)), top, True)
            if since.epoch != top.epoch:
                return Page([], top, False)
            # The chain of previous offsets tells whether anything between the position and the first entry
            # after it is missing.
            complete = since == top or any(entry.previous == since.offset for entry in held)
            if reverse:
                kept = (entry for entry in reversed(held) if entry.offset < since.offset)
            else:
                kept = (entry for entry in held if entry.offset > since.offset)
            return Page(list(islice(kept, limit)), top, complete)
