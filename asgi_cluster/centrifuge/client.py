"""A client of the endpoint: its connection, and its subscriptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgi_cluster.centrifuge.hooks import permit
from asgi_cluster.centrifuge.messages import (
    ErrorCode,
    PublishCommand,
    ReplyError,
    SubscribeCommand,
    SubscribeResult,
)
from asgi_cluster.centrifuge.protocol import encode_push
from asgi_cluster.centrifuge.services import Services
from asgi_cluster.centrifuge.wire import pub_of
from asgi_cluster.codes import CloseCode, UnsubscribeCode
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.history import Position
from asgi_cluster.rooms.memberships import Entered
from asgi_cluster.rooms.rules import RoomRule
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.tasks import spawn

__all__ = ["Client", "check_supported"]


class Client:
    """What a command may use: the connection, its subscriptions, and the services that all clients share.

    A subscription is a membership in a room. The client requested it, or the server made it.
    """

    __slots__ = ("_entering", "connection", "server_side", "services")

    def __init__(self, services: Services, connection: Connection) -> None:
        self.services = services
        self.connection = connection
        # Tuples, because most stay empty: an empty set takes 216 bytes, and an empty tuple none.
        self._entering: tuple[str, ...] = ()
        self.server_side: tuple[str, ...] = ()
        """The rooms to which the server subscribed it."""

    def rule(self, room: str) -> tuple[RoomRule, dict[str, str]]:
        """The rule for a room, and what its pattern's names stand for. Raises ``ReplyError`` without one."""
        found = self.services.rooms.rule(room)
        if found is None:
            raise ReplyError(ErrorCode.UNKNOWN_CHANNEL)
        return found

    def end(self, code: CloseCode) -> None:
        """Close the connection."""
        self.connection.socket.close(code, code.text)

    # Subscriptions that the client requests

    async def subscribe(self, request: SubscribeCommand) -> SubscribeResult:
        """Nothing is pushed from the room before the reply, and nothing is missed after it."""
        room, connection = request.channel, self.connection
        memberships = self.services.rooms.memberships
        check_supported(request)
        rule, params = self.rule(room)
        if room in connection.rooms or room in self._entering:
            raise ReplyError(ErrorCode.ALREADY_SUBSCRIBED)
        if len(connection.rooms) + len(self._entering) >= self.services.config.max_rooms:
            raise ReplyError(ErrorCode.LIMIT_EXCEEDED)
        self._entering += (room,)
        try:
            await permit(connection, "subscribe", rule, room, params, request.data)
            # Without an epoch it is in the present one, as on the reference server.
            since = Position(request.offset, request.epoch) if request.recover else None
            entered = await memberships.enter(connection, room, since=since)
        finally:
            self._entering = _without(self._entering, room)
        result = _subscribed(room, entered, request)
        if request.rejects_unrecovered and result.was_recovering and not result.recovered:
            await memberships.leave(connection, room)
            raise ReplyError(ErrorCode.UNRECOVERABLE_POSITION)
        return result

    async def unsubscribe(self, room: str) -> None:
        """Harmless when there is no such subscription."""
        self.server_side = _without(self.server_side, room)
        await self.services.rooms.memberships.leave(self.connection, room)

    # Subscriptions that the server makes

    async def subscribe_here(self, room: str, request: SubscribeCommand | None) -> SubscribeResult:
        """``request`` is what the client sent for the subscription when it connected."""
        since = None if request is None or not request.recover else Position(request.offset, request.epoch)
        entered = await self.services.rooms.memberships.enter(self.connection, room, since=since)
        if room not in self.server_side:
            self.server_side += (room,)
        return _subscribed(room, entered, request or SubscribeCommand())

    async def join(self, connection: Connection, room: str) -> None:
        """Subscribe the client to ``room``, which it did not request, and send it the subscription."""
        if room in connection.rooms:
            return
        result = await self.subscribe_here(room, None)
        subscribe: dict[str, Any] = {"recoverable": result.recoverable, "positioned": result.positioned}
        if result.positioned:
            subscribe |= {"epoch": result.epoch, "offset": result.offset}
        push = encode_push("subscribe", subscribe, channel=room)
        connection.outbox.push(PreparedMessage(push))

    async def leave(self, connection: Connection, room: str) -> None:
        """End a subscription, and send the client the end."""
        self.server_side = _without(self.server_side, room)
        if await self.services.rooms.memberships.leave(connection, room):
            self._push_unsubscribe(room, UnsubscribeCode.SERVER, "server unsubscribe")

    def lost(self, connection: Connection, room: str) -> None:
        """Publications are lost: the client subscribes again and gets what there is."""
        memberships = self.services.rooms.memberships
        if room in self.server_side:
            self.end(CloseCode.INSUFFICIENT_STATE)
        elif memberships.detach(connection, room):
            self._push_unsubscribe(room, UnsubscribeCode.INSUFFICIENT_STATE, "insufficient state")
            work = memberships.update_presence(connection, room)
            spawn(connection.socket.tasks, work, name="asgi-cluster leave")

    def detach_all(self, connection: Connection) -> None:
        """It is subscribed to nothing any more."""
        self.services.rooms.memberships.detach_all(connection)

    def _push_unsubscribe(self, room: str, code: int, reason: str) -> None:
        push = encode_push("unsubscribe", {"code": code, "reason": reason}, channel=room)
        self.connection.outbox.push(PreparedMessage(push))


def _without(rooms: tuple[str, ...], room: str) -> tuple[str, ...]:
    return tuple(other for other in rooms if other != room)


def check_supported(request: SubscribeCommand | PublishCommand) -> None:
    """What cannot be had is refused: never accepted as something else."""
    if request.unsupported:
        raise ReplyError(ErrorCode.NOT_AVAILABLE, f"not available: {request.unsupported}")


def _subscribed(room: str, entered: Entered, request: SubscribeCommand) -> SubscribeResult:
    position = entered.position
    if position is None:
        return SubscribeResult()
    publications: Sequence[Any] = ()
    if entered.missed is not None:
        publications = [pub for entry in entered.missed if (pub := pub_of(room, entry)) is not None]
    return SubscribeResult(
        recoverable=True,
        positioned=True,
        epoch=position.epoch,
        offset=position.offset,
        was_recovering=request.recover,
        recovered=request.recover and entered.missed is not None,
        publications=publications,
    )
