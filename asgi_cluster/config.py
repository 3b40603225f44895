"""Configuration of rooms and clients: frozen and keyword-only. Values that make no sense are refused."""

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
    """The URL path of the built-in endpoint (``<path>/websocket``, ``<path>/client.js``); ``None``: there is
    no endpoint.
    """
    rules: Sequence[RoomRule] = ()
    """The rooms that clients may subscribe to and publish in; the first rule that matches counts. A room
    without a rule is closed to clients.
    """
    connect: Callable[[ConnectRequest], Any] | None = None
    """Called when a client of the built-in endpoint connects or refreshes its token, as ``(ConnectRequest) ->
    str | Connected | None``, sync or async. A ``str`` is the user, for apps with tokens of their own.
    ``Connected`` also says when that expires, what the client and others are shown, and which rooms the
    client is in. With the result ``None``, or without a hook, the user is that of the handshake. The hook may
    raise ``NotPermitted`` (with ``code=3500`` for an invalid token) or ``TokenExpired``.
    """
    rpc: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """``{"method": f}``: ``f(connection, data)``, sync or async, answers the client's call of ``method``. The
    client gets its result.
    """
    on_connect: Callable[[Connection], Awaitable[None] | None] | None = None
    """Called when a client of the built-in endpoint has connected, sync or async. ``None``: no call."""
    on_disconnect: Callable[[Connection, int, str], Awaitable[None] | None] | None = None
    """Called with the close code and the reason when the connection of a client of the built-in endpoint has
    ended, sync or async. ``None``: no call.
    """
    on_message: Callable[[Connection, Any], Awaitable[None] | None] | None = None
    """Called with each message that a client of the built-in endpoint sends without expecting an answer, sync
    or async. ``None``: such a message closes the client's connection with 3508.
    """
    allowed_origins: Sequence[str] | None = None
    """Origins whose pages may open a WebSocket, on the built-in endpoint and with ``cluster.accept``:
    ``https://app.example``, or ``*`` for all. ``None``: the host that the request names in ``Host``,
    ``X-Forwarded-Host`` or ``Forwarded``. A request without ``Origin`` does not come from a page and is
    allowed.
    """
    on_bus_error: Literal["raise", "local"] = "raise"
    """What a broadcast does when Redis does not answer: ``raise`` ``BusUnavailable``, or deliver it to the
    members on this node only (``local``).
    """
    ping_interval: Seconds[float] = Seconds(25.0)
    """Seconds between protocol pings to each client of the built-in endpoint."""
    pong_timeout: Seconds[float] = Seconds(10.0)
    """Seconds within which a client has to answer a ping; else the connection is closed with 3012. Less than
    ``ping_interval``.
    """
    connect_timeout: Seconds[float] = Seconds(10.0)
    """Seconds within which a client has to send the connect command; else the connection is closed with
    3502.
    """
    outbox_bytes: int = 1 << 20
    """Bytes that may wait for one slow client. What happens above that is the room's ``slow`` policy."""
    max_message_bytes: int = 65_536
    """Bytes that a client may send in one frame; more closes the connection with 1009."""
    max_broadcast_bytes: int = 1 << 20
    """Bytes of one broadcast, encoded; more is a ``ValueError``."""
    max_rooms: int = 128
    """Rooms that one connection may be in; one more is error 106 of the Centrifuge protocol."""
    max_commands_per_second: float = 100.0
    """Commands per second that a client may send on average; more closes the connection with 3013. A burst
    may have the commands of ten seconds.
    """
    max_connections_per_user: int | None = None
    """Connections of one user to the built-in endpoint, in the whole cluster; ``None``: no limit."""
    max_connections_per_session: int | None = None
    """Connections of one session to the built-in endpoint, in the whole cluster; ``None``: no limit."""
    unverified_limit: Seconds[float] = Seconds(60.0)
    """Seconds for which an open socket stays open while Redis does not answer and its session cannot be
    verified. Each socket is closed after three quarters of that time to the whole of it, at random.
    """
    close_timeout: Seconds[float] = Seconds(2.0)
    """Seconds that a forced close may take before the transport is aborted."""
    drain: Seconds[float | None] = Seconds(DEFAULT_DRAIN)
    """Seconds: on SIGTERM the sockets are closed one after another within this time, before the server stops;
    at most 20 per second as long as that is enough. ``None`` or 0: no drain. Ctrl-C and ``--reload`` do not
    wait. docs/servers.md lists the servers on which it works.
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
