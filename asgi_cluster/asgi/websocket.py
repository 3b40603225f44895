"""``send`` for one WebSocket: registers the socket at accept, and refuses to send after the cluster has
closed it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from asgi_cluster.asgi.headers import SessionHeaders
from asgi_cluster.cluster import Parts
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import check_user
from asgi_cluster.scope import ScopeState
from asgi_cluster.sockets.socket import Socket

__all__ = ["Handshake", "SocketClosed"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_REASONS = {
    CloseCode.SHUTDOWN: "shutdown",
    CloseCode.SESSION_ENDED: "session ended",
    CloseCode.STORE_UNAVAILABLE: "session store unavailable",
}


class Handshake:
    """One handshake, and what the app sends after it."""

    __slots__ = ("_headers", "_parts", "_scope", "_send", "_state", "answered", "socket")

    def __init__(
        self,
        parts: Parts,
        headers: SessionHeaders,
        scope: Scope,
        send: Send,
        state: ScopeState,
        socket: Socket,
    ) -> None:
        self._parts = parts
        self._headers = headers
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
            self._parts.hub.unregister(self.socket)
        elif kind == "websocket.http.response.start":
            self.answered = True
            await self._parts.service.committer.commit(self._state.session)
            message = self._headers.with_cookie(self._scope, self._state.session, message)
        await self._send(message)

    async def _accept(self, message: Message) -> None:
        parts, session, socket = self._parts, self._state.session, self.socket
        self._headers.adopt(self._scope, session)
        code: CloseCode | None = None
        try:
            await parts.service.committer.commit(session)
            record = session.work.record
            user: str | None = None if record is None else record.user
            socket.owner = user
            if user is None and parts.identify is not None:
                found = parts.identify(self._scope)
                found = await found if inspect.isawaitable(found) else found
                user = None if found is None else check_user(found)
            socket.handle = None if record is None else record.handle
            socket.user = user
            # Register, then read: a logout that the read does not see finds the socket in the hub.
            parts.hub.register(socket)
            if user != socket.owner:
                parts.hub.close_if_logged_out(socket, since=socket.began)
            if session.work.state == "unread":
                session.work.check_readable()
            if record is not None:
                alive = await parts.service.verify(session)
                if alive is None:
                    code = CloseCode.SESSION_ENDED
                else:
                    parts.revalidator.watch(socket, alive)
        except StoreUnavailable:
            code = CloseCode.STORE_UNAVAILABLE
        if code is None and parts.node.draining:
            # Asked after it was registered: a drain that began before did not find it.
            code = CloseCode.SHUTDOWN
        self.answered = True
        await self._send(self._headers.with_cookie(self._scope, session, message))
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
