"""From a URL to a backend."""

from __future__ import annotations

from ssl import SSLContext
from typing import Any
from urllib.parse import urlsplit

from asgi_cluster.backends.memory.backend import MemoryBackend
from asgi_cluster.backends.port import Backend
from asgi_cluster.backends.redis.backend import RedisBackend

__all__ = ["open_backend"]

_REDIS = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


def open_backend(
    url: str,
    *,
    prefix: str,
    lease_duration: float,
    rooms_url: str | None,
    ssl_context: SSLContext | None,
    credential_provider: Any,
    wait_replicas: int = 0,
    stale_for: float = 0.0,
) -> Backend:
    """The backend for ``url``; connects to nothing yet.

    Raises:
        ValueError: no such scheme, or an option that this backend does not have.
    """
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        if rooms_url is not None or ssl_context is not None or credential_provider is not None:
            raise ValueError("rooms_url, ssl_context and credential_provider mean nothing to memory://")
        return MemoryBackend(urlsplit(url).netloc or None, lease_duration=lease_duration)
    if scheme not in _REDIS:
        known = ", ".join(f"{name}://" for name in ("memory", *_REDIS))
        raise ValueError(f"unknown scheme {scheme!r}: a cluster URL starts with one of {known}")
    rooms_scheme = scheme if rooms_url is None else urlsplit(rooms_url).scheme
    if rooms_scheme not in _REDIS:
        known = ", ".join(f"{name}://" for name in _REDIS)
        raise ValueError(
            f"rooms_url has the scheme {rooms_scheme!r}, and must be on Redis as the URL is: it starts with "
            f"one of {known}; None: the rooms are on the same server"
        )
    return RedisBackend(
        url,
        prefix=prefix,
        lease_duration=lease_duration,
        stale_for=stale_for,
        rooms_url=rooms_url,
        ssl_context=ssl_context,
        credential_provider=credential_provider,
        wait_replicas=wait_replicas,
    )
