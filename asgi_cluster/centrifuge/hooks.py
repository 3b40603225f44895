"""Calls of the app's functions for a client, and what is logged when one fails."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Raw

from asgi_cluster.centrifuge.messages import ErrorCode, ReplyError
from asgi_cluster.exceptions import ClusterError
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.payload import read_client
from asgi_cluster.rooms.rules import Permission, RoomRequest, RoomRule

if TYPE_CHECKING:
    from asgi_cluster.rooms.rooms import Rooms

__all__ = ["call_hook", "decoded", "ends_this_task", "log_failure", "permit"]

logger = logging.getLogger("asgi_cluster.realtime")

_LONGEST_SHOWN = 100


def decoded(raw: Raw) -> Any:
    """A payload for the app; ``None`` when there is none."""
    try:
        return read_client(raw)
    except ValueError as error:
        raise ReplyError(ErrorCode.BAD_REQUEST, f"bad request: data: {error}") from None


async def permit(
    connection: Connection,
    name: Literal["subscribe", "publish"],
    rule: RoomRule,
    room: str,
    params: dict[str, str],
    data: Raw,
) -> None:
    """Raises ``ReplyError`` when the rule does not let the client do it."""
    permission: Permission = getattr(rule, name)
    allowed: object = permission is True
    if permission is not None and permission is not True:
        request = RoomRequest(connection=connection, room=room, params=params, data=decoded(data))
        allowed = permission(request)
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
            room,
            "none" if connection.user_id is None else repr(connection.user_id),
        )
    raise ReplyError(ErrorCode.PERMISSION_DENIED)


async def call_hook(
    rooms: Rooms, connection: Connection, name: str, hook: Callable[..., Any] | None, *arguments: Any
) -> bool:
    """Call a hook that gets the connection and ``arguments``; False when it failed, which is logged."""
    if hook is None:
        return True
    try:
        answer = hook(connection, *arguments)
        if inspect.isawaitable(answer):
            await answer
    except (Exception, asyncio.CancelledError) as error:
        if ends_this_task(error):
            raise
        log_failure(rooms, connection, name, error)
        return False
    return True


def ends_this_task(error: BaseException) -> bool:
    """Whether it is a cancellation of the running task. A hook also raises ``CancelledError`` when a task
    that it waited for was cancelled: that is a failure of the hook, as any other.
    """
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def log_failure(
    rooms: Rooms, connection: Connection, name: str, error: BaseException, request: Any = None
) -> None:
    """Log that a function of the app failed; ``name`` is that of the hook or of the client's command."""
    answered = "" if name.startswith("on_") or name == "send" else ": the client was answered with error 100"
    name = {"send": "on_message", "refresh": "connect"}.get(name, name)
    channel, method = getattr(request, "channel", None), getattr(request, "method", None)
    what = _described(rooms, connection, name, channel, method)
    if isinstance(error, ClusterError):
        logger.warning("%s failed%s (%s)", what, answered, error)
    else:
        logger.error("%s failed%s. Its traceback says where", what, answered, exc_info=error)


def _described(
    rooms: Rooms, connection: Connection, name: str, channel: str | None, method: str | None
) -> str:
    """Which function, of what rule, for whom."""
    by = f"called by user {connection.user_id!r}"
    if method is not None:
        return f"the rpc function {method[:_LONGEST_SHOWN]!r}, {by}"
    if channel is None:
        return f"the {name} hook, {by}"
    found = rooms.rule(channel)
    rule = "no room rule" if found is None else f"room rule {found[0].pattern!r}"
    return f"{name} of {rule}, for room {channel!r}, {by}"
