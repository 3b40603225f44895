"""One ASGI middleware: sessions, logouts and live rooms that are the same on every node."""

from asgi_cluster.asgi.middleware import ClusterMiddleware
from asgi_cluster.bus.stats import BusStats, NodeInfo
from asgi_cluster.cluster import Cluster
from asgi_cluster.codes import CloseCode
from asgi_cluster.config import RealtimeConfig
from asgi_cluster.exceptions import (
    BusUnavailable,
    ClusterError,
    NotPermitted,
    NotStarted,
    SessionConflict,
    StoreUnavailable,
    TokenExpired,
)
from asgi_cluster.remote import RemoteSession, RemoteUser, SessionInfo
from asgi_cluster.rooms.connection import Connection
from asgi_cluster.rooms.history import Position
from asgi_cluster.rooms.room import Publication, Room, RoomHistory, RoomMember
from asgi_cluster.rooms.rules import Connected, ConnectRequest, RoomRequest, RoomRule
from asgi_cluster.scope import get_session
from asgi_cluster.sessions.config import CacheConfig, CookieConfig, SessionConfig
from asgi_cluster.sessions.ended import SessionEnded
from asgi_cluster.sessions.entry import CacheStats
from asgi_cluster.sessions.receipts import LogoutReceipt
from asgi_cluster.sessions.session import Session
from asgi_cluster.sockets.stats import RealtimeStats
from asgi_cluster.stats import ClusterStats

__version__ = "0.2.0"

__all__ = [
    "BusStats",
    "BusUnavailable",
    "CacheConfig",
    "CacheStats",
    "CloseCode",
    "Cluster",
    "ClusterError",
    "ClusterMiddleware",
    "ClusterStats",
    "ConnectRequest",
    "Connected",
    "Connection",
    "CookieConfig",
    "LogoutReceipt",
    "NodeInfo",
    "NotPermitted",
    "NotStarted",
    "Position",
    "Publication",
    "RealtimeConfig",
    "RealtimeStats",
    "RemoteSession",
    "RemoteUser",
    "Room",
    "RoomHistory",
    "RoomMember",
    "RoomRequest",
    "RoomRule",
    "Session",
    "SessionConfig",
    "SessionConflict",
    "SessionEnded",
    "SessionInfo",
    "StoreUnavailable",
    "TokenExpired",
    "get_session",
]
