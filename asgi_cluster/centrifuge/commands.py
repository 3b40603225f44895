"""What a connected client may ask for: each command of the protocol is a function here."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import msgspec
from msgspec import Raw

from asgi_cluster.centrifuge.protocol import (
    Empty,
    ErrorCode,
    HistoryCommand,
    PublishCommand,
    ReplyError,
    Result,
    RoomCommand,
    RpcCommand,
    SubscribeCommand,
    SubscribeResult,
)
from asgi_cluster.centrifuge.wire import pub_of
from asgi_cluster.rooms.history import Position
from asgi_cluster.rooms.names import check_room
from asgi_cluster.rooms.payload import from_client, read_client
from asgi_cluster.rooms.rooms import Entered
from asgi_cluster.rooms.rules import Permission, RoomRequest, RoomRule

if TYPE_CHECKING:
    from asgi_cluster.centrifuge.client_session import ClientSession

__all__ = ["COMMANDS", "decoded", "describe", "subscribe_here"]

logger = logging.getLogger("asgi_cluster.realtime")

_EMPTY = Empty()
_LONGEST_SHOWN = 100


def _rule(client: ClientSession, channel: str) -> tuple[RoomRule, dict[str, str]]:
    found = client.services.rooms.rule(channel)
    if found is None:
        raise ReplyError(ErrorCode.UNKNOWN_CHANNEL)
    return found


def _check_supported(request: SubscribeCommand | PublishCommand) -> None:
    """What cannot be had is refused: never accepted as something else."""
    if request.unsupported:
        raise ReplyError(ErrorCode.NOT_AVAILABLE, f"not available: {request.unsupported}")


async def _position(client: ClientSession, channel: str, offset: int, epoch: str) -> Position:
    if not epoch:
        # A client without an epoch means the present one, as on the reference server.
        epoch = (await client.services.rooms.read(channel, limit=0, since=None)).top.epoch
    return Position(offset, epoch)


async def _permit(
    client: ClientSession,
    name: Literal["subscribe", "publish"],
    rule: RoomRule,
    channel: str,
    params: dict[str, str],
    data: Raw,
) -> None:
    permission: Permission = getattr(rule, name)
    allowed: object = permission is True
    if permission is not None and permission is not True:
        allowed = permission(RoomRequest(connection=client, room=channel, params=params, data=decoded(data)))
        if inspect.isawaitable(allowed):
            allowed = await allowed
    if allowed is True:
        return
    if allowed is not False:
        # Final for the client, as a refusal is: the same rule would return the same again.
        logger.error(
            "the %s function of room rule %r returned %.100r, and must return True or False: the client was "
            "refused (103) for room %r (its user: %s)",
            name,
            rule.pattern,
            allowed,
            channel,
            "none" if client.user_id is None else repr(client.user_id),
        )
    raise ReplyError(ErrorCode.PERMISSION_DENIED)


def describe(client: ClientSession, name: str, channel: str | None = None, method: str | None = None) -> str:
    """A function of the app that a client's command calls, for a log line: which, of what rule, for whom."""
    by = f"called by user {client.user_id!r}"
    if method is not None:
        return f"the rpc function {method[:_LONGEST_SHOWN]!r}, {by}"
    if channel is None:
        return f"the {name} hook, {by}"
    found = client.services.rooms.rule(channel)
    rule = "no room rule" if found is None else f"room rule {found[0].pattern!r}"
    return f"{name} of {rule}, for room {channel!r}, {by}"


async def subscribe(client: ClientSession, request: SubscribeCommand) -> Result:
    """Nothing is pushed from the room before the reply, and nothing is missed after it."""
    channel = request.channel
    _check_supported(request)
    rule, params = _rule(client, channel)
    if channel in client.rooms or channel in client.entering:
        raise ReplyError(ErrorCode.ALREADY_SUBSCRIBED)
    if len(client.rooms) + len(client.entering) >= client.config.max_rooms:
        raise ReplyError(ErrorCode.LIMIT_EXCEEDED)
    client.entering.append(channel)
    try:
        await _permit(client, "subscribe", rule, channel, params, request.data)
        # Without an epoch it is in the present one, as on the reference server.
        since = Position(request.offset, request.epoch) if request.recover else None
        entered = await client.services.rooms.enter(client, channel, since=since)
    finally:
        client.entering.remove(channel)
    result = _subscribed(channel, entered, request)
    if request.rejects_unrecovered and result.was_recovering and not result.recovered:
        await client.services.rooms.leave(client, channel)
        raise ReplyError(ErrorCode.UNRECOVERABLE_POSITION)
    return result


