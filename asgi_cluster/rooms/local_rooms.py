"""The rooms that have members on this node, and which of them are subscribed to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

from asgi_cluster.bus.room_bus import RoomBus
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.local_room import LocalRoom
from asgi_cluster.sockets.hub import Hub

__all__ = ["LocalRooms"]


class LocalRooms:
    """Every room with a member here, or one that is about to be."""

    def __init__(self, bus: RoomBus, hub: Hub, *, crosses_loops: bool) -> None:
        self._bus = bus
        self._hub = hub
        self._crosses_loops = crosses_loops
        self._rooms: dict[str, LocalRoom] = {}
        # memory:// joins loops in several threads; elsewhere it is never contended.
        self._lock = threading.RLock()

    async def acquire(self, room: str) -> LocalRoom:
        """Count one more for ``room``; returns when its messages arrive here. ``release`` once for each
        ``acquire``.

        Raises:
            BusUnavailable: the server refuses the channel. Nothing is counted then, nor after a cancellation.
        """
        with self._lock:
            local_room = self._rooms.get(room)
            if local_room is None:
                outboxes, loop = self._hub.outboxes, asyncio.get_running_loop()
                local_room = LocalRoom(room, None if self._crosses_loops else outboxes.flusher(loop))
                self._rooms[room] = local_room
            local_room.users += 1
        try:
            if not local_room.subscribed:
                # Each caller before the acknowledgement waits for it separately (the port is idempotent): the
                # cancellation of one does not cancel the others.
                await self._bus.subscribe(room)
                local_room.subscribed = True
        except BaseException:
            self.release(local_room)
            raise
        return local_room

    def release(self, local_room: LocalRoom) -> None:
        """One less; the last one unsubscribes."""
        with self._lock:
            local_room.users -= 1
            if local_room.users == 0 and self._rooms.get(local_room.name) is local_room:
                del self._rooms[local_room.name]
                # Here, under the lock: a join that comes after this subscribes after this.
                self._bus.unsubscribe(local_room.name)
                if local_room.stream is not None:
                    local_room.stream.close()

    def get(self, room: str) -> LocalRoom | None:
        """The members of ``room`` here; ``None`` when there are none."""
        return self._rooms.get(room)

    def members(self, local_room: LocalRoom) -> tuple[Connection, ...]:
        """The members of a room here."""
        found = map(self._hub.member, local_room.members())
        return tuple(member for member in found if isinstance(member, Connection))

    def connections(self) -> tuple[Connection, ...]:
        """Every socket here that the cluster serves."""
        return tuple(found for found in self._hub.served() if isinstance(found, Connection))

    def __iter__(self) -> Iterator[LocalRoom]:
        return iter(tuple(self._rooms.values()))

    def __len__(self) -> int:
        return len(self._rooms)

    def __repr__(self) -> str:
        return f"<LocalRooms {len(self._rooms)}>"
