"""The ASGI middleware: a session for every request, every WebSocket registered, and the cluster's lifetime.

HTTP: the session is read before the app is called and saved on ``http.response.start``. WebSocket: the same,
and on ``websocket.accept`` the socket is registered *before* its session is read again, so that a logout
either finds the socket or is seen by the read. Lifespan: the cluster is ready before the app's own startup
and stops after its shutdown.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.websockets import WebSocketDisconnect

from asgi_cluster.arguments import described
from asgi_cluster.asgi.headers import SessionHeaders
from asgi_cluster.asgi.http import Response, error_of_ours, refuse
from asgi_cluster.asgi.lifespan import Lifespan
from asgi_cluster.asgi.websocket import Handshake, SocketClosed
from asgi_cluster.cluster import Cluster
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from asgi_cluster.scope import SCOPE_KEY, ScopeState
from asgi_cluster.sessions.session import Session
from asgi_cluster.sockets.socket import Socket
from asgi_cluster.tasks import running_asyncio_loop

__all__ = ["ClusterMiddleware"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("asgi_cluster.middleware")


class ClusterMiddleware:
    """Makes ``app``, any ASGI application, a member of ``cluster``.

    Outermost is best: it does not see what is outside of it. Wrapping twice is harmless.
    """

    def __init__(self, app: Any, cluster: Cluster) -> None:
        if not isinstance(cluster, Cluster):
            swapped = ": write ClusterMiddleware(app, cluster)" if isinstance(app, Cluster) else ""
            raise TypeError(f"cluster must be a Cluster, not {described(cluster)}{swapped}")
        if not callable(app):
            raise TypeError(f"app must be an ASGI application, not {described(app)}")
        self.app: ASGIApp = app
        self.cluster = cluster
        parts = self._parts = cluster._parts
        self._node = parts.node
        self._service = parts.service
        self._cached = parts.service.cache.get
        self._cookie = parts.service.cookie
        self._headers = SessionHeaders(parts.service, parts.origins)
        self._needs_start = parts.node.needs_start
        self._scope_key = parts.service.config.scope_key
        realtime = parts.realtime.path
        self._endpoint_path = None if realtime is None else f"{realtime}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await Lifespan(self.app, self.cluster)(scope, receive, send)
            return
        if kind not in ("http", "websocket") or SCOPE_KEY in scope:
            await self.app(scope, receive, send)
            return
        if (
            self._needs_start
            and self._node.tasks is None
            and (start := self._parts.supervisor.first_request) is not None
        ):
            try:
                await start()
            except StoreUnavailable as error:
                await refuse(self._headers, scope, receive, send, error)
                return
        scope_key = self._scope_key
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
                self._service.open(session, entry, secret)
            else:
                await self._service.fetch(session, handle, secret)
            if session.work.record is None:
                await self._try_others(session, scope)
        state = scope[SCOPE_KEY] = ScopeState(self._node, session)
        if scope_key is not None:
            scope[scope_key] = session
        app = self.app
        endpoint = self._endpoint_path
        if endpoint is not None and endpoint in scope["path"] and _route(scope).startswith(endpoint):
            app = self._parts.endpoint
        if kind == "websocket":
            # As few coroutines as can be: each that an idle socket waits in takes a quarter of a kilobyte.
            tasks = self._node.tasks
            if tasks is not None and self._node.loop is asyncio.get_running_loop():
                await self._serve_socket(app, scope, receive, send, state, tasks)
            else:
                await self._serve_elsewhere(app, scope, receive, send, state)
            return
        response = Response(self._headers, scope, send, session)
        try:
            await app(scope, receive, response.message)
        except Exception as error:
            ours = error_of_ours(error)
            if not response.started:
                if ours is not None:
                    await response.replace(ours)
                else:
                    await self._service.logins.discard_unsent(session)
            if ours is None or not response.replaced:
                raise
            return
        finally:
            if session.work.watched is not None:
                self._service.unwatch(session)
        if session.work.exposed and response.saved:
            session.work.check_sealed(session)

    async def _try_others(self, session: Session, scope: Scope) -> None:
        for handle, secret in self._cookie.others(scope["headers"]):
            if session.work.failure is not None:
                return
            entry = self._cached(handle)
            if entry is not None:
                self._service.open(session, entry, secret)
            else:
                await self._service.fetch(session, handle, secret)
            if session.work.record is not None:
                return

    async def _serve_elsewhere(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, state: ScopeState
    ) -> None:
        # memory:// needs no start, and may be used from other loops than the one that started it (Starlette's
        # TestClient): then the socket's own call owns what it needs to have done.
        running_asyncio_loop()
        async with asyncio.TaskGroup() as own:
            await self._serve_socket(app, scope, receive, send, state, own)

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
            crosses_loops=self._node.crosses_loops,
            close_timeout=self._parts.realtime.close_timeout,
            closes=self._parts.hub.closes,
        )
        socket.began = self._parts.hub.logouts.last
        state.socket = socket
        if (drainer := self._parts.supervisor.drainer) is not None:
            drainer.take()
        handshake = Handshake(self._parts, self._headers, scope, send, state, socket)
        try:
            await app(scope, socket.guard_receive(receive), handshake)
        except Exception as error:
            if socket.close_code is not None and _is_disconnect(error):
                return  # closed by us: to the app, and to the server's log, an ordinary disconnect
            ours = error_of_ours(error)
            if ours is None or handshake.answered:
                raise
            what = "message bus" if isinstance(ours, BusUnavailable) else "session store"
            await handshake.accept_and_close(CloseCode.STORE_UNAVAILABLE, f"{what} unavailable")
        finally:
            self._parts.hub.unregister(socket)
            socket.detach()
            self._service.unwatch(state.session)
            if state.session.unsaved:
                logger.warning("a WebSocket ended with unsaved session changes: call session.save()")


def _route(scope: Scope) -> str:
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def _is_disconnect(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_disconnect(inner) for inner in error.exceptions)
    return isinstance(error, SocketClosed | WebSocketDisconnect | OSError)
