"""From a URL to connections, refused at construction when it cannot work, and never with a password in the message."""

from __future__ import annotations

from ssl import SSLContext
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

__all__ = ["Address"]


class Address:
    """How to connect to one server."""

    def __init__(
        self, url: str, *, ssl_context: SSLContext | None = None, credential_provider: Any = None
    ) -> None:
        try:
            options: dict[str, Any] = dict(parse_url(url))
            host = urlsplit(url).hostname
        except ValueError as error:
            # redis-py and urllib name the offending part, never the credentials.
            raise ValueError(f"not a Redis URL: {error}") from None
        self._class: type[AbstractConnection] = options.pop("connection_class", Connection)
        if self._class is not UnixDomainSocketConnection and not host:
            raise ValueError("a Redis URL needs a host: redis://host:6379/0")
        self.db = int(options.pop("db", 0) or 0)
        path = urlsplit(url).path.strip("/")
        if self._class is not UnixDomainSocketConnection and path and not path.isdigit():
            raise ValueError(f"the path of a Redis URL is a database number, not {path!r}")
        self._options = {**options, "db": self.db}
        if self._class is UnixDomainSocketConnection:
            self.name = f"unix socket {options.get('path')}"
        else:
            self._options.setdefault("port", 6379)
            self.name = f"{options['host']}:{self._options['port']}"
        if ssl_context is not None:
            if self._class is not SSLConnection:
                raise ValueError("ssl_context goes with rediss://")
            self._options["ssl_context"] = ssl_context
        if credential_provider is not None:
            if "password" in options or "username" in options:
                raise ValueError("give user and password in the URL, or a credential_provider, not both")
            self._options["credential_provider"] = credential_provider
        try:
            self.connection()
        except TypeError as error:
            raise ValueError(f"unknown option in a Redis URL: {error}") from None

    def connection(self) -> AbstractConnection:
        """A connection that is not open yet: RESP3, no retries, no timeouts of its own."""
        return self._class(
            **{
                **self._options,
                "protocol": 3,
                "socket_timeout": None,
                "socket_keepalive": True,
                "retry": Retry(NoBackoff(), 0),
                "decode_responses": False,
                "maint_notifications_config": MaintNotificationsConfig(enabled=False),
            }
        )

    def __repr__(self) -> str:
        return f"<Address {self.name}/{self.db}>"
