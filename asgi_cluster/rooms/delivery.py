"""What the bus brings for rooms, handed to their members here."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING

from asgi_cluster.bus.messages import Disconnect, Joined, Left, MalformedMessage, Published, decode
from asgi_cluster.rooms.history import open_envelope
from asgi_cluster.rooms.local_room import LocalRoom
from asgi_cluster.rooms.local_rooms import LocalRooms
from asgi_cluster.tasks import spawn

if TYPE_CHECKING:
    from asgi_cluster.rooms.connection import Connection

__all__ = ["Delivery"]

logger = logging.getLogger("asgi_cluster.realtime")

_IDS_KEPT = 1024
_SLICE = 0.01  # seconds for which the loop may be blocked


class Delivery:
    """From bytes to deliveries. Synchronous."""

    def __init__(self, rooms: LocalRooms) -> None:
        self._rooms = rooms
        self._local_ids: OrderedDict[str, None] = OrderedDict()
        self._followed: dict[str, bool] = {}
        self._warned: set[str] = set()

    def follow(self, message_id: str) -> None:
        """Note whether the bus brings this message, until ``followed`` is called: its publisher may get no
        answer.
        """
        self._followed[message_id] = False

    def followed(self, message_id: str) -> bool:
        """Whether it came. It is not followed any longer."""
        return self._followed.pop(message_id, False)

    def receive(self, room: str, payload: bytes) -> None:
        """What the bus brought for a room. Raises nothing: the bus's reader goes on."""
        local_room = self._rooms.get(room)
        if local_room is not None:
            try:
                self._receive(local_room, payload)
            except Exception:
                logger.exception("a room message could not be delivered")

    def _receive(self, local_room: LocalRoom, payload: bytes) -> None:
        try:
            position, previous, body = open_envelope(payload)
        except ValueError:
            self._warn_once("a room message without envelope arrived (another version?)")
            return
        if position is None:
            self.deliver(local_room, body)
        elif local_room.stream is None:
            if not self._rooms.members(local_room):
                return  # a member is about to enter, and reads history after this
            self._warn_once("a room has history on another node and none here: the nodes' rules differ")
            self.deliver(local_room, body)
        else:
            local_room.stream.receive(position, previous, body)

    def _warn_once(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", what)

    def deliver(self, local_room: LocalRoom, body: bytes, offset: int | None = None) -> None:
        """Hand one encoded message, of whatever kind, to the members here."""
        try:
            message = decode(body)
        except MalformedMessage:
            self._warn_once("a room message could not be decoded (another version?)")
            return
        match message:
            case Published():
                if message.id in self._followed:
                    self._followed[message.id] = True
                if message.id in self._local_ids:
                    del self._local_ids[message.id]
                    return
                self._deliver_published(local_room, message, offset)
            case Joined() | Left():
                name, info, joined = local_room.name, message.info, isinstance(message, Joined)
                local_room.deliver(lambda wire: (wire.join if joined else wire.leave)(name, info))
            case Disconnect():
                self._for_each(
                    (
                        member
                        for member in self._rooms.members(local_room)
                        if message.user is None or member.user_id == message.user
                    ),
                    lambda member: _take_out(member, local_room.name),
                )
            case _:
                self._warn_once("a message arrived in a room that does not belong in one")

    def _deliver_published(
        self, local_room: LocalRoom, message: Published, offset: int | None, *, local: bool = False
    ) -> None:
        local_room.deliver(
            lambda wire: wire.publication(local_room.name, message, offset, local=local),
            key=message.key,
            exclude=message.exclude,
        )

    def deliver_here(self, room: str, message: Published) -> None:
        """What could not be handed to the bus, for the members here (``on_bus_error="local"``)."""
        # It may have reached the bus after all, and must not be delivered twice.
        self._local_ids[message.id] = None
        if len(self._local_ids) > _IDS_KEPT:
            self._local_ids.popitem(last=False)
        local_room = self._rooms.get(room)
        if local_room is not None:
            self._deliver_published(local_room, message, None, local=True)

    def lost(self, local_room: LocalRoom) -> None:
        """Publications are lost for the members here: their membership ends, and clients come back for what
        there is.
        """
        # All are taken out at once, and get the message in slices: what comes after the loss must not reach a
        # member that has not got the message, because it would go on from there.
        members = self._rooms.members(local_room)
        local_room.clear()
        logger.warning(
            "publications of a room were lost for its %d members here: they are unsubscribed or closed",
            len(members),
        )
        self._for_each(iter(members), lambda member: member.membership.lost(member, local_room.name))

    def _for_each(self, members: Iterator[Connection], act: Callable[[Connection], None]) -> None:
        """Each on its own loop, in slices: a room of ten thousand must not block this one."""
        until = perf_counter() + _SLICE
        for member in members:
            try:
                member.socket.call(act, member)
            except Exception:
                logger.exception("a member could not be taken out of a room")  # the others still are
            if perf_counter() > until:
                asyncio.get_running_loop().call_soon(self._for_each, members, act)
                return


def _take_out(member: Connection, room: str) -> None:
    spawn(member.socket.tasks, member.leave(room), name="asgi-cluster leave")
