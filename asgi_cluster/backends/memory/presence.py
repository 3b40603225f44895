"""Who is in which room, in memory."""

from __future__ import annotations

from collections.abc import Mapping

from asgi_cluster.backends.memory.broker import Attachment, MemoryBroker
from asgi_cluster.exceptions import NotStarted
from asgi_cluster.rooms.presence import count_people

__all__ = ["MemoryPresence"]


class _Rooms:
    def __init__(self, broker: MemoryBroker) -> None:
        self.members: dict[str, dict[str, tuple[str, bytes]]] = {}
        broker.on_detach.append(self.forget)

    def forget(self, attachment: Attachment) -> None:
        """A node has left: so have its members, in every room."""
        for room in list(self.members):
            self.remove(room, attachment.incarnation)

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
    """``rooms.presence.PresenceStore`` for one node of a broker."""

    def __init__(self, broker: MemoryBroker, attachment: Attachment) -> None:
        self._broker = broker
        self._rooms: _Rooms = broker.part(_Rooms)
        self._attachment = attachment

    async def enter(
        self, room: str, client: str, info: bytes, *, limit: int | None = None, timeout: float
    ) -> bool:
        with self._broker.lock:
            incarnation = self._attachment.incarnation
            if not incarnation:
                raise NotStarted("presence")
            if limit is not None:
                there = self._registered(room)
                if client not in there and len(there) >= limit:
                    return False
            self._rooms.members.setdefault(room, {})[client] = (incarnation, info)
            return True

    async def leave(self, room: str, client: str, *, timeout: float) -> bool:
        with self._broker.lock:
            members = self._rooms.members.get(room, {})
            found = members.pop(client, None) is not None
            if not members:
                self._rooms.members.pop(room, None)
            return found

    async def members(self, room: str, *, timeout: float) -> Mapping[str, bytes]:
        with self._broker.lock:
            return self._registered(room)

    def _registered(self, room: str) -> dict[str, bytes]:
        living = {each.incarnation for each in self._broker.nodes().values()}
        return {
            client: info
            for client, (incarnation, info) in self._rooms.members.get(room, {}).items()
            if incarnation in living
        }

    async def stats(self, room: str, *, timeout: float) -> tuple[int, int]:
        return count_people(await self.members(room, timeout=timeout))

    async def reap(self, room: str, node: str, incarnation: str, *, timeout: float) -> Mapping[str, bytes]:
        """See ``PresenceStore.reap``. Rarely has anything to do: the members of a node that leaves go with
        it.
        """
        with self._broker.lock:
            return self._rooms.remove(room, incarnation)
