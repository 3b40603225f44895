"""One client of the built-in endpoint: its frames, and how many of them it may send."""

from __future__ import annotations

import logging

from asgi_cluster.centrifuge.client import Client
from asgi_cluster.centrifuge.command_runner import CommandRunner
from asgi_cluster.centrifuge.connecting import Connecting
from asgi_cluster.centrifuge.hooks import call_hook
from asgi_cluster.centrifuge.keepalive import Keepalive
from asgi_cluster.centrifuge.messages import Command
from asgi_cluster.centrifuge.protocol import BadFrame, decode_commands
from asgi_cluster.centrifuge.services import Services
from asgi_cluster.codes import CloseCode
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.sockets.receiving import Message, Receive

__all__ = ["ClientSession"]

logger = logging.getLogger("asgi_cluster.realtime")

_BURST = 10.0  # seconds' worth of commands that may come at once
_PONG = Command()


class ClientSession:
    """Serves one connection in the Centrifuge protocol."""

    __slots__ = (
        "_client",
        "_commands",
        "_connecting",
        "_keepalive",
        "_spent_at",
        "_tokens",
    )

    def __init__(self, services: Services, connection: Connection) -> None:
        self._client = connection.membership = Client(services, connection)
        self._keepalive = Keepalive(self._client)
        self._connecting = Connecting(self._client, self._keepalive)
        self._commands = CommandRunner(self._client, self._connecting)
        self._tokens = services.config.max_commands_per_second * _BURST
        self._spent_at = connection.socket.loop.time()

    async def run(self, receive: Receive) -> None:
        """Serve the client until it is gone."""
        services, connection = self._client.services, self._client.connection
        self._keepalive.start()
        code, reason = 1006, ""
        try:
            while True:
                message = await receive()
                if message["type"] == "websocket.disconnect":
                    code, reason = message.get("code") or 1005, message.get("reason") or ""
                    break
                await self._frame(message)
        finally:
            self._stop_timers()
            connection.outbox.close()  # from here on no room can be entered
            await self._commands.cancel()
            # Before what is left of the commands is waited for: the client is gone now.
            await services.rooms.memberships.leave_all(connection)
            if not await self._commands.end(services.config.close_timeout):
                logger.error(
                    "a command of user %r goes on although its client is gone and it was cancelled: the "
                    "app's hooks and rpc functions must let asyncio.CancelledError through",
                    connection.user_id,
                )
            self._stop_timers()  # a connect command may have finished just now
            if self._connecting.connected:
                await services.limits.leave(connection)
                socket = connection.socket
                code, reason = socket.close_code or code, socket.close_reason or reason
                hook = services.config.on_disconnect
                await call_hook(services.rooms, connection, "on_disconnect", hook, code, reason)

    def _stop_timers(self) -> None:
        self._keepalive.stop()
        self._connecting.stop()

    # Frames

    async def _frame(self, message: Message) -> None:
        connection = self._client.connection
        if connection.socket.state != "open" or connection.outbox.closed:
            return
        text = message.get("text")
        frame = message["bytes"] if text is None else text.encode(errors="surrogatepass")
        if len(frame) > self._client.services.config.max_message_bytes:
            self._client.end(CloseCode.TOO_BIG)
            return
        try:
            commands = decode_commands(frame)
        except BadFrame:
            self._client.end(CloseCode.BAD_REQUEST)
            return
        if not self._afford(len(commands)):
            self._client.end(CloseCode.TOO_MANY_REQUESTS)
            return
        connects = False
        for command in commands:
            if self._commands.full and command != _PONG:
                # Nothing is read meanwhile, pongs neither: so none is waited for.
                self._keepalive.reading = False
                await self._commands.room_for_more()
                self._keepalive.reading = True
                self._keepalive.pong()
            if connection.socket.state != "open" or connection.outbox.closed:
                return
            connects = connects or command.connect is not None
            if not self._commands.connected and command.connect is None:
                if not connects:
                    self._client.end(CloseCode.BAD_REQUEST)
            elif command == _PONG:
                self._keepalive.pong()
            else:
                self._commands.run(command)
            # What came in one frame with a connect command that failed is dropped: the error is the answer.

    def _afford(self, count: int) -> bool:
        rate = self._client.services.config.max_commands_per_second
        now = self._client.connection.socket.loop.time()
        self._tokens = min(rate * _BURST, self._tokens + (now - self._spent_at) * rate) - count
        self._spent_at = now
        return self._tokens >= 0
