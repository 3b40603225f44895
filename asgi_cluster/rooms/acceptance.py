"""A WebSocket of the app, accepted with ``cluster.accept``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from asgi_cluster.bus.lease import boot_clock
from asgi_cluster.codes import CloseCode
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.input import Input
from asgi_cluster.scope import ScopeState
from asgi_cluster.sockets.receiving import Receive, Send
from asgi_cluster.sockets.wire import BARE

if TYPE_CHECKING:
    from asgi_cluster.rooms.rooms import Rooms
    from asgi_cluster.sockets.hub import Hub
    from asgi_cluster.sockets.origin import Origins

__all__ = ["Acceptance", "OriginRefused"]

_POLICY_VIOLATION = 1008  # RFC 6455 section 7.4.1


class Acceptance:
    """``async with``: accepts the WebSocket, gives its ``Connection``, and closes it. See ``Cluster.accept``.

    A class of its own, because a generator in a context manager takes half a kilobyte more for each socket.
    """

    __slots__ = (
        "_check_origin",
        "_cluster",
        "_connection",
        "_headers",
        "_hub",
        "_origins",
        "_rooms",
        "_subprotocol",
        "_user",
        "_websocket",
    )

    def __init__(
        self,
        websocket: Any,
        rooms: Rooms,
        hub: Hub,
        origins: Origins,
        cluster: Any,
        *,
        subprotocol: str | None,
        headers: Sequence[tuple[bytes, bytes]],
        user_id: str | None,
        check_origin: bool,
    ) -> None:
        self._websocket = websocket
        self._rooms = rooms
        self._hub = hub
        self._origins = origins
        self._cluster = cluster
        self._subprotocol = subprotocol
        self._headers = headers
        self._user = user_id
        self._check_origin = check_origin
        self._connection: Connection | None = None

    async def __aenter__(self) -> Connection:
        hub = self._hub
        scope, receive, send = _parts(self._websocket)
        state = ScopeState.of(scope)
        if state is None or state.socket is None or state.node is not self._rooms.node:
            raise RuntimeError(
                "cluster.accept needs ClusterMiddleware(app, cluster), with this cluster, around the app"
            )
        socket = state.socket
        if socket.connection is not None:
            raise RuntimeError("this WebSocket is accepted by the cluster already")
        in_handshake = socket.state == "connecting"
        if in_handshake:
            if _waits_for_connect(self._websocket):
                await receive()
            if self._check_origin and not self._origins.permit(scope):
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": ""})  # a 403
                socket.close_code = _POLICY_VIOLATION
                raise OriginRefused
            headers = list(self._headers)
            await send({"type": "websocket.accept", "subprotocol": self._subprotocol, "headers": headers})
        elif self._check_origin and not self._origins.permit(scope):
            socket.close(_POLICY_VIOLATION, str(OriginRefused()))
            await socket.finished()
            raise OriginRefused
        if self._user is not None:
            # For a socket that was open before, there is no time at which the app began to decide.
            hub.set_user(socket, self._user, since=socket.since if in_handshake else boot_clock())
            hub.close_if_logged_out(socket, since=socket.began, final=in_handshake)
        outbox = hub.outboxes.open(socket, BARE)
        connection = Connection(socket, state.session, outbox, self._cluster)
        connection.membership = self._rooms.memberships
        connection._input = Input(receive, socket, hub)
        self._connection = socket.connection = connection
        return connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        code, reason = 1000, ""
        if isinstance(error, asyncio.CancelledError):  # the server stops, and waits no longer
            code, reason = int(CloseCode.SHUTDOWN), CloseCode.SHUTDOWN.text
        elif error is not None and not isinstance(error, OSError):
            code, reason = 1011, "internal error"
        if connection._input is not None:
            connection._input.stop()
        try:
            await self._rooms.memberships.leave_all(connection)
        finally:
            socket = connection.socket
            try:
                async with asyncio.timeout(socket.close_timeout):
                    await connection.outbox.drained()
            except TimeoutError:
                # The client does not read, and would not read the close either.
                socket.close(code, reason)
                socket.abort()
            else:
                socket.close(code, reason)
            socket.connection = None


class OriginRefused(OSError):
    """The page that opened this WebSocket is of an origin that is not allowed."""

    def __str__(self) -> str:
        return "origin not allowed"


def _parts(websocket: Any) -> tuple[Any, Receive, Send]:
    if isinstance(websocket, tuple):
        scope, receive, send = websocket
        return scope, receive, send
    try:
        return websocket.scope, websocket.receive, websocket.send
    except AttributeError:
        raise TypeError(
            "cluster.accept takes a WebSocket with scope, receive and send, or these three, "
            f"not {type(websocket).__name__}"
        ) from None


def _waits_for_connect(websocket: Any) -> bool:
    # Starlette and Litestar note whether the app has already taken websocket.connect.
    state = getattr(websocket, "client_state", None) or getattr(websocket, "connection_state", None)
    return state is None or getattr(state, "name", state) in ("CONNECTING", "init")
