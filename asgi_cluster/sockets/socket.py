"""One WebSocket of this node, whoever serves it, and how it is closed from outside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, Protocol

from asgi_cluster.bus.lease import boot_clock
from asgi_cluster.codes import CloseCode
from asgi_cluster.compat.uvicorn import (
    closes_in_task,
    forget_handshake,
    known_server,
    refuse_handshake,
    say_once,
    transport_of,
    unsent_bytes,
    why_not_direct,
)
from asgi_cluster.ids import ConnectionId, new_token
from asgi_cluster.sockets.closes import Closes
from asgi_cluster.sockets.coroutines import discard, drive
from asgi_cluster.sockets.outbox import Outbox
from asgi_cluster.sockets.receiving import GuardedReceive, Receive, Send
from asgi_cluster.tasks import spawn

__all__ = ["Member", "Socket"]

logger = logging.getLogger("asgi_cluster.realtime")

_LONGEST_REASON = 123  # bytes: RFC 6455 section 5.5 allows 125 in a control frame, two of them are the code


class Member(Protocol):
    """What a socket belongs to that the cluster serves, and not the app alone: a ``Connection``, in
    ``rooms``, which this folder does not import.
    """

    def gone(self) -> None:
        """The socket is over: nothing more is delivered to it."""
        ...


class Socket:
    """A WebSocket between handshake and end.

    ``send`` is the server's own ASGI ``send``. ``state`` is ``connecting`` until the handshake is answered,
    then ``open``, and ``closed`` when it was closed by the cluster or is gone. ``close_code`` is the code
    of a close that the cluster began; ``None`` without one.
    """

    __slots__ = (
        "__weakref__",
        "_closes",
        "_closing",
        "_receiving",
        "began",
        "close_code",
        "close_reason",
        "close_timeout",
        "connection",
        "crosses_loops",
        "handle",
        "id",
        "loop",
        "outbox",
        "owner",
        "scope",
        "send",
        "server",
        "since",
        "state",
        "tasks",
        "timer",
        "user",
        "why_not_direct",
    )

    def __init__(
        self,
        scope: Mapping[str, Any],
        send: Send,
        *,
        tasks: asyncio.TaskGroup,
        crosses_loops: bool,
        close_timeout: float,
        closes: Closes,
    ) -> None:
        self.id = ConnectionId(new_token())
        self.scope = scope
        self.send = send
        self.tasks = tasks
        self.crosses_loops = crosses_loops
        self.close_timeout = close_timeout
        self._closes = closes
        self.loop = asyncio.get_running_loop()
        self.handle: str | None = None
        self.user: str | None = None
        """The user that it acts as."""
        self.owner: str | None = None
        """The user of its session, which may be another one than ``user``."""
        self.began = 0
        """The latest logout (``RecentLogouts.last``) when it began."""
        self.since = boot_clock()
        """When the decision began whom it acts as: a later logout of that user ends it."""
        self.state: Literal["connecting", "open", "closed"] = "connecting"
        self.close_code: int | None = None
        self.close_reason = ""
        self.timer: asyncio.TimerHandle | None = None
        self.connection: Member | None = None
        self.outbox: Outbox | None = None
        self.server, self.why_not_direct = known_server(send)
        self._closing: asyncio.Future[None] | None = None
        self._receiving: GuardedReceive | None = None

    # Closing

    def close(self, code: int, reason: str) -> bool:
        """Begin to close the socket, from any thread. False when it is closed or being closed
        already, or when the server refused at once; what fails later is counted by ``hub.closes``.

        Before the handshake is answered the close is kept, and goes out right after it: browsers see no
        code on a handshake that is refused. A client that does not read is cut off after ``close_timeout``
        seconds.
        """
        if self.close_code is not None or self.state == "closed":
            return False
        # A plain int: some servers (Daphne) and libraries refuse an IntEnum.
        self.close_code = int(code)
        self.close_reason = reason.encode()[:_LONGEST_REASON].decode(errors="ignore")
        if self.crosses_loops and _running_loop() is not self.loop:
            try:
                self.loop.call_soon_threadsafe(self._close_now)
            except RuntimeError:
                return False  # its loop is closed, and so is the socket
            return True
        return self._close_now()

    def give_up(self, code: CloseCode, error: Exception | None) -> None:
        """Close the socket because it cannot be written to; ``error`` is what no server should raise."""
        if error is not None:
            logger.error(
                "a message could not be written to the WebSocket of user %r: it is closed with code %d",
                self.user,
                code,
                exc_info=error,
            )
        self.close(code, code.text)

    def opened(self) -> None:
        """The handshake was answered: a close that came meanwhile goes out now."""
        if self.state == "connecting":
            self.state = "open"
            if not self.why_not_direct:
                self.why_not_direct = why_not_direct(self.server)
            if self.why_not_direct:
                say_once(self.why_not_direct)
            else:
                forget_handshake(self.server)
            if self.close_code is not None:
                self._close_now()

    def refused(self) -> None:
        """The handshake was answered with an HTTP response."""
        self.state = "closed"
        refuse_handshake(self.server)

    def _close_now(self) -> bool:
        """False when the server refused at once. A socket in its handshake is closed after it."""
        if self.state != "open":
            return self.state == "connecting"
        outbox = self.outbox
        if outbox is not None:
            # What was sent before the close goes out before it, unless the client is slow.
            outbox.scatter()
            outbox.flush()
            outbox.close()
        self.state = "closed"
        rest: Awaitable[None] | None
        if closes_in_task(self.server) or (outbox is not None and outbox.blocked):
            # websockets' legacy protocol also fails when two sends wait for a client that does not read.
            rest = self._send_close(outbox)
        else:
            # uvicorn writes at once unless its buffer is full, so a thousand closes are a thousand writes and
            # no task.
            try:
                rest = drive(self._send_close(None))
            except (OSError, RuntimeError):
                return False  # closed by the app or the client in the same moment
            except Exception:
                # A caller that closes a thousand sockets must not stop at one.
                logger.exception("a server failed to close a socket")
                self.abort()
                return False
        if rest is None:
            self._cut_later()
            return True
        if self._closing is None:
            self._closing = self.loop.create_future()
        try:
            task = spawn(self.tasks, self._finish_close(rest), name="asgi-cluster close")
            # Cancelled before its first step it has not even begun to await this.
            task.add_done_callback(lambda _: discard(rest))
        except RuntimeError:
            discard(rest)
            self._closing.set_result(None)
            self.abort()  # the node is stopping and takes no more work
            return False
        self._closes.begun(self._closing, self.tasks)
        return True

    async def finished(self) -> None:
        """Return when a close that the cluster began has gone out, or was given up after ``close_timeout``
        seconds.
        """
        if self.close_code is not None and self._closing is not None and not self._closing.done():
            await asyncio.wait((self._closing,))

    async def _send_close(self, outbox: Outbox | None) -> None:
        if outbox is not None:
            await outbox.idle()
        if self._receiving is not None and self._receiving.cancel():
            # granian sends nothing while a receive is pending. What the client sends now is not read.
            await asyncio.sleep(0)
        assert self.close_code is not None
        close = {"type": "websocket.close", "code": self.close_code, "reason": self.close_reason}
        try:
            await self.send(close)
        except (OSError, RuntimeError):
            raise
        except Exception:
            # Daphne lets an app send 1000 and 3000 to 4999 only (autobahn's sendClose).
            if not 1000 < self.close_code < 3000:
                raise
            await self.send({**close, "code": 1000})

    async def _finish_close(self, rest: Awaitable[None]) -> None:
        sent = False
        try:
            async with asyncio.timeout(self.close_timeout):
                await rest
            sent = True
            self._cut_later()
        except TimeoutError:
            self.abort()
        except (OSError, RuntimeError):
            return  # closed by the app or the client in the same moment
        finally:
            if self._closing is not None:
                self._closes.finished(self._closing, failed=not sent)
                # Only now: an app that returns before the close went out makes some servers send another
                # code.
                if not self._closing.done():
                    self._closing.set_result(None)

    def _cut_later(self) -> None:
        # A peer that stopped reading never empties the buffer, and a transport that is closing waits for that
        # for ever.
        if transport_of(self.server) is not None:
            self.loop.call_later(self.close_timeout, self._cut_if_stuck)

    def _cut_if_stuck(self) -> None:
        transport = transport_of(self.server)
        if transport is not None and unsent_bytes(transport) > 0:
            transport.abort()

    def abort(self) -> None:
        """Cut the connection, where the server's transport can be reached."""
        transport = transport_of(self.server)
        if transport is not None:
            transport.abort()

    def detach(self) -> None:
        """The ASGI call is over: nothing may be sent any more, nothing is waited for."""
        self.state = "closed"
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.outbox is not None:
            self.outbox.close()
        if self._receiving is not None:
            self._receiving.detach()
        if self._closing is not None:
            self._closing.cancel()
            self._closes.forget(self._closing)
        # What is left refers to the app's scope and buffers, and a stored socket would keep them alive.
        self.connection = None

    def call(self, function: Callable[..., object], *arguments: Any, at_once: bool = False) -> None:
        """Call something that belongs to this socket: at once, or on its own loop when the caller may be on
        another. There it waits for its turn, or one call could overtake another, unless ``at_once`` and the
        caller is on that loop.
        """
        if not self.crosses_loops or (at_once and _running_loop() is self.loop):
            function(*arguments)
            return
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return  # its loop is closed, and so is the socket

    # Receiving

    def guard_receive(self, receive: Receive) -> Receive:
        """``receive`` for the app: it ends with the close code when the cluster closes the socket.

        uvicorn wakes a pending ``receive`` itself when ``websocket.close`` is sent, and gets its own
        ``receive`` back. Other servers leave it waiting for the client.
        """
        if self.server is not None:
            return receive
        self._closing = self.loop.create_future()
        self._receiving = GuardedReceive(
            receive, self._closing, self.tasks, lambda: (self.close_code, self.close_reason)
        )
        return self._receiving

    def __repr__(self) -> str:
        return f"<Socket {self.id} {self.state}>"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
