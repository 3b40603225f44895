"""How to connect to one server: host and port or a socket, TLS, user and password."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from ssl import SSLContext
from typing import Any, Self
from urllib.parse import urlsplit

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from asgi_cluster.backends.redis.compat import ContextConnection
from asgi_cluster.backends.redis.connection import MultiplexedConnection, OnPush

__all__ = ["Address", "HostPort"]

HostPort = tuple[str, int]

_CONNECT_TIMEOUT = 1.0
_OPTIONS = {"client_name", "db", "host", "password", "path", "port", "socket_connect_timeout", "username"}

_ENCODE = " (in a password, / ? # and @ are written %2F %3F %23 and %40)"


class Address:
    """How to connect to one server."""

    def __init__(
        self, url: str, *, ssl_context: SSLContext | None = None, credential_provider: Any = None
    ) -> None:
        unix = url.startswith("unix:")
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            # Not with urllib's words: they quote what stands where the port should be, and that may be half a
            # password.
            raise ValueError(f"the host or port of a Redis URL makes no sense{_ENCODE}") from None
        path = parts.path.strip("/")
        if unix and not path:
            raise ValueError("a unix URL needs a path: unix:///run/redis.sock")
        if not unix and not host:
            raise ValueError(f"a Redis URL needs a host: redis://host:6379/0{_ENCODE}")
        if not unix and path and not path.isdigit():
            raise ValueError(f"the path of a Redis URL is a database number{_ENCODE}")
        try:
            options: dict[str, Any] = dict(parse_url(url))
        except ValueError as error:
            raise ValueError(f"not a Redis URL: {error}") from None
        self._class: Callable[..., AbstractConnection] = options.pop("connection_class", Connection)
        for name in options:
            if name not in _OPTIONS and not name.startswith("ssl_"):
                raise ValueError(f"a Redis URL does not take the option {name!r} here")
        if not isinstance(options.get("db", 0), int) or options.get("db", 0) < 0:
            raise ValueError("the database of a Redis URL is a number of at least 0")
        if ssl_context is not None:
            if self._class is not SSLConnection:
                raise ValueError("ssl_context goes with rediss://")
            self._class = partial(ContextConnection, ssl_context)
        if credential_provider is not None:
            if "password" in options or "username" in options:
                raise ValueError("give user and password in the URL, or a credential_provider, not both")
            options["credential_provider"] = credential_provider
        if self._class is not UnixDomainSocketConnection:
            options.setdefault("port", 6379)
        options.setdefault("db", 0)
        self._timeout: float = options.get("socket_connect_timeout") or _CONNECT_TIMEOUT
        self._options = options
        try:
            self.connection()
        except TypeError as error:
            raise ValueError(f"unknown option in a Redis URL: {error}") from None

    @property
    def name(self) -> str:
        """Where it is, for people."""
        if self._class is UnixDomainSocketConnection:
            return f"unix socket {self._options['path']}"
        return "{}:{}".format(*self.place)

    @property
    def db(self) -> int:
        """The database number."""
        number: int = self._options["db"]
        return number

    @property
    def place(self) -> HostPort:
        """Host and port; of a unix socket the path and 0."""
        return self._options.get("host") or self._options["path"], self._options.get("port", 0)

    def at(self, host: str, port: int) -> Self:
        """The same user, password and TLS on another server."""
        return self.replaced(host=host, port=port)

    def replaced(self, **options: Any) -> Self:
        """The same with other options."""
        other = copy(self)
        other._options = {**self._options, **options}
        return other

    def connection(self) -> AbstractConnection:
        """A connection that is not open yet: RESP3, no retries, no timeouts of its own."""
        return self._class(
            **{
                **self._options,
                "protocol": 3,
                "socket_timeout": None,
                "socket_connect_timeout": self._timeout,
                "retry": Retry(NoBackoff(), 0),
                "decode_responses": False,
                "maint_notifications_config": MaintNotificationsConfig(enabled=False),
            }
        )

    async def dial(self, on_push: OnPush | None = None) -> MultiplexedConnection:
        """An open connection. Raises ``ConnectionBroken``."""
        connection = MultiplexedConnection(self.connection(), on_push)
        await connection.open(self._timeout)
        return connection

    def __repr__(self) -> str:
        return f"<Address {self.name}/{self.db}>"
