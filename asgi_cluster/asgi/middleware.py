"""The ASGI middleware: a session for every request, every WebSocket registered, and the cluster's lifetime.

HTTP: the session is read before the app is called and saved on ``http.response.start``. WebSocket: the same
read, and then ``asgi.websocket``. Lifespan: the cluster is ready before the app's own startup and stops after
its shutdown.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_cluster.arguments import described
from asgi_cluster.asgi.headers import SessionHeaders
from asgi_cluster.asgi.http import Response, error_of_ours, refuse
from asgi_cluster.asgi.lifespan import Lifespan
from asgi_cluster.asgi.websocket import WebSockets
from asgi_cluster.cluster import Cluster, parts_of
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.scope import SCOPE_KEY, ScopeState
from asgi_cluster.sessions.session import Session

__all__ = ["ClusterMiddleware"]


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
        parts = parts_of(cluster)
        self._node = parts.node
        self._supervisor = parts.supervisor
        self._endpoint = parts.endpoint
        self._service = parts.service
        self._cached = parts.service.cache.get
        self._cookie = parts.service.cookie
        self._headers = SessionHeaders(parts.service, parts.origins)
        self._websockets = WebSockets(parts, self._headers)
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
            and (start := self._supervisor.lazy_start) is not None
        ):
            try:
                await start()
            except StoreUnavailable as error:
                await refuse(self._headers, scope, receive, send, error)
                return
        scope_key = self._scope_key
        if scope_key is not None and scope_key in scope:
            # Another session middleware is around this one: it must not find this session in its scope, and
            # sign it into its cookie.
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
            app = self._endpoint
        if kind == "websocket":
            await self._websockets.serve(app, scope, receive, send, state)
            return
        response = Response(self._headers, scope, send, session)
        try:
            await app(scope, receive, response.message)
        except (Exception, asyncio.CancelledError) as error:
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


def _route(scope: Scope) -> str:
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path
