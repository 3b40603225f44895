"""The ASGI middleware: a session for every request, every WebSocket registered, and the cluster's lifetime.

HTTP: the session is read before the app is called and saved on ``http.response.start``. WebSocket: the same,
and on ``websocket.accept`` the socket is registered *before* its session is read again, so that a logout
either finds the socket or is seen by the read. Lifespan: the cluster is ready before the app's own startup
and stops after its shutdown.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.websockets import WebSocketDisconnect

from asgi_cluster.cluster import Cluster
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import SessionConflict, StoreUnavailable
from asgi_cluster.lifespan import Lifespan
from asgi_cluster.realtime.socket import Socket
from asgi_cluster.scope import SCOPE_KEY, ScopeState
from asgi_cluster.sessions.session import Session

__all__ = ["ClusterMiddleware"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("asgi_cluster.middleware")

_VARY = (b"vary", b"Cookie")
_REASONS = {
    CloseCode.SHUTDOWN: "shutdown",
    CloseCode.SESSION_ENDED: "session ended",
    CloseCode.STORE_UNAVAILABLE: "session store unavailable",
}


class ClusterMiddleware:
    """Makes ``app``, any ASGI application, a member of ``cluster``.

    Outermost is best: what is outside of it is not seen by it. Wrapping twice is harmless.
    """

    def __init__(self, app: Any, cluster: Cluster) -> None:
        if not isinstance(cluster, Cluster):
            raise TypeError(f"cluster must be a Cluster, not {type(cluster).__name__}")
        self.app: ASGIApp = app
        self.cluster = cluster
        self._service = cluster.service
        self._cached = cluster.service.store.cache.get
        self._cookie = cluster.service.cookie
        self.scope_key = cluster.service.config.scope_key
        realtime = cluster.realtime.path
        self._endpoint_path = None if realtime is None else f"{realtime}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await Lifespan(self.app, self.cluster)(scope, receive, send)
            return
        if kind not in ("http", "websocket") or SCOPE_KEY in scope:
            await self.app(scope, receive, send)
            return
        scope_key = self.scope_key
        if scope_key is not None and scope_key in scope:
            # Another session middleware is around us: it must not find our session in its scope, and sign it
            # into its cookie.
            scope = {**scope}
        session = Session(self._service, scope)
        credentials = self._cookie.read(scope["headers"])
        if credentials is not None:
            handle, secret = credentials
            entry = self._cached(handle)
            if entry is not None:
                session.open(entry, secret)
            else:
                await session.fetch(handle, secret)
        state = scope[SCOPE_KEY] = ScopeState(self.cluster, session)
        if scope_key is not None:
            scope[scope_key] = session
        app = self.app
        endpoint = self._endpoint_path
        if endpoint is not None and endpoint in scope["path"] and _route(scope).startswith(endpoint):
            app = self.cluster.endpoint
        if kind == "websocket":
            await self._websocket(app, scope, receive, send, state)
            return
        response = _Response(self, scope, send, session)
        try:
            await app(scope, receive, response.message)
        except Exception as error:
            ours = _ours(error)
            if ours is None or (response.started and not response.replaced):
                raise
            if not response.started:
                await response.replace(ours)
            return
        if session.exposed and response.saved:
            session.check_sealed()

    async def _websocket(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, state: ScopeState
    ) -> None:
        tasks = self.cluster.tasks
        if tasks is None or self.cluster.loop is not asyncio.get_running_loop():
            # memory:// needs no start, and may be used from other loops than the one that started it
            # (Starlette's TestClient): then the socket's own call owns what it needs to have done.
            async with asyncio.TaskGroup() as own:
                await self._serve_socket(app, scope, receive, send, state, own)
        else:
            await self._serve_socket(app, scope, receive, send, state, tasks)

    async def _serve_socket(
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
            crosses_loops=self.cluster.crosses_loops,
            close_timeout=self.cluster.realtime.close_timeout,
        )
        state.socket = socket
        handshake = _Handshake(self, scope, send, state, socket)
        try:
            await app(scope, socket.guard_receive(receive), handshake)
        except Exception as error:
            if socket.close_code is not None and _is_disconnect(error):
                return  # closed by us: to the app, and to the server's log, an ordinary disconnect
            ours = _ours(error)
            if ours is None or handshake.answered:
                raise
            await handshake.accept_and_close(CloseCode.STORE_UNAVAILABLE, "session store unavailable")
        finally:
            self.cluster.hub.unregister(socket)
            socket.detach()
            if state.session.unsaved:
                logger.warning("a WebSocket ended with unsaved session changes: call session.save()")

    def adopt(self, scope: Scope, session: Session) -> None:
        """Take over what the app put under the public scope key.

        Raises:
            TypeError: another session library has put its object there.
        """
        if self.scope_key is None:
            return
        current = scope.get(self.scope_key)
        if current is session:
            return
        if type(current) is dict:
            session.replace(current)
        elif type(current).__module__ == "litestar.types.empty":
            # Litestar's clear_session() puts its sentinel Empty there.
            session.clear()
        elif current is not None:
            raise TypeError(
                f"scope[{self.scope_key!r}] was replaced by a {type(current).__module__}."
                f"{type(current).__name__}: another session middleware is inside ClusterMiddleware. "
                "Remove it, or set SessionConfig(scope_key=None) and use get_session()."
            )
        scope[self.scope_key] = session

    def warn_insecure(self, scope: Scope) -> None:
        """Once: a Secure cookie leaves over plain http, and most clients will not send it back."""
        if self._cookie.secure and scope.get("scheme") in ("http", "ws") and not self.cluster.warned_insecure:
            self.cluster.warned_insecure = True
            logger.warning(
                "a Secure session cookie was set over plain http: clients other than browsers on localhost "
                "will not send it back. Behind a TLS proxy let the server trust its X-Forwarded-Proto; "
                "for tests use base_url='https://…'."
            )


class _Response:
    """``send`` for one HTTP response: saves the session before the headers go out."""

    _failed = False
    started = False
    replaced = False
    saved = False

    def __init__(self, middleware: ClusterMiddleware, scope: Scope, send: Send, session: Session) -> None:
        self._middleware = middleware
        self._scope = scope
        self._send = send
        self._session = session

    async def message(self, message: Message) -> None:
        """ASGI ``send``."""
        if self.started or message["type"] != "http.response.start":
            if not self.replaced:
                await self._send(message)
            return
        session = self._session
        if message["status"] == 500 and session.raised is not None:
            # The app's error handler answered for an error of ours that the app did not catch.
            await self.replace(session.raised)
            return
        if not self._failed:
            try:
                scope_key = self._middleware.scope_key
                if scope_key is not None and self._scope.get(scope_key) is not session:
                    self._middleware.adopt(self._scope, session)
                if session.due:
                    await session.commit()
            except (StoreUnavailable, SessionConflict) as error:
                await self.replace(error)
                return
            except Exception:
                # The app's own error handling answers, and must not run into the same error again.
                self._failed = True
                raise
            self.saved = True
        self.started = True
        await self._send(_with_cookie(self._middleware, self._scope, session, message))
        session.sealed = True

    async def replace(self, error: StoreUnavailable | SessionConflict) -> None:
        """Answer in place of the app: 503 with Retry-After, or 409."""
        self.started = self.replaced = True
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
        if isinstance(error, StoreUnavailable):
            logger.warning("answered 503: %s", error)
            status, body = 503, b"The session store is unavailable. Please try again.\n"
            headers.append((b"retry-after", b"%d" % max(1, round(error.retry_after))))
        else:
            status, body = 409, b"Another request changed the session meanwhile. Please try again.\n"
        headers.append((b"content-length", b"%d" % len(body)))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


class _Handshake:
    """``send`` for one WebSocket: registers the socket at accept, and knows when it has been closed by us."""

    __slots__ = ("_middleware", "_scope", "_send", "_state", "answered", "socket")

    def __init__(
        self, middleware: ClusterMiddleware, scope: Scope, send: Send, state: ScopeState, socket: Socket
    ) -> None:
        self._middleware = middleware
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
            # An app that returns before the close went out makes some servers send a code of their own.
            await self.socket.finished()
            raise SocketClosed(self.socket.close_code)
        if kind == "websocket.close":
            self.answered = True
            self._middleware.cluster.hub.unregister(self.socket)
        elif kind == "websocket.http.response.start":
            self.answered = True
            await self._state.session.commit()
            message = _with_cookie(self._middleware, self._scope, self._state.session, message)
        await self._send(message)

    async def _accept(self, message: Message) -> None:
        cluster, session, socket = self._middleware.cluster, self._state.session, self.socket
        self._middleware.adopt(self._scope, session)
        code = CloseCode.SHUTDOWN if cluster.draining else None
        try:
            await session.commit()
            record = session.stored
            user = None if record is None else str(record.user) if record.user is not None else None
            if user is None and cluster.identify is not None:
                found = cluster.identify(self._scope)
                user = await found if inspect.isawaitable(found) else found
            socket.handle = None if record is None else record.handle
            socket.user = user
            # Register, then read: a logout that the read does not see finds the socket in the hub.
            cluster.hub.register(socket)
            if session.failure is not None:
                raise session.failure
            if record is not None:
                alive = await session.verify()
                if alive is None:
                    code = CloseCode.SESSION_ENDED
                else:
                    cluster.verifier.watch(socket, alive)
        except StoreUnavailable:
            code = CloseCode.STORE_UNAVAILABLE
        self.answered = True
        await self._send(_with_cookie(self._middleware, self._scope, session, message))
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


def _with_cookie(middleware: ClusterMiddleware, scope: Scope, session: Session, message: Message) -> Message:
    cookie = session.cookie_header()
    if cookie is None and not session.accessed:
        return message
    headers = [*message.get("headers", ())]
    if cookie is not None:
        headers.append(cookie)
        middleware.warn_insecure(scope)
    if message["type"] != "websocket.accept":
        for header in headers:
            if len(header[0]) == 4 and header[0].lower() == b"vary":
                _vary(headers, header)
                break
        else:
            headers.append(_VARY)
    return {**message, "headers": headers}


def _vary(headers: list[tuple[bytes, bytes]], header: tuple[bytes, bytes]) -> None:
    key, value = header
    names = [name.strip().lower() for name in value.split(b",")]
    if b"cookie" not in names and b"*" not in names:
        headers[headers.index(header)] = (key, value + b", Cookie" if value else b"Cookie")


def _route(scope: Scope) -> str:
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def _ours(error: BaseException) -> StoreUnavailable | SessionConflict | None:
    if isinstance(error, StoreUnavailable | SessionConflict):
        return error
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        return _ours(error.exceptions[0])
    return None


def _is_disconnect(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_disconnect(inner) for inner in error.exceptions)
    return isinstance(error, SocketClosed | WebSocketDisconnect | OSError)
