"""A room as applications see it: the handle, and what it gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asgi_cluster.arguments import expect
from asgi_cluster.ids import check_user
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.history import Entry, Position
from asgi_cluster.rooms.payload import decode_payload, encode_payload
from asgi_cluster.rooms.presence import read_info
from asgi_cluster.rooms.publications import published

if TYPE_CHECKING:
    from asgi_cluster.rooms.rooms import Rooms

__all__ = ["Publication", "Room", "RoomHistory", "RoomMember"]

logger = logging.getLogger("asgi_cluster.realtime")


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """One message of a room's history. ``data`` is what was broadcast: ``str``, ``bytes`` or a JSON value."""

    data: Any
    offset: int
    client: str | None = None
    """The id of the connection that published it; ``None``: the server."""
    user_id: str | None = None
    """The user of that connection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomHistory:
    """Publications, and the room's position when they were read."""

    publications: Sequence[Publication]
    offset: int
    epoch: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomMember:
    """A connection that is in a room with presence, somewhere in the cluster."""

    connection_id: str
    user_id: str | None
    info: Any = None
    """``Connected.info`` of the ``connect`` hook."""


class Room:
    """A room by its name, with or without members. Get one from ``cluster.room``."""

    __slots__ = ("_rooms", "name")

    def __init__(self, rooms: Rooms, name: str) -> None:
        self._rooms = rooms
        self.name = name

    async def broadcast(
        self,
        data: Any,
        *,
        exclude: Connection | str | None = None,
        key: str | None = None,
        idempotency_key: str | None = None,
    ) -> Position | None:
        """Send ``data`` to every member on every node: one round trip.

        The app's own sockets get ``str`` and JSON values as text and ``bytes`` as binary, bare. Clients of
        the endpoint get JSON; ``bytes`` reach them as a base64 string. In a room with history it is
        kept, and its position returned; elsewhere it is delivered at most once, and ``None`` returned.
        All nodes see one order.

        Args:
            exclude: a connection, or its id, that does not get it now. Recovery returns it all the same.
            key: with ``slow="latest"``, the last message of each key is kept for a slow client.
            idempotency_key: broadcasts with the same key within five minutes are one message. Needs a room
                with history.

        Raises:
            BusUnavailable: it could not be handed to the bus.
            TypeError, ValueError: ``data`` cannot be encoded, or is longer than ``max_broadcast_bytes``; or
                another argument is of the wrong type. Nothing was sent.
        """
        expect("exclude", exclude, Connection, str, None)
        expect("key", key, str, None)
        expect("idempotency_key", idempotency_key, str, None)
        kind, payload = encode_payload(data)
        excluded = exclude.id if isinstance(exclude, Connection) else exclude
        return await self._rooms.publish(
            self.name, kind, payload, exclude=excluded, key=key, idempotency_key=idempotency_key
        )

    async def history(
        self, limit: int | None = None, since: Position | None = None, reverse: bool = False
    ) -> RoomHistory:
        """The room's history: after ``since`` (``None``: from the oldest), at most ``limit`` (``None``:
        all).

        ``reverse``: the newest first. Raises ``BusUnavailable``, and ``ValueError`` when no rule gives the
        room a history, and for a negative ``limit`` or offset.
        """
        expect("limit", limit, int, None)
        expect("since", since, Position, None)
        if limit is not None and limit < 0:
            raise ValueError(f"limit must be at least 0, or None, not {limit!r}")
        if since is not None and since.offset < 0:
            raise ValueError(f"the offset of since must be at least 0, not {since.offset!r}")
        page = await self._rooms.read(self.name, limit=limit, since=since, reverse=reverse)
        publications = [
            found for entry in page.entries if (found := _publication(self.name, entry)) is not None
        ]
        return RoomHistory(publications=publications, offset=page.top.offset, epoch=page.top.epoch)

    async def presence(self) -> Sequence[RoomMember]:
        """Who is in the room, on every node. Raises ``BusUnavailable``; ``ValueError`` when no rule gives it
        presence.
        """
        members = await self._rooms.present(self.name)
        found = []
        for connection, encoded in members.items():
            read = read_info(encoded)
            if read is not None:
                found.append(RoomMember(connection_id=connection, user_id=read[0] or None, info=read[1]))
        return found

    async def disconnect(self, *, user: str | None = None) -> None:
        """Take a user (``None``: every user) out of the room on every node; the connections stay open. Raises
        ``BusUnavailable``.
        """
        await self._rooms.expel(self.name, None if user is None else check_user(user))

    def __repr__(self) -> str:
        return f"<Room {self.name!r}>"


def _publication(room: str, entry: Entry) -> Publication | None:
    message = published(room, entry)
    if message is None:
        return None
    read = None if message.info is None else read_info(message.info)
    try:
        data = decode_payload(message.kind, message.data)
    except ValueError as error:
        logger.warning("publication %d of room %r is unreadable and left out (%s)", entry.offset, room, error)
        return None
    return Publication(
        data=data,
        offset=entry.offset,
        client=message.client,
        user_id=None if read is None else read[0] or None,
    )