async def subscribe_here(
    client: ClientSession, room: str, request: SubscribeCommand | None
) -> SubscribeResult:
    """A server-side subscription; ``request`` is what the client said of it when it connected."""
    since = None if request is None or not request.recover else Position(request.offset, request.epoch)
    entered = await client.services.rooms.enter(client, check_room(room), since=since)
    client.server_side[room] = None
    return _subscribed(room, entered, request or SubscribeCommand())


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


async def unsubscribe(client: ClientSession, request: RoomCommand) -> Result:
    """Harmless when there is no such subscription."""
    client.server_side.pop(request.channel, None)
    await client.services.rooms.leave(client, request.channel)
    return _EMPTY


async def publish(client: ClientSession, request: PublishCommand) -> Result:
    """To a room whose rule lets this client publish; it need not be subscribed."""
    _check_supported(request)
    rule, params = _rule(client, request.channel)
    if not bytes(request.data):
        raise ReplyError(ErrorCode.BAD_REQUEST)
    decoded(request.data)  # also where no rule looks at it: others will
    await _permit(client, "publish", rule, request.channel, params, request.data)
    kind, data = from_client(request.data)
    rooms = client.services.rooms
    await rooms.publish(request.channel, kind, data, client=client.id, info=rooms.client_info(client))
    return _EMPTY


def _check_feature(client: ClientSession, channel: str, feature: str) -> None:
    rule, _ = _rule(client, channel)
    if channel not in client.rooms:
        raise ReplyError(ErrorCode.PERMISSION_DENIED)
    if not getattr(rule, feature):
        raise ReplyError(ErrorCode.NOT_AVAILABLE)


async def presence(client: ClientSession, request: RoomCommand) -> Result:
    """For subscribers of a room with presence."""
    _check_feature(client, request.channel, "presence")
    members = await client.services.rooms.present(request.channel)
    return {"presence": {member: Raw(info) for member, info in members.items()}}


async def presence_stats(client: ClientSession, request: RoomCommand) -> Result:
    """As ``presence``: how many connections and users."""
    _check_feature(client, request.channel, "presence")
    clients, users = await client.services.rooms.presence_stats(request.channel)
    return {"num_clients": clients, "num_users": users}


async def history(client: ClientSession, request: HistoryCommand) -> Result:
    """For subscribers of a room with history; error 112 when something after ``since`` is not there any
    more.
    """
    _check_feature(client, request.channel, "history")
    since = None
    if request.since is not None:
        if request.since.offset < 0:
            raise ReplyError(ErrorCode.BAD_REQUEST)
        since = await _position(client, request.channel, request.since.offset, request.since.epoch)
    page = await client.services.rooms.read(
        request.channel,
        limit=None if request.limit < 0 else request.limit,
        since=since,
        reverse=request.reverse,
    )
    if since is not None and not request.reverse and not page.complete:
        raise ReplyError(ErrorCode.UNRECOVERABLE_POSITION)
    publications = [pub for entry in page.entries if (pub := pub_of(request.channel, entry)) is not None]
    return {"publications": publications, "epoch": page.top.epoch, "offset": page.top.offset}


def rpc(client: ClientSession, request: RpcCommand) -> Result | Awaitable[Result]:
    """Call the app's function of that name."""
    if not client.config.rpc:
        raise ReplyError(ErrorCode.NOT_AVAILABLE)
    method = client.config.rpc.get(request.method)
    if method is None:
        raise ReplyError(ErrorCode.METHOD_NOT_FOUND)
    answer = method(client, decoded(request.data))
    return _rpc_answer(answer) if inspect.isawaitable(answer) else _rpc_result(answer)


async def _rpc_answer(answer: Awaitable[Any]) -> Result:
    return _rpc_result(await answer)


def _rpc_result(answer: Any) -> Result:
    return _EMPTY if answer is None else {"data": Raw(msgspec.json.encode(answer))}


def ping(client: ClientSession, request: Empty) -> Result:
    """The client's own ping (not the pong to ours)."""
    return _EMPTY


def sub_refresh(client: ClientSession, request: RoomCommand) -> NoReturn:
    """Subscriptions have no tokens here."""
    raise ReplyError(ErrorCode.NOT_AVAILABLE)


COMMANDS: dict[str, Callable[[ClientSession, Any], Result | Awaitable[Result]]] = {
    "subscribe": subscribe,
    "unsubscribe": unsubscribe,
    "publish": publish,
    "presence": presence,
    "presence_stats": presence_stats,
    "history": history,
    "ping": ping,
    "rpc": rpc,
    "sub_refresh": sub_refresh,
}
"""By the name of the field; ``connect``, ``refresh`` and ``send`` are the client's own. The room's name has
been checked.
"""


def decoded(raw: Raw) -> Any:
    """A payload for the app; ``None`` when there is none."""
    try:
        return read_client(raw)
    except ValueError as error:
        raise ReplyError(ErrorCode.BAD_REQUEST, f"bad request: data: {error}") from None
