"""What the middleware leaves in an ASGI scope: ``scope["asgi_cluster"]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asgi_cluster.cluster import Cluster
    from asgi_cluster.sessions.session import Session
    from asgi_cluster.sockets.socket import Socket

__all__ = ["SCOPE_KEY", "ScopeState"]

SCOPE_KEY = "asgi_cluster"


class ScopeState:
    """Ours alone: whatever the app does with ``scope["session"]``, this stays true.

    ``socket`` is ``None`` on HTTP.
    """

    __slots__ = ("cluster", "session", "socket")

    def __init__(self, cluster: Cluster, session: Session, socket: Socket | None = None) -> None:
        self.cluster = cluster
        self.session = session
        self.socket = socket

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
