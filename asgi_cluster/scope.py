"""What the middleware leaves in an ASGI scope: ``scope["asgi_cluster"]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, overload

from starlette.requests import HTTPConnection

from asgi_cluster.arguments import described

if TYPE_CHECKING:
    from asgi_cluster.node import Node
    from asgi_cluster.sessions.session import Session
    from asgi_cluster.sockets.socket import Socket

__all__ = ["SCOPE_KEY", "ScopeState", "get_session"]

SCOPE_KEY = "asgi_cluster"


class ScopeState:
    """The middleware's own place: the app may replace ``scope["session"]``, and this stays as it is.

    ``socket`` is set by the middleware on a WebSocket; it stays ``None`` on HTTP.
    """

    __slots__ = ("node", "session", "socket")

    def __init__(self, node: Node, session: Session) -> None:
        self.node = node
        self.session = session
        self.socket: Socket | None = None

    def __copy__(self) -> ScopeState:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ScopeState:
        # Frameworks copy scopes for sub-apps; there is still one session and one socket.
        return self

    @staticmethod
    def of(scope: Any) -> ScopeState | None:
        """The state in ``scope``, or ``None`` when no ClusterMiddleware is around this app."""
        state = scope.get(SCOPE_KEY)
        return state if isinstance(state, ScopeState) else None


class _Scoped(Protocol):
    """A request or WebSocket of any framework."""

    @property
    def scope(self) -> Any: ...


@overload
def get_session(connection: Mapping[str, Any]) -> Session: ...
@overload
def get_session(connection: _Scoped) -> Session: ...
def get_session(connection: HTTPConnection) -> Session:  # type: ignore[misc]  # FastAPI reads this type
    """The session of a request or WebSocket: anything with a ``scope``, or the scope itself. Also a FastAPI
    dependency.

    Raises:
        RuntimeError: no ``ClusterMiddleware`` is around this app.
        TypeError: ``connection`` has no ASGI scope.
    """
    scope = getattr(connection, "scope", connection)
    if not isinstance(scope, Mapping):
        raise TypeError(
            f"get_session takes a request, a WebSocket or an ASGI scope, not {described(connection)}: pass "
            "the object that the framework gives the handler"
        )
    state = ScopeState.of(scope)
    if state is None:
        raise RuntimeError("there is no session here: wrap the app in ClusterMiddleware(app, cluster)")
    return state.session
