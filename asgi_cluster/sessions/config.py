"""Configuration of sessions: frozen, keyword-only, refused at construction when it makes no sense."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from asgi_cluster.arguments import Seconds, durations, expect, one_of, whole

__all__ = ["CacheConfig", "CookieConfig", "SessionConfig"]

_LONGEST_SERVICE = 240.0
"""Seconds. A node that stopped writing is registered for five minutes at least (``registry.BEAT_TTL``), and
must not be able to serve anything for longer than that.
"""

_COOKIE_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 6265 section 4.1.1: an RFC 7230 token


@dataclass(frozen=True, kw_only=True, slots=True)
class CookieConfig:
    """How the session cookie is written (RFC 6265bis). It is always ``HttpOnly``."""

    name: str = "session"
    """The cookie's name, without prefix. With ``secure``, no ``domain`` and ``path="/"`` it goes out as
    ``__Host-<name>``.
    """
    secure: bool = True
    """Send over https only. Browsers make an exception for localhost; other clients do not."""
    same_site: Literal["lax", "strict", "none"] = "lax"
    """``none`` needs ``secure``."""
    domain: str | None = None
    """``None``: this host alone. A domain shares the session with its subdomains and drops the ``__Host-``
    prefix.
    """
    path: str = "/"
    """The cookie's path. Anything but ``/`` drops the ``__Host-`` prefix."""
    partitioned: bool = False
    """CHIPS: one cookie jar per top-level site. Needs ``secure``."""
    max_age: Seconds[float | None] = Seconds(None)
    """Seconds, or a ``timedelta``, for which the browser keeps the cookie, and at most until the session's
    ``absolute_timeout``. ``None``: until the browser is closed. The session itself ends by its own timeouts,
    which are shorter by default. ``login(lifetime=…)`` sets its own.
    """
    rolling: bool = False
    """Whether a cookie with a ``max_age`` or ``lifetime`` is sent again, for its whole time, while the
    session is used: about once per tenth of the idle time, and by a response whose request used the session.
    Needs a ``max_age`` of at least ``idle_timeout``. The ``lifetime`` of a login then counts from its last
    use, for a year at most. A renewal that a newer login overtakes on the way to the browser replaces its
    cookie.
    """

    def __post_init__(self) -> None:
        expect("name", self.name, str)
        expect("path", self.path, str)
        expect("domain", self.domain, str, None)
        expect("secure", self.secure, bool)
        expect("partitioned", self.partitioned, bool)
        expect("rolling", self.rolling, bool)
        if self.max_age is not None:
            durations(self, "max_age")
        if not _COOKIE_NAME.fullmatch(self.name):
            raise ValueError(f"cookie name must be an RFC 6265 token, not {self.name!r}")
        if self.name.startswith(("__Host-", "__Secure-")):
            raise ValueError(
                "cookie name must not carry a __Host- or __Secure- prefix: it is added when it applies"
            )
        one_of("same_site", self.same_site, ("lax", "strict", "none"))
        if not self.path.startswith("/") or any(c in self.path for c in ";\r\n"):
            raise ValueError(f"cookie path must start with '/' and hold no ';', not {self.path!r}")
        if self.domain is not None and not re.fullmatch(r"\.?[A-Za-z0-9.-]+", self.domain):
            raise ValueError(f"cookie domain must be a host name, not {self.domain!r}")
        if not self.secure and self.same_site == "none":
            raise ValueError('same_site="none" needs secure=True: browsers refuse the cookie otherwise')
        if not self.secure and self.partitioned:
            raise ValueError("partitioned=True needs secure=True: browsers refuse the cookie otherwise")

    @property
    def wire_name(self) -> str:
        """The name the browser sees."""
        if self.secure and self.domain is None and self.path == "/":
            return f"__Host-{self.name}"
        return self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The node's local session cache. Durations are seconds or a ``timedelta``."""

    ttl: Seconds[float] = Seconds(30.0)
    """Seconds an entry may be served without a new read from Redis, also when no invalidation arrives."""
    max_entries: int = 10_000
    """Sessions kept; the least recently used go first. 0 turns the cache off."""
    lease: Seconds[float] = Seconds(2.0)
    """Seconds: no cached read is older than this with respect to changes made through this library.

    Above 4 s it also delays the moment at which a crashed node is taken off the registry: until then logouts
    count on its answer, and its members are listed as present.
    """

    def __post_init__(self) -> None:
        durations(self, "ttl", "lease")
        whole("max_entries", self.max_entries, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Server-side sessions. Durations are seconds or a ``timedelta``."""

    scope_key: str | None = "session"
    """The scope key the app finds its session under. ``None`` leaves that key alone (Django); use
    ``get_session``.
    """
    idle_timeout: Seconds[float] = Seconds(7200.0)
    """Seconds without a request after which a session ends."""
    absolute_timeout: Seconds[float] = Seconds(43200.0)
    """Seconds after which a session ends however busy it is; ``login(lifetime=…)`` sets both for one."""
    rotate_grace: Seconds[float] = Seconds(10.0)
    """Seconds for which the old secret is still good after ``rotate()``, for requests already under way."""
    conflict: Literal["merge", "error"] = "merge"
    """Parallel requests: ``merge`` their changes key by key, or ``error``: raise ``SessionConflict`` for the
    later one.
    """
    on_store_error: Literal["unavailable", "anonymous", "stale"] = "unavailable"
    """A session that cannot be read: 503 at first access, an empty session, or the last cached state up to
    ``stale_for``.
    """
    stale_for: Seconds[float] = Seconds(60.0)
    """Seconds after its last confirmed read for which ``on_store_error="stale"`` serves an entry.

    A node that is cut off from the store may serve an ended session for as long. So a logout that such a node
    did not acknowledge is complete only after this time, and a crashed node stays on the registry for
    ``cache.lease`` + ``stale_for``. The two together are at most 240 s.
    """
    wait_replicas: int = 0
    """Above 0: after a logout find out (``WAIT``, for a few milliseconds) how many replicas have it, up to
    this many; ``LogoutReceipt.replicas`` says so. A logout that none has can be lost with the primary.
    """
    max_bytes: int = 65_536
    """Bytes one session may hold, encoded; more is a ``ValueError`` at save."""
    cookie: CookieConfig = field(default_factory=CookieConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        cure = ": write CookieConfig(name=…)" if isinstance(self.cookie, str) else ""
        expect("cookie", self.cookie, CookieConfig, cure=cure)
        expect("cache", self.cache, CacheConfig)
        expect("scope_key", self.scope_key, str, None)
        durations(self, "idle_timeout", "absolute_timeout", "stale_for")
        durations(self, "rotate_grace", least=0)
        whole("max_bytes", self.max_bytes, 1)
        whole("wait_replicas", self.wait_replicas, 0)
        if self.idle_timeout > self.absolute_timeout:
            raise ValueError("idle_timeout must not be longer than absolute_timeout")
        serving = self.cache.lease + self._stale_for
        if serving > _LONGEST_SERVICE:
            raise ValueError(
                f"cache.lease and, with on_store_error='stale', stale_for are together at most "
                f"{_LONGEST_SERVICE:g} s, not {serving:g}: a node that is cut off may serve a session "
                "that has ended for as long"
            )
        max_age = self.cookie.max_age
        if self.cookie.rolling and max_age is not None and max_age < self.idle_timeout:
            raise ValueError(
                "max_age must not be shorter than idle_timeout when rolling: the cookie would end first"
            )
        if self.scope_key is not None and (not self.scope_key or self.scope_key == "asgi_cluster"):
            raise ValueError(f"scope_key must be a name of its own, or None, not {self.scope_key!r}")
        one_of("conflict", self.conflict, ("merge", "error"))
        one_of("on_store_error", self.on_store_error, ("unavailable", "anonymous", "stale"))

    @property
    def _stale_for(self) -> float:
        return self.stale_for if self.on_store_error == "stale" else 0.0

    @property
    def serves_for(self) -> float:
        """Seconds for which a node so configured may go on serving a session whose end it has not
        received.
        """
        return max(self.cache.lease, self._stale_for)
