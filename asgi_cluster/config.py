"""Configuration of rooms and clients: frozen, keyword-only, refused when it makes no sense."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from asgi_cluster.arguments import (
    Seconds,
    durations,
    expect,
    expect_callable,
    one_of,
    positive,
    whole,
)

if TYPE_CHECKING:
    from asgi_cluster.rooms.connection import Connection
    from asgi_cluster.rooms.rules import ConnectRequest, RoomRule

__all__ = ["DEFAULT_DRAIN", "RealtimeConfig"]

DEFAULT_DRAIN = 5.0
"""Seconds; see ``RealtimeConfig.drain``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RealtimeConfig:
    """Rooms, the built-in endpoint and every WebSocket of the wrapped app. Durations are seconds or a
    ``timedelta``.
    """

    path: str | None = "/realtime"
    """Where the built-in endpoint lives (``<path>/websocket``, ``<path>/client.js``); ``None``: nowhere."""
    rules: Sequence[RoomRule] = ()
    """Which rooms clients may subscribe to and publish in. Without a rule a room is closed to clients."""
    connect: Callable[[ConnectRequest], Any] | None = None
    """``(ConnectRequest) -> str | Connected | None`` or awaitable: may name the user (a token of the app's
    own), or say with ``Connected`` when that expires, what the client and others are shown, and which rooms
    it is in; or raise ``NotPermitted`` (with ``code=3500`` for an invalid token) or ``TokenExpired``.
    """
    rpc: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """``{"method": f}``: ``f(connection, data)`` or awaitable; its result goes back to the client."""
    on_connect: Callable[[Connection], Awaitable[None] | None] | None = None
    """Called when a client of the built-in endpoint has connected."""
    on_disconnect: Callable[[Connection, int, str], Awaitable[None] | None] | None = None
    """Called with the close code and reason when a client of the built-in endpoint is gone."""
    on_message: Callable[[Connection, Any], Awaitable[None] | None] | None = None
    """Called with what a client of the built-in endpoint sends without wanting an answer; ``None`` closes it
    with 3508.
    """
    allowed_origins: Sequence[str] | None = None
    """Pages that may open a WebSocket, on the built-in endpoint and with ``cluster.accept``. ``None``: those
    of the host that the request names in ``Host``, ``X-Forwarded-Host`` or ``Forwarded``. Else full origins
    (``https://app.example``); ``*`` allows every one. A request without ``Origin`` comes from no page.
    """
    on_bus_error: Literal["raise", "local"] = "raise"
    """A broadcast that cannot reach the bus raises ``BusUnavailable``, or reaches only members here."""
    ping_interval: Seconds[float] = Seconds(25.0)
    """Seconds between protocol pings to each client of the built-in endpoint."""
    pong_timeout: Seconds[float] = Seconds(10.0)
    """Seconds a client has to answer a ping before it is closed with 3012."""
    connect_timeout: Seconds[float] = Seconds(10.0)
    """Seconds a client has to send the connect command before it is closed with 3502."""
    outbox_bytes: int = 1 << 20
    """Bytes that may wait for one slow client; what happens then is the room's ``slow`` policy."""
    max_message_bytes: int = 65_536
    """Bytes a client may send in one frame; more closes it with 1009."""
    max_broadcast_bytes: int = 1 << 20
    """Bytes one broadcast may hold, encoded; more is a ``ValueError``."""
    max_rooms: int = 128
    """Rooms one connection may be in; more is error 106."""
    max_commands_per_second: float = 100.0
    """Commands per second a client may send over time (bursts of ten seconds' worth pass); more closes it
    with 3013.
    """
    max_connections_per_user: int | None = None
    """Connections one user may have to the built-in endpoint in the whole cluster; ``None``: no limit."""
    max_connections_per_session: int | None = None
    """Connections one session may have to the built-in endpoint in the whole cluster; ``None``: no limit."""
    unverified_limit: Seconds[float] = Seconds(60.0)
    """Seconds an open socket outlives a Redis that does not answer (spread over a quarter of it)."""
    close_timeout: Seconds[float] = Seconds(2.0)
    """Seconds a forced close may take before the transport is cut."""
    drain: Seconds[float | None] = Seconds(DEFAULT_DRAIN)
    """Seconds at most over which SIGTERM spreads the closing of sockets, 20 in a second, before the server
    stops; ``None`` or 0: not at all. Ctrl-C and ``--reload`` do not wait. See docs/servers.md for the servers
    on which it works.
    """

    def __post_init__(self) -> None:
        expect("path", self.path, str, None)
        for name in ("connect", "on_connect", "on_disconnect", "on_message"):
            expect_callable(name, getattr(self, name))
        expect("rpc", self.rpc, Mapping)
        for method, handler in self.rpc.items():
            expect_callable(f"rpc[{method!r}]", handler)
        durations(
            self, "ping_interval", "pong_timeout", "connect_timeout", "unverified_limit", "close_timeout"
        )
        if self.drain is not None:
            durations(self, "drain", least=0)
        positive(max_commands_per_second=self.max_commands_per_second)
        for name in ("outbox_bytes", "max_message_bytes", "max_broadcast_bytes", "max_rooms"):
            whole(name, getattr(self, name), 1)
        for name in ("max_connections_per_user", "max_connections_per_session"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value, 1)
        if self.path is not None and (not self.path.startswith("/") or self.path != self.path.rstrip("/")):
            raise ValueError(f"realtime path must start with '/' and not end with one, not {self.path!r}")
        if self.pong_timeout >= self.ping_interval:
            raise ValueError("pong_timeout must be shorter than ping_interval")
        if isinstance(self.allowed_origins, str):
            raise TypeError("allowed_origins must be a list of origins, not one string")
        for origin in self.allowed_origins or ():
            expect("an origin", origin, str)
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"an origin is scheme://host[:port] without a path, not {origin!r}")
        one_of("on_bus_error", self.on_bus_error, ("raise", "local"))
        if not isinstance(self.rules, Sequence) or not all(hasattr(rule, "covers") for rule in self.rules):
            raise TypeError(f"rules must be a list of room rules: rules=[RoomRule(...)], not {self.rules!r}")
        for earlier, rule in enumerate(self.rules):
            for other in self.rules[:earlier]:
                if other.covers(rule):
                    raise ValueError(
                        f"room rule {rule.pattern!r} can never match: {other.pattern!r} comes first"
                    )
