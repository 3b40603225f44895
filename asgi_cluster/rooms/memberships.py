"""Who enters and leaves the rooms of this node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import msgspec

from asgi_cluster.bus.messages import Joined, Left, Message
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import BusUnavailable, ClusterError
from asgi_cluster.node import Node
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.history import Entry, Position
from asgi_cluster.rooms.local_room import LocalRoom
from asgi_cluster.rooms.local_rooms import LocalRooms
from asgi_cluster.rooms.presence import ClientInfo
from asgi_cluster.rooms.presence_tracker import PresenceTracker
from asgi_cluster.rooms.retention import Kept, Retention
from asgi_cluster.rooms.rules import RoomRule, find_rule
from asgi_cluster.rooms.stream_runner import StreamRunner
from asgi_cluster.tasks import spawn

__all__ = ["Entered", "Memberships", "client_info"]

logger = logging.getLogger("asgi_cluster.realtime")


@dataclass(frozen=True, slots=True)
class Entered:
    """How a connection entered a room: the room's position (``None``: no history), and what was missed
    (``None``: the history does not have all of it).
    """

    position: Position | None
    missed: Sequence[Entry] | None


class Memberships:
    """Which connections of this node are in which rooms.

    ``publish`` sends a join or a leave to a room's members everywhere; ``stream`` gives a room with history
    its stream.
    """

    def __init__(
        self,
        *,
        node: Node,
        rules: Sequence[RoomRule],
        rooms: LocalRooms,
        presence: PresenceTracker,
        retention: Retention,
        publish: Callable[[str, Message], Awaitable[None]],
        stream: Callable[[LocalRoom, Kept], StreamRunner],
    ) -> None:
        self._node = node
        self._rules = rules
        self._rooms = rooms
        self.presence = presence
        self._retention = retention
        self._publish = publish
        self._stream = stream
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def enter(self, connection: Connection, room: str, *, since: Position | None = None) -> Entered:
        """Make ``connection`` a member. Nothing is delivered to it before the return, and nothing missed
        after it. A connection whose outbox is closed, or is closed meanwhile, is in no room afterwards.

        Raises:
            BusUnavailable, StoreUnavailable: not entered.
        """
        self._node.ensure_started("joining a room")
        async with self._turn(connection, room):
            already = connection.rooms.get(room)
            if already is not None:
                return Entered(None if already.stream is None else already.stream.last, None)
            if connection._over:
                return Entered(None, None)
            return await self._enter(connection, room, since)

    async def _enter(self, connection: Connection, room: str, since: Position | None) -> Entered:
        found = find_rule(self._rules, room)
        rule = None if found is None else found[0]
        try:
            await self._retention.refresh(self._node.deadline)
        except BusUnavailable:
            # Entering publishes nothing, and a room without history can be entered while the bus is down.
            logger.debug("a room is entered by the rules that were read last")
        kept = self._retention.of(room)
        local_room = await self._rooms.acquire(room)
        try:
            if rule is not None and rule.presence:
                await self.presence.add(connection, room)
            missed: Sequence[Entry] | None = None
            position: Position | None = None
            if kept is not None:
                missed, position = await self._stream(local_room, kept).recover(since)
        except BaseException:
            self._rooms.release(local_room)
            await self.presence.remove(connection, room)
            raise
        if connection._over:
            self._rooms.release(local_room)
            # ``leave_all`` may have run while the entry was on its way to the store: withdraw it again.
            connection._present[room] = None
            await self.presence.remove(connection, room)
            return Entered(None, None)
        # No await from here to the return: what is delivered after this goes to this member too.
        if rule is not None:
            # In a room with history no message may be dropped for a slow member, whatever the rule here says.
            local_room.slow = rule.slow if kept is None else "disconnect"
            local_room.join_leave = rule.join_leave
        connection.rooms[room] = local_room
        local_room.attach(connection.id, connection.outbox)
        if local_room.join_leave:
            self._announce(connection, room, Joined(connection.id, client_info(connection)))
        return Entered(position, missed)

    async def join(self, connection: Connection, room: str) -> None:
        """``Connection.join`` of an app's own socket."""
        connection._check_open()
        await self.enter(connection, room)
        connection._check_open()

    async def leave(self, connection: Connection, room: str) -> bool:
        """End a membership; False when there was none. Waits for an ``enter`` that began before."""
        async with self._turn(connection, room):
            left = self.detach(connection, room)
            await self.presence.remove(connection, room)
            return left

    def _turn(self, connection: Connection, room: str) -> asyncio.Lock:
        """One change of a membership at a time, in the order of the calls: presence and membership agree
        after each.
        """
        return self._turns.setdefault((connection.id, room), asyncio.Lock())

    async def leave_all(self, connection: Connection) -> None:
        """The connection is over."""
        self.detach_all(connection)
        await self.presence.remove_from(connection, tuple(connection._present))

    def detach(self, connection: Connection, room: str) -> bool:
        """End a membership here and now; False when there was none. ``leave``, ``leave_all`` or
        ``update_presence`` is due for the rest: who is present.
        """
        local_room = connection.rooms.pop(room, None)
        if local_room is None:
            return False
        if local_room.join_leave:
            self._announce(connection, room, Left(connection.id, client_info(connection)))
        local_room.detach(connection.id, connection.outbox)
        self._rooms.release(local_room)
        return True

    def detach_all(self, connection: Connection) -> None:
        """``detach`` from every room."""
        for room in tuple(connection.rooms):
            self.detach(connection, room)

    def lost(self, connection: Connection, room: str) -> None:
        """An app's own socket has lost publications: without a protocol the only sign for that is the close
        code 3010.
        """
        connection.socket.close(CloseCode.INSUFFICIENT_STATE, CloseCode.INSUFFICIENT_STATE.text)

    async def update_presence(self, connection: Connection, room: str) -> None:
        """After ``detach``: it is not present any more, unless it has entered again."""
        async with self._turn(connection, room):
            if room not in connection.rooms:
                await self.presence.remove(connection, room)

    def _announce(self, connection: Connection, room: str, message: Message) -> None:
        async def announce() -> None:
            try:
                await self._publish(room, message)
            except ClusterError as error:
                logger.debug("a join or leave was not published (%s)", type(error).__name__)

        def start() -> None:
            try:
                spawn(connection.socket.tasks, announce(), name="asgi-cluster rooms")
            except RuntimeError:
                return  # the node is stopping: the one that removes it from the registry publishes the leave

        # Its own loop may be about to end the socket's tasks: what waits for a turn there would be too late.
        connection.socket.call(start, at_once=True)


def client_info(connection: Connection) -> bytes:
    """What other clients see of a connection, as JSON."""
    info = ClientInfo(user=connection.user_id or "", client=connection.id)
    if connection.info is not None:
        info = msgspec.structs.replace(info, conn_info=msgspec.Raw(msgspec.json.encode(connection.info)))
    return msgspec.json.encode(info)
