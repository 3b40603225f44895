"""What a connected client may request: each command of the protocol is a function here."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import msgspec
from msgspec import Raw

from asgi_cluster.centrifuge.client import Client, check_supported
from asgi_cluster.centrifuge.hooks import decoded, permit
from asgi_cluster.centrifuge.messages import (
    Empty,
    ErrorCode,
    HistoryCommand,
    PublishCommand,
    ReplyError,
    Result,
    RoomCommand,
    RpcCommand,
    SendCommand,
    SubscribeCommand,
)
from asgi_cluster.centrifuge.wire import pub_of
from asgi_cluster.codes import CloseCode
from asgi_cluster.rooms.history import Position
from asgi_cluster.rooms.memberships import client_info
from asgi_cluster.rooms.payload import from_client

__all__ = ["COMMANDS", "send"]

_EMPTY = Empty()


async def subscribe(client: Client, request: SubscribeCommand) -> Result:
    """Nothing is pushed from the room before the reply, and nothing is missed after it."""
    return await client.subscribe(request)


async def unsubscribe(client: Client, request: RoomCommand) -> Result:
    """Harmless when there is no such subscription."""
    await client.unsubscribe(request.channel)
    return _EMPTY


async def publish(client: Client, request: PublishCommand) -> Result:
    """To a room whose rule lets this client publish; it need not be subscribed."""
    check_supported(request)
    rule, params = client.rule(request.channel)
    if not bytes(request.data):
        raise ReplyError(ErrorCode.BAD_REQUEST)
    decoded(request.data)  # also where no rule looks at it: others will
    connection = client.connection
    await permit(connection, "publish", rule, request.channel, params, request.data)
    kind, data = from_client(request.data)
    await client.services.rooms.publish(
        request.channel, kind, data, client=connection.id, info=client_info(connection)
    )
    return _EMPTY


def _check_feature(client: Client, channel: str, feature: str) -> None:
    rule, _ = client.rule(channel)
    if channel not in client.connection.rooms:
        raise ReplyError(ErrorCode.PERMISSION_DENIED)
    if not getattr(rule, feature):
        raise ReplyError(ErrorCode.NOT_AVAILABLE)


async def presence(client: Client, request: RoomCommand) -> Result:
    """For subscribers of a room with presence."""
    _check_feature(client, request.channel, "presence")
    members = await client.services.rooms.present(request.channel)
    return {"presence": {member: Raw(info) for member, info in members.items()}}


async def presence_stats(client: Client, request: RoomCommand) -> Result:
    """As ``presence``: how many connections and users."""
    _check_feature(client, request.channel, "presence")
    clients, users = await client.services.rooms.presence_stats(request.channel)
    return {"num_clients": clients, "num_users": users}


async def history(client: Client, request: HistoryCommand) -> Result:
    """For subscribers of a room with history; error 112 when something after ``since`` is not there any
    more.
    """
    _check_feature(client, request.channel, "history")
    rooms, since = client.services.rooms, None
    if request.since is not None:
        if request.since.offset < 0:
            raise ReplyError(ErrorCode.BAD_REQUEST)
        epoch = request.since.epoch
        if not epoch:
            # A client without an epoch means the present one, as on the reference server.
            epoch = (await rooms.read(request.channel, limit=0, since=None)).top.epoch
        since = Position(request.since.offset, epoch)
    limit = None if request.limit < 0 else request.limit
    page = await rooms.read(request.channel, limit=limit, since=since, reverse=request.reverse)
    if since is not None and not request.reverse and not page.complete:
        raise ReplyError(ErrorCode.UNRECOVERABLE_POSITION)
    publications = [pub for entry in page.entries if (pub := pub_of(request.channel, entry)) is not None]
    return {"publications": publications, "epoch": page.top.epoch, "offset": page.top.offset}


def rpc(client: Client, request: RpcCommand) -> Result | Awaitable[Result]:
    """Call the app's function of that name."""
    functions = client.services.config.rpc
    if not functions:
        raise ReplyError(ErrorCode.NOT_AVAILABLE)
    method = functions.get(request.method)
    if method is None:
        raise ReplyError(ErrorCode.METHOD_NOT_FOUND)
    answer = method(client.connection, decoded(request.data))
    return _rpc_answer(answer) if inspect.isawaitable(answer) else _rpc_result(answer)


async def _rpc_answer(answer: Awaitable[Any]) -> Result:
    return _rpc_result(await answer)


def _rpc_result(answer: Any) -> Result:
    return _EMPTY if answer is None else {"data": Raw(msgspec.json.encode(answer))}


def ping(client: Client, request: Empty) -> Result:
    """The client's own ping (not the pong to the server's)."""
    return _EMPTY


def sub_refresh(client: Client, request: RoomCommand) -> NoReturn:
    """Subscriptions have no tokens here."""
    raise ReplyError(ErrorCode.NOT_AVAILABLE)


def send(client: Client, request: SendCommand) -> Any:
    """Give the app a message; there is no reply."""
    on_message = client.services.config.on_message
    if on_message is None:
        client.end(CloseCode.NOT_AVAILABLE)  # for want of a reply in which to say it
        return None
    return on_message(client.connection, decoded(request.data))


COMMANDS: dict[str, Callable[[Client, Any], Result | Awaitable[Result]]] = {
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
"""By the name of the field, those that a reply answers; ``connect`` and ``refresh`` are ``Connecting``'s. The
room's name has been checked.
"""
