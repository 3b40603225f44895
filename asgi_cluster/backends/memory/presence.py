"""Who is in which room, in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from asgi_cluster.backends.memory.world import Attachment, MemoryBroker
from asgi_cluster.rooms.presence import count_people

__all__ = ["MemoryPresence"]


class _Rooms:
    def __init__(self, world: MemoryBroker) -> None:
        self.members: dict[str, dict[str, tuple[str, bytes]]] = {}
        world.on_leave.append(self.forget)

    def forget(self, seat: Attachment) -> None:
        """A node has left: so have its members, in every room."""
        for room in list(self.members):
            self.remove(room, seat.incarnation)

    def remove(self, room: str, incarnation: str) -> Mapping[str, bytes]:
        """Who was in the room by this incarnation of a node."""
        members = self.members.get(room, {})
        gone = {client: info for client, (of, info) in members.items() if of == incarnation}
        for client in gone:
            del members[client]
        if not members:
            self.members.pop(room, None)
        return gone


class MemoryPresence:
    """``rooms.presence.PresenceStore`` for one node of a world. ``incarnation()`` is that node's own."""

    def __init__(self, world: MemoryBroker, incarnation: Callable[[], str]) -> None:
        self._world = world
        self._rooms: _Rooms = world.part(_Rooms)
        self._incarnation = incarnation

    async def enter(
        self, room: str, client: str, info: bytes, *, limit: int | None = None, timeout: float
    ) -> bool:
        """See ``PresenceStore.enter``."""
        with self._world.lock:
            if limit is not None:
                there = self._living(room)
                if client not in there and len(there) >= limit:
                    return False
            self._rooms.members.setdefault(room, {})[client] = (self._incarnation(), info)
            return True

    async def leave(self, room: str, client: str, *, timeout: float) -> bool:
        """See ``PresenceStore.leave``."""
        with self._world.lock:
            members = self._rooms.members.get(room, {})
            found = members.pop(client, None) is not None
            if not members:
                self._rooms.members.pop(room, None)
            return found

    async def members(self, room: str, *, timeout: float) -> Mapping[str, bytes]:
        """See ``PresenceStore.members``."""
        with self._world.lock:
            return self._living(room)

    def _living(self, room: str) -> dict[str, bytes]:
        living = {seat.incarnation for seat in self._world.living()}
        return {
            client: info
            for client, (incarnation, info) in self._rooms.members.get(room, {}).items()
            if incarnation in living
        }

    async def stats(self, room: str, *, timeout: float) -> tuple[int, int]:
        """See ``PresenceStore.stats``."""
        return count_people(await self.members(room, timeout=timeout))

    async def reap(self, room: str, node: str, incarnation: str, *, timeout: float) -> Mapping[str, bytes]:
        """See ``PresenceStore.reap``. Rarely has anything to do: the members of a node that leaves go with
        it.
        """
        with self._world.lock:
            return self._rooms.remove(room, incarnation)
