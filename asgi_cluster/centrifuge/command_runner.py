"""The commands of one client: started in order, carried out side by side, and answered."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Hashable
from typing import Any

from asgi_cluster.centrifuge.client import Client
from asgi_cluster.centrifuge.commands import COMMANDS, send
from asgi_cluster.centrifuge.connecting import Connecting
from asgi_cluster.centrifuge.hooks import ends_this_task, log_failure
from asgi_cluster.centrifuge.messages import Command, ErrorCode, ReplyError, Result
from asgi_cluster.centrifuge.pending import PendingCommands
from asgi_cluster.centrifuge.protocol import encode_error, encode_reply
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import NotPermitted, TokenExpired
from asgi_cluster.rooms.names import check_room
from asgi_cluster.sockets.coroutines import discard
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.tasks import spawn

__all__ = ["CommandRunner"]

_AT_ONCE = 16  # commands of one client that may be under way; then nothing more is read from it
_FIELDS = ("connect", *COMMANDS, "refresh", "send")
_OUTLIVE_CLIENT = frozenset(("publish", "rpc", "send"))


class CommandRunner:
    """Carries out the commands of one client and answers them."""

    __slots__ = ("_client", "_connect_task", "_connecting", "_pending", "_refused")

    def __init__(self, client: Client, connecting: Connecting) -> None:
        self._client = client
        self._connecting = connecting
        self._connect_task: asyncio.Task[None] | None = None
        self._refused = False
        self._pending: PendingCommands | None = None

    @property
    def connected(self) -> bool:
        """Whether the client has connected, or is being connected."""
        return self._connecting.connected or self._connect_task is not None

    @property
    def full(self) -> bool:
        """Whether no more command may be under way."""
        return self._pending is not None and len(self._pending) >= _AT_ONCE

    async def room_for_more(self) -> None:
        """Return when one more command may be under way, or the client is gone."""
        outbox = self._client.connection.outbox
        while self._pending is not None and self.full and not outbox.closed:
            await self._pending.one_done(outbox.changed())

    async def cancel(self) -> None:
        """The client is gone: cancel what does not outlive it."""
        if self._pending is not None:
            await self._pending.cancel()

    async def end(self, timeout: float) -> bool:
        """As ``PendingCommands.end``."""
        return self._pending is None or await self._pending.end(timeout)

    def run(self, command: Command) -> None:
        """Answer one command: at once if that needs no waiting, else in a task."""
        if command.id < 0 or (command.id == 0 and (command.send is None or command.connect is not None)):
            self._client.end(CloseCode.BAD_REQUEST)
            return
        if command.connect is not None and (self.connected or self._refused):
            self._client.end(CloseCode.BAD_REQUEST)
            return
        name = "send"
        if command.id:
            name = next((known for known in _FIELDS if getattr(command, known) is not None), "")
        request = getattr(command, name, None)
        lanes = _lanes(name, request)
        before = set() if self._pending is None else self._pending.before(lanes)
        if self._connect_task is not None:
            before.add(self._connect_task)
        work = None if before else self._begin(command, name, request)
        if not before and work is None:
            return
        if self._pending is None:
            self._pending = PendingCommands()
        try:
            task = spawn(
                self._client.connection.socket.tasks,
                self._go_on(command, name, request, before, work),
                name=f"asgi-cluster {name} command",
            )
        except RuntimeError:
            discard(work)
            self._client.end(CloseCode.SHUTDOWN)  # the node is stopping and takes no more work
            return
        self._pending.add(task, lanes, outlives=name in _OUTLIVE_CLIENT)
        task.add_done_callback(self._one_done)
        if name == "connect":
            self._connect_task = task

    def _one_done(self, task: asyncio.Task[None]) -> None:
        if not self._pending:
            self._pending = None  # most clients are idle

    def _begin(self, command: Command, name: str, request: Any) -> Awaitable[Result | None] | None:
        """Start a command; what is left to wait for, ``None`` when it is answered."""
        # A coroutine is not driven without a task up to where it waits, as uvicorn's send is: asyncio.timeout
        # in it would take the task that reads for its own.
        try:
            _check_name(getattr(request, "channel", None))
            result: Result | Awaitable[Result | None] | None
            if name in COMMANDS:
                result = COMMANDS[name](self._client, request)
            elif name == "connect":
                result = self._connecting.connect(command.id, request)
            elif name == "refresh":
                result = self._connecting.refresh(request)
            elif name == "send":
                result = send(self._client, request)
            else:
                raise ReplyError(ErrorCode.METHOD_NOT_FOUND)
            if inspect.isawaitable(result):
                return result
            self._reply(command.id, name, result)
        except (Exception, asyncio.CancelledError) as error:
            if ends_this_task(error):
                raise
            self._failed(command, name, request, error)
        return None

    async def _go_on(
        self,
        command: Command,
        name: str,
        request: Any,
        before: set[asyncio.Task[None]],
        work: Awaitable[Result | None] | None,
    ) -> None:
        if before:
            await asyncio.wait(before)
            if not self._connecting.connected or self._client.connection.socket.close_code is not None:
                return
            work = self._begin(command, name, request)
        if work is None:
            return
        try:
            result = await work
            # In the same step in which a subscription begins: its first push comes after the reply.
            self._reply(command.id, name, result)
        except (Exception, asyncio.CancelledError) as error:
            if ends_this_task(error):
                raise
            self._failed(command, name, request, error)
        finally:
            if name == "connect":
                self._connect_task = None

    def _reply(self, command_id: int, name: str, result: Result | None) -> None:
        if result is not None and name != "send":
            self._client.connection.outbox.push(PreparedMessage(encode_reply(command_id, name, result)))

    def _failed(self, command: Command, name: str, request: Any, error: BaseException) -> None:
        match error:
            case ReplyError():
                code, text = error.code, error.message
            case NotPermitted():
                if error.code is not None:
                    self._client.connection.socket.close(error.code, error.reason)
                    return
                code, text = ErrorCode.PERMISSION_DENIED, error.reason
            case TokenExpired():
                if name == "refresh":
                    # The SDKs take an error in the reply to a refresh as final.
                    self._client.end(CloseCode.EXPIRED)
                    return
                code, text = ErrorCode.TOKEN_EXPIRED, ErrorCode.TOKEN_EXPIRED.text
            case _:
                code, text = ErrorCode.INTERNAL, ErrorCode.INTERNAL.text
                log_failure(self._client.services.rooms, self._client.connection, name, error, request)
        if name == "connect" and not code.temporary:
            self._refused = True
        if name != "send":
            self._client.connection.outbox.push(PreparedMessage(encode_error(command.id, code, text)))
        elif code is ErrorCode.BAD_REQUEST:
            self._client.end(CloseCode.BAD_REQUEST)  # there is no reply in which to say it


def _lanes(name: str, request: Any) -> tuple[Hashable, ...]:
    """What a command shares with those that it must not overtake: those of its room, and its like."""
    like = ((name,),) if name in ("publish", "send", "refresh") else ()
    channel: str | None = getattr(request, "channel", None)
    return like if channel is None else (*like, channel)


def _check_name(channel: str | None) -> None:
    """Every command's room name goes through this: names of the package's own are not for clients."""
    try:
        if channel is not None:
            check_room(channel)
    except ValueError:
        raise ReplyError(ErrorCode.BAD_REQUEST) from None
