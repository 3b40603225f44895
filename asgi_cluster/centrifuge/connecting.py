"""The connect command, and the refresh of what it gave: who a client is, and for how long."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import msgspec
from msgspec import Raw

from asgi_cluster.bus.lease import boot_clock
from asgi_cluster.centrifuge.client import Client
from asgi_cluster.centrifuge.hooks import call_hook, decoded, ends_this_task
from asgi_cluster.centrifuge.keepalive import Keepalive
from asgi_cluster.centrifuge.messages import ConnectCommand, ErrorCode, RefreshCommand, ReplyError, Result
from asgi_cluster.centrifuge.protocol import encode_reply
from asgi_cluster.codes import CloseCode
from asgi_cluster.ids import check_user
from asgi_cluster.rooms.names import check_room
from asgi_cluster.rooms.rules import Connected, ConnectRequest
from asgi_cluster.sockets.prepared import PreparedMessage

__all__ = ["Connecting"]

_REFRESH_GRACE = 25.0  # seconds after the expiry for which a refresh is waited for


class Connecting:
    """Connects one client, and closes it when its time is up."""

    __slots__ = ("_client", "_expiry", "_handshake_user", "_keepalive", "connected")

    def __init__(self, client: Client, keepalive: Keepalive) -> None:
        self._client = client
        self._keepalive = keepalive
        self._handshake_user = client.connection.user_id  # before a connect hook names another
        self._expiry: asyncio.TimerHandle | None = None
        self.connected = False
        """Whether the connect command has succeeded."""

    async def connect(self, command_id: int, request: ConnectCommand) -> None:
        """Let the app name the client's user, count the client, and subscribe it to its rooms; then reply."""
        client, outbox = self._client, self._client.connection.outbox
        # The client is a member of its first room while the others are entered: nothing may overtake the
        # reply, which has its position in each.
        await outbox.hold()
        try:
            await self._connect(command_id, request)
        finally:
            outbox.release(None)  # where there was no reply, what was kept back is not for the client
        if not self.connected:
            return
        services = client.services
        if not await call_hook(services.rooms, client.connection, "on_connect", services.config.on_connect):
            client.end(CloseCode.SERVER_ERROR)

    async def _connect(self, command_id: int, request: ConnectCommand) -> None:
        client, hub, connection = self._client, self._client.services.hub, self._client.connection
        began, since = hub.logouts.last, boot_clock()
        answer = await self._answer(request.token, request.data, request.headers)
        user = self._named_by(answer)
        if user != connection.user_id:
            hub.set_user(connection.socket, user, since=since)
            hub.close_if_logged_out(connection.socket, since=began)
        if connection.socket.state != "open":
            return  # its user or its session was logged out while the hook waited
        connection.info = answer.info
        try:
            result = await self._entered(answer, request)
        except (Exception, asyncio.CancelledError) as error:
            if ends_this_task(error):
                raise
            # The client may try again on this socket.
            client.server_side = ()
            await client.services.rooms.memberships.leave_all(connection)
            raise
        if result is None or connection.socket.state != "open":
            return
        ping = max(1, round(client.services.config.ping_interval))
        result |= {"ping": ping, "pong": True, "node": client.services.node.id}
        reply = PreparedMessage(encode_reply(command_id, "connect", result))
        self.connected = True
        self._keepalive.connected()
        self._expires(answer)
        connection.outbox.release(reply)

    async def _entered(self, answer: Connected, request: ConnectCommand) -> dict[str, Any] | None:
        """Count the client and subscribe it to its rooms: the connect result; ``None`` when it was closed
        because it is one too many. After an error it may be in some of the rooms.
        """
        client = self._client
        if not await client.services.limits.enter(client.connection):
            client.end(CloseCode.CONNECTION_LIMIT)
            return None
        result = self._result(answer)
        if answer.data is not None:
            result["data"] = Raw(msgspec.json.encode(answer.data))
        if answer.rooms:
            result["subs"] = {
                room: await client.subscribe_here(check_room(room), request.subs.get(room))
                for room in dict.fromkeys(answer.rooms)
            }
        return result

    async def _answer(self, token: str, data: Raw, headers: dict[str, str]) -> Connected:
        hook = self._client.services.config.connect
        if hook is None:
            return Connected()
        request = ConnectRequest(
            token=token,
            data=decoded(data),
            headers=headers,
            session=self._client.connection.session,
            user_id=self._handshake_user,
            scope=self._client.connection.socket.scope,
        )
        answer = hook(request)
        if inspect.isawaitable(answer):
            answer = await answer
        if answer is None or isinstance(answer, str):
            answer = Connected(user_id=answer)
        if not isinstance(answer, Connected):
            raise TypeError(
                f"the connect hook must return a user id, None or Connected, not {type(answer).__name__}"
            )
        if answer.user_id is not None:
            check_user(answer.user_id)
        return answer

    def _named_by(self, answer: Connected) -> str | None:
        return self._handshake_user if answer.user_id is None else answer.user_id

    def _result(self, answer: Connected) -> dict[str, Any]:
        result: dict[str, Any] = {"client": self._client.connection.id, "version": "asgi-cluster"}
        if answer.expires_in is not None:
            result |= {"expires": True, "ttl": max(1, round(answer.expires_in))}
        return result

    # Expiry

    async def refresh(self, request: RefreshCommand) -> Result | None:
        """Call the app's hook again, with a new token. ``None``: the client was closed."""
        if self._client.services.config.connect is None or self._expiry is None:
            raise ReplyError(ErrorCode.NOT_AVAILABLE)
        answer = await self._answer(request.token, Raw(), {})
        if self._named_by(answer) != self._client.connection.user_id:
            # As the reference server: a connection keeps its user.
            self._client.end(CloseCode.INVALID_TOKEN)
            return None
        self._expires(answer)
        return self._result(answer)

    def _expires(self, answer: Connected) -> None:
        self.stop()
        self._expiry = None
        if answer.expires_in is not None:
            delay = answer.expires_in + min(_REFRESH_GRACE, answer.expires_in)
            loop = self._client.connection.socket.loop
            self._expiry = loop.call_later(delay, self._client.end, CloseCode.EXPIRED)

    def stop(self) -> None:
        """The client is gone."""
        if self._expiry is not None:
            self._expiry.cancel()
