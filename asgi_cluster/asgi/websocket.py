"""A WebSocket of the app, from its handshake to its end.

On ``websocket.accept`` the socket is registered *before* its session is read again, so that a logout either
finds the socket or is seen by the read. After the cluster has closed the socket, the app's ``send`` raises.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from asgi_cluster.asgi.headers import SessionHeaders
from asgi_cluster.asgi.http import error_of_ours
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from asgi_cluster.ids import check_user
from asgi_cluster.parts import Parts
from asgi_cluster.scope import ScopeState
from asgi_cluster.sockets.socket import Socket
from asgi_cluster.tasks import running_asyncio_loop

__all__ = ["SocketClosed", "WebSockets"]

logger = logging.getLogger("asgi_cluster.middleware")

_REASONS = {
    CloseCode.SHUTDOWN: "shutdown",
    CloseCode.SESSION_ENDED: "session ended",
    CloseCode.STORE_UNAVAILABLE: "session store unavailable",
}


class WebSockets:
    """What the WebSockets of one middleware share."""

    def __init__(self, parts: Parts, headers: SessionHeaders) -> None:
        self.headers = headers
        self.node = parts.node
        self.service = parts.service
        self.hub = parts.hub
        self.revalidator = parts.revalidator
        self.identify = parts.identify
        self._supervisor = parts.supervisor
        self._close_timeout = parts.realtime.close_timeout

    def serve(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, state: ScopeState
    ) -> Awaitable[None]:
        """Call ``app`` for one WebSocket whose session is read."""
        # As few coroutines as can be: each that an idle socket waits in takes a quarter of a kilobyte.
        tasks = self.node.tasks
        if tasks is not None and self.node.loop is asyncio.get_running_loop():
            return self._serve(app, scope, receive, send, state, tasks)
        return self._serve_elsewhere(app, scope, receive, send, state)

    async def _serve_elsewhere(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, state: ScopeState
    ) -> None:
        # memory:// needs no start, and may be used from other loops than the one that started it (Starlette's
        # TestClient): then the socket's own call owns what it needs to have done.
        running_asyncio_loop()
        async with asyncio.TaskGroup() as own:
            await self._serve(app, scope, receive, send, state, own)

    async def _serve(
        self,
        app: ASGIApp,
        scope: Scope,
        receive: Receive,
        send: Send,
        state: ScopeState,
        tasks: asyncio.TaskGroup,
    ) -> None:
        socket = Socket(
            scope,
            send,
            tasks=tasks,
            crosses_loops=self.node.crosses_loops,
            close_timeout=self._close_timeout,
            closes=self.hub.closes,
        )
        socket.began = self.hub.logouts.last
        state.socket = socket
        if (drainer := self._supervisor.drainer) is not None:
            drainer.install()
        handshake = Handshake(self, scope, send, state, socket)
        try:
            await app(scope, socket.guard_receive(receive), handshake)
        except Exception as error:
            if socket.close_code is not None and _is_disconnect(error):
                return  # closed by the cluster: to the app, and to the server's log, an ordinary disconnect
            ours = error_of_ours(error)
            if ours is None or handshake.answered:
                raise
            what = "message bus" if isinstance(ours, BusUnavailable) else "session store"
            await handshake.accept_and_close(CloseCode.STORE_UNAVAILABLE, f"{what} unavailable")
        finally:
            self.hub.unregister(socket)
            socket.detach()
            self.service.unwatch(state.session)
            if state.session.unsaved:
                logger.warning("a WebSocket ended with unsaved session changes: call session.save()")


class Handshake:
    """ASGI ``send`` of one WebSocket: the answer to its handshake, and what the app sends after it."""

    __slots__ = ("_scope", "_send", "_shared", "_state", "answered", "socket")

    def __init__(
        self,
        shared: WebSockets,
        scope: Scope,
        send: Send,
        state: ScopeState,
        socket: Socket,
    ) -> None:
        self._shared = shared
        self._scope = scope
        self._send = send
        self._state = state
        self.socket = socket
        self.answered = False

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.accept":
            await self._accept(message)
            return
        if self.socket.close_code is not None:
            if kind == "websocket.close":
                return
            # Some servers send a code of their own when the app returns before the close went out.
            await self.socket.finished()
            raise SocketClosed(self.socket.close_code)
        if kind == "websocket.close":
            self.answered = True
            self._shared.hub.unregister(self.socket)
        elif kind == "websocket.http.response.start":
            await self._shared.service.committer.commit(self._state.session)
            self.answered = True
            message = self._shared.headers.with_cookie(self._scope, self._state.session, message)
        await self._send(message)

    async def _accept(self, message: Message) -> None:
        shared, session, socket = self._shared, self._state.session, self.socket
        shared.headers.adopt(self._scope, session)
        code: CloseCode | None = None
        try:
            await shared.service.committer.commit(session)
            record = session.work.record
            user: str | None = None if record is None else record.user
            socket.owner = user
            if user is None and shared.identify is not None:
                found = shared.identify(self._scope)
                found = await found if inspect.isawaitable(found) else found
                user = None if found is None else check_user(found)
            socket.handle = None if record is None else record.handle
            socket.user = user
            # Register, then read: a logout that comes after the read finds the socket in the hub.
            shared.hub.register(socket)
            if user != socket.owner:
                shared.hub.close_if_logged_out(socket, since=socket.began)
            if session.work.state == "unread":
                session.work.check_readable()
            if record is not None:
                expires_in = await shared.service.verify(session)
                if expires_in is None:
                    code = CloseCode.SESSION_ENDED
                else:
                    shared.revalidator.watch(socket, expires_in)
        except StoreUnavailable:
            code = CloseCode.STORE_UNAVAILABLE
        if code is None and shared.node.draining:
            # Read after the socket was registered: a drain that began before did not find it.
            code = CloseCode.SHUTDOWN
        self.answered = True
        await self._send(shared.headers.with_cookie(self._scope, session, message))
        # A close that came during the handshake goes out now: browsers see no code on a refused handshake.
        socket.opened()
        if code is not None:
            socket.close(code, _REASONS[code])

    async def accept_and_close(self, code: CloseCode, reason: str) -> None:
        """Answer a handshake that the app could not answer, so that the browser sees a code."""
        self.answered = True
        await self._send({"type": "websocket.accept", "subprotocol": None, "headers": []})
        self.socket.opened()
        self.socket.close(code, reason)


class SocketClosed(OSError):
    """``send`` on a WebSocket that the cluster has closed (ASGI: ``send`` raises ``OSError`` after a
    disconnect).
    """

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"the WebSocket was closed with code {code}")


def _is_disconnect(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_disconnect(inner) for inner in error.exceptions)
    return isinstance(error, SocketClosed | WebSocketDisconnect | OSError)
