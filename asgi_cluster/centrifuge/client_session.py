"""One client of the built-in endpoint: commands in, replies and pushes out."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from msgspec import Raw

from asgi_cluster.bus.lease import boot_clock
from asgi_cluster.centrifuge.commands import COMMANDS, decoded, describe, subscribe_here
from asgi_cluster.centrifuge.pending import PendingCommands
from asgi_cluster.centrifuge.protocol import (
    PING,
    BadFrame,
    Command,
    ConnectCommand,
    ErrorCode,
    RefreshCommand,
    ReplyError,
    Result,
    SendCommand,
    decode_commands,
    encode_error,
    encode_push,
    encode_reply,
)
from asgi_cluster.centrifuge.services import Services
from asgi_cluster.codes import CloseCode, UnsubscribeCode
from asgi_cluster.exceptions import ClusterError, NotPermitted, TokenExpired
from asgi_cluster.ids import check_user
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.names import check_room
from asgi_cluster.rooms.rules import Connected, ConnectRequest
from asgi_cluster.sockets.coroutines import discard
from asgi_cluster.sockets.outbox import Outbox
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.sockets.receiving import Message, Receive
from asgi_cluster.sockets.socket import Socket
from asgi_cluster.tasks import spawn

if TYPE_CHECKING:
    from asgi_cluster.config import RealtimeConfig
    from asgi_cluster.sessions.session import Session

__all__ = ["ClientSession"]

logger = logging.getLogger("asgi_cluster.realtime")

_PING = PreparedMessage(PING)
_BURST = 10.0  # seconds' worth of commands that may come at once
_AT_ONCE = 16  # commands of one client that may be under way; then nothing more is read from it
_REFRESH_GRACE = 25.0  # seconds after the expiry for which a refresh is waited for


class ClientSession(Connection):
    """A connection that speaks the Centrifuge protocol. ``send`` is a ``message`` push, ``join`` a
    server-side subscription.
    """

    __slots__ = (
        "_awaits_pong",
        "_connected",
        "_connecting",
        "_expiry",
        "_full",
        "_handshake_user",
        "_pending",
        "_refused",
        "_spent_at",
        "_timer",
        "_tokens",
        "entering",
        "server_side",
        "services",
    )

    def __init__(
        self, services: Services, socket: Socket, cluster: Any, session: Session, outbox: Outbox
    ) -> None:
        super().__init__(socket, services.rooms, services.hub, cluster, session, outbox)
        self.services = services
        self._handshake_user = self.user_id  # before a connect hook names another
        self._connected = False
        self._connecting: asyncio.Task[None] | None = None
        self._refused = False
        self._full = False
        self._pending: PendingCommands | None = None
        self._awaits_pong = False
        self._timer: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self.entering: list[str] = []
        self.server_side: dict[str, None] = {}
        self._tokens = self.config.max_commands_per_second * _BURST
        self._spent_at = self.socket.loop.time()

    @property
    def config(self) -> RealtimeConfig:
        return self.services.config

    async def run(self, receive: Receive) -> None:
        """Serve the client until it is gone."""
        self._timer = self.socket.loop.call_later(self.config.connect_timeout, self._stale)
        code, reason = 1006, ""
        try:
            while True:
                message = await receive()
                if message["type"] == "websocket.disconnect":
                    code, reason = message.get("code") or 1005, message.get("reason") or ""
                    break
                await self._frame(message)
        finally:
            self._cancel_timers()
            self._stop_reading()
            self.outbox.close()  # from here on no room can be entered
            if self._pending is not None:
                await self._pending.cancel()
            # Before what is left of the commands is waited for: the client is gone now.
            await self.services.rooms.leave_all(self)
            if self._pending is not None and not await self._pending.end(self.config.close_timeout):
                logger.error(
                    "a command of user %r goes on although its client is gone and it was cancelled: the "
                    "app's hooks and rpc functions must let asyncio.CancelledError through",
                    self.user_id,
                )
            self._cancel_timers()  # a connect command may have finished just now
            await self._ended(self.socket.close_code or code, self.socket.close_reason or reason)

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._expiry):
            if timer is not None:
                timer.cancel()

    async def _ended(self, code: int, reason: str) -> None:
        if self._connected:
            await self.services.limits.leave(self)
            await self._call_hook("on_disconnect", self.config.on_disconnect, self, code, reason)

    def _end(self, code: CloseCode) -> None:
        self.socket.close(code, code.text)

    # Frames

    async def _frame(self, message: Message) -> None:
        if self.socket.state != "open" or self.outbox.closed:
            return
        text = message.get("text")
        frame = message["bytes"] if text is None else text.encode(errors="surrogatepass")
        if len(frame) > self.config.max_message_bytes:
            self._end(CloseCode.TOO_BIG)
            return
        try:
            commands = decode_commands(frame)
        except BadFrame:
            self._end(CloseCode.BAD_REQUEST)
            return
        if not self._afford(len(commands)):
            self._end(CloseCode.TOO_MANY_REQUESTS)
            return
        introduces = False
        for command in commands:
            if self._pending is not None and len(self._pending) >= _AT_ONCE and command != _PONG:
                await self._room_for_more()
            if self.socket.state != "open" or self.outbox.closed:
                return
            introduces = introduces or command.connect is not None
            if self._connected or self._connecting is not None or command.connect is not None:
                self._command(command)
            elif not introduces:
                self._end(CloseCode.BAD_REQUEST)
            # What came in one frame with a connect command that failed is dropped: the error is the answer.

    async def _room_for_more(self) -> None:
        """Return when one more command may be under way. Nothing is read meanwhile, pongs neither: so none
        is waited for.
        """
        self._full = True
        while self._pending is not None and len(self._pending) >= _AT_ONCE and not self.outbox.closed:
            await self._pending.one_done(self.outbox.changed())
        self._full = self._awaits_pong = False

    def _afford(self, count: int) -> bool:
        rate = self.config.max_commands_per_second
        now = self.socket.loop.time()
        self._tokens = min(rate * _BURST, self._tokens + (now - self._spent_at) * rate) - count
        self._spent_at = now
        return self._tokens >= 0

    def _command(self, command: Command) -> None:
        """Answer one command: at once if that needs no waiting, else in a task."""
        if command == _PONG:
            self._awaits_pong = False
            return
        if command.id < 0 or (command.id == 0 and (command.send is None or command.connect is not None)):
            self._end(CloseCode.BAD_REQUEST)
            return
        if command.connect is not None and (self._connected or self._refused or self._connecting):
            self._end(CloseCode.BAD_REQUEST)
            return
        name = "send"
        if command.id:
            name = next((known for known in _FIELDS if getattr(command, known) is not None), "")
        request = getattr(command, name, None)
        lanes = _lanes(name, request)
        before = set() if self._pending is None else self._pending.before(lanes)
        if self._connecting is not None:
            before.add(self._connecting)
        work = None if before else self._begin(command, name, request)
        if not before and work is None:
            return
        if self._pending is None:
            self._pending = PendingCommands()
        try:
            task = spawn(
                self.socket.tasks,
                self._go_on(command, name, request, before, work),
                name=f"asgi-cluster {name} command",
            )
        except RuntimeError:
            discard(work)
            self._end(CloseCode.SHUTDOWN)  # the node is stopping and takes no more work
            return
        self._pending.add(task, lanes, outlives=name in _OUTLIVE_CLIENT)
        task.add_done_callback(self._one_done)
        if name == "connect":
            self._connecting = task

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
                result = COMMANDS[name](self, request)
            elif name == "connect":
                result = self._on_connect(command.id, request)
            elif name == "refresh":
                result = self._refreshed(request)
            elif name == "send":
                result = self._on_send(request)
            else:
                raise ReplyError(ErrorCode.METHOD_NOT_FOUND)
            if inspect.isawaitable(result):
                return result
            self._reply(command.id, name, result)
        except (Exception, asyncio.CancelledError) as error:
            if _ends_this_task(error):
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
            if not self._connected or self.socket.close_code is not None:
                return
            work = self._begin(command, name, request)
        if work is None:
            return
        try:
            result = await work
            # In the same step in which a subscription begins: its first push comes after the reply.
            self._reply(command.id, name, result)
        except (Exception, asyncio.CancelledError) as error:
            if _ends_this_task(error):
                raise
            self._failed(command, name, request, error)
        finally:
            if name == "connect":
                self._connecting = None

    def _failed(self, command: Command, name: str, request: Any, error: BaseException) -> None:
        match error:
            case ReplyError():
                code, text = error.code, error.message
            case NotPermitted():
                if error.code is not None:
                    self.socket.close(error.code, error.reason)
                    return
                code, text = ErrorCode.PERMISSION_DENIED, error.reason
            case TokenExpired():
                if name == "refresh":
                    # The SDKs take an error in the reply to a refresh as final.
                    self._end(CloseCode.EXPIRED)
                    return
                code, text = ErrorCode.TOKEN_EXPIRED, ErrorCode.TOKEN_EXPIRED.text
            case _:
                code, text = ErrorCode.INTERNAL, ErrorCode.INTERNAL.text
                self._log_failure(name, error, request)
        if name == "connect" and not code.temporary:
            self._refused = True
        if name != "send":
            self.outbox.push(PreparedMessage(encode_error(command.id, code, text)))
        elif code is ErrorCode.BAD_REQUEST:
            self._end(CloseCode.BAD_REQUEST)  # there is no reply in which to say it

    def _log_failure(self, name: str, error: BaseException, request: Any = None) -> None:
        told = "" if name.startswith("on_") or name == "send" else ": the client was answered with error 100"
        name = {"send": "on_message", "refresh": "connect"}.get(name, name)
        what = describe(self, name, getattr(request, "channel", None), getattr(request, "method", None))
        if isinstance(error, ClusterError):
            logger.warning("%s failed%s (%s)", what, told, error)
        else:
            logger.error("%s failed%s. Its traceback says where", what, told, exc_info=error)

    def _reply(self, command_id: int, name: str, result: Result | None) -> None:
        if result is not None and name != "send":
            self.outbox.push(PreparedMessage(encode_reply(command_id, name, result)))

    # Connecting

    async def _on_connect(self, command_id: int, request: ConnectCommand) -> None:
        # The client is a member of its first room while the others are entered: nothing may overtake the
        # reply, which has its position in each.
        await self.outbox.hold()
        try:
            await self._connect(command_id, request)
        finally:
            self.outbox.release(None)  # where there was no reply, nothing that was held is for the client
        if self._connected and not await self._call_hook("on_connect", self.config.on_connect, self):
            self._end(CloseCode.SERVER_ERROR)

    async def _connect(self, command_id: int, request: ConnectCommand) -> None:
        hub = self.services.hub
        began, since = hub.logouts.last, boot_clock()
        answer = await self._ask_connect(request.token, request.data, request.headers)
        user = self._named_by(answer)
        if user != self.user_id:
            hub.set_user(self.socket, user, since=since)
            hub.close_if_logged_out(self.socket, since=began)
        if self.socket.state != "open":
            return  # its user or its session was logged out while the hook waited
        self._info = answer.info
        try:
            result = await self._entered(answer, request)
        except (Exception, asyncio.CancelledError) as error:
            if _ends_this_task(error):
                raise
            # The client may try again on this socket.
            self.server_side.clear()
            await self.services.rooms.leave_all(self)
            raise
        if result is None or self.socket.state != "open":
            return
        interval = self.config.ping_interval
        result |= {"ping": max(1, round(interval)), "pong": True, "node": self.services.node.id}
        reply = PreparedMessage(encode_reply(command_id, "connect", result))
        self._connected = True
        if self._timer is not None:
            self._timer.cancel()
        # The first one spread out, so that clients that came together are not pinged together for ever.
        self._timer = self.socket.loop.call_later(interval * random.uniform(0.5, 1.0), self._ping)
        self._expires(answer)
        self.outbox.release(reply)

    async def _entered(self, answer: Connected, request: ConnectCommand) -> dict[str, Any] | None:
        """Count the client and subscribe it to its rooms: the connect result; ``None`` when it was closed
        because it is one too many. After an error it may be in some of the rooms.
        """
        if not await self.services.limits.enter(self):
            self._end(CloseCode.CONNECTION_LIMIT)
            return None
        result: dict[str, Any] = {"client": self.id, "version": "asgi-cluster", **_expiry(answer)}
        if answer.data is not None:
            result["data"] = Raw(msgspec.json.encode(answer.data))
        if answer.rooms:
            result["subs"] = {
                room: await subscribe_here(self, room, request.subs.get(room))
                for room in dict.fromkeys(answer.rooms)
            }
        return result

    async def _ask_connect(self, token: str, data: Raw, headers: dict[str, str]) -> Connected:
        hook = self.config.connect
        if hook is None:
            return Connected()
        request = ConnectRequest(
            token=token,
            data=decoded(data),
            headers=headers,
            session=self.session,
            user_id=self._handshake_user,
            scope=self.socket.scope,
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

    async def _refreshed(self, request: RefreshCommand) -> Result | None:
        if self.config.connect is None or self._expiry is None:
            raise ReplyError(ErrorCode.NOT_AVAILABLE)
        answer = await self._ask_connect(request.token, Raw(), {})
        if self._named_by(answer) != self.user_id:
            self._end(CloseCode.INVALID_TOKEN)  # as the reference server: a connection keeps its user
            return None
        self._expires(answer)
        return {"client": self.id, "version": "asgi-cluster", **_expiry(answer)}

    def _expires(self, answer: Connected) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if answer.expires_in is not None:
            delay = answer.expires_in + min(_REFRESH_GRACE, answer.expires_in)
            self._expiry = self.socket.loop.call_later(delay, self._end, CloseCode.EXPIRED)

    def _stale(self) -> None:
        self._end(CloseCode.STALE)

    def _ping(self) -> None:
        self._awaits_pong = True
        self.outbox.push(_PING)
        wait = min(self.config.pong_timeout, self.config.ping_interval)
        self._timer = self.socket.loop.call_later(wait, self._check_pong, self.config.ping_interval - wait)

    def _check_pong(self, rest: float) -> None:
        if self._awaits_pong and not self._full:
            self._end(CloseCode.NO_PONG)
        else:
            self._timer = self.socket.loop.call_later(rest, self._ping)

    # Calls of the app and the hub

    async def join(self, room: str) -> None:
        """Subscribe the client to ``room`` without its asking (a server-side subscription). As
        ``Connection.join``.
        """
        if room in self.rooms:
            return
        result = await subscribe_here(self, room, None)
        subscribe: dict[str, Any] = {"recoverable": result.recoverable, "positioned": result.positioned}
        if result.positioned:
            subscribe |= {"epoch": result.epoch, "offset": result.offset}
        self.outbox.push(PreparedMessage(encode_push("subscribe", subscribe, channel=room)))

    async def leave(self, room: str) -> None:
        """End a subscription, and send the client the end."""
        self.server_side.pop(room, None)
        if await self.services.rooms.leave(self, check_room(room)):
            self._tell_unsubscribed(room, UnsubscribeCode.SERVER, "server unsubscribe")

    def _tell_unsubscribed(self, room: str, code: int, reason: str) -> None:
        push = encode_push("unsubscribe", {"code": code, "reason": reason}, channel=room)
        self.outbox.push(PreparedMessage(push))

    def _lost(self, room: str) -> None:
        """Publications are lost: the client subscribes again and gets what there is."""
        if room in self.server_side:
            self._end(CloseCode.INSUFFICIENT_STATE)
        elif self.services.rooms.drop(self, room):
            self._tell_unsubscribed(room, UnsubscribeCode.INSUFFICIENT_STATE, "insufficient state")
            spawn(self.socket.tasks, self.services.rooms.settle(self, room), name="asgi-cluster leave")

    def _expelled(self, room: str, code: int, reason: str) -> None:
        """``Room.disconnect`` takes the client out of ``room``."""
        self._leave_later(room)

    def _on_send(self, request: SendCommand) -> Any:
        if self.config.on_message is None:
            # There is no reply in which to say it.
            self._end(CloseCode.NOT_AVAILABLE)
            return None
        return self.config.on_message(self, decoded(request.data))

    async def __anext__(self) -> NoReturn:
        raise RuntimeError("clients of the endpoint are read by it: use RealtimeConfig(on_message=…) or rpc")

    async def _call_hook(self, name: str, hook: Callable[..., Any] | None, *arguments: Any) -> bool:
        if hook is None:
            return True
        try:
            answer = hook(*arguments)
            if inspect.isawaitable(answer):
                await answer
        except (Exception, asyncio.CancelledError) as error:
            if _ends_this_task(error):
                raise
            self._log_failure(name, error)
            return False
        return True


_PONG = Command()
_FIELDS = ("connect", *COMMANDS, "refresh", "send")
_OUTLIVE_CLIENT = frozenset(("publish", "rpc", "send"))


def _ends_this_task(error: BaseException) -> bool:
    """Whether it is a cancellation of the running task. A hook also raises ``CancelledError`` when a task
    that it waited for was cancelled: that is a failure of the hook, as any other.
    """
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


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


def _expiry(answer: Connected) -> dict[str, Any]:
    if answer.expires_in is None:
        return {}
    return {"expires": True, "ttl": max(1, round(answer.expires_in))}
