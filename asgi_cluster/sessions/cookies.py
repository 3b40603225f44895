"""The session cookie: ``<bucket>.<token>.<secret>``, where ``<bucket>.<token>`` is the public handle (RFC
6265bis).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from asgi_cluster.ids import Handle
from asgi_cluster.sessions.config import CookieConfig
from asgi_cluster.sessions.store import Record

__all__ = ["Cookie"]

_CREDENTIALS = rb"([0-9a-f]{2}\.[A-Za-z0-9_-]{22})\.([A-Za-z0-9_-]{43})"

_MOST = 4
"""Cookies of the session's name that one request may have looked up: more are invented, and each may cost a
read.
"""

Headers = Iterable[tuple[bytes, bytes]]
Credentials = tuple[Handle, bytes]


class Cookie:
    """Reads the session cookie from request headers and writes it into response headers."""

    __slots__ = ("_attributes", "_find", "_find_all", "_max_age", "_name", "secure")

    def __init__(self, config: CookieConfig) -> None:
        self._name = config.wire_name
        # Only ";" separates cookies (RFC 6265 section 5.4). A browser lets a sibling subdomain set a cookie
        # whose value holds a blank, the session's name and a well-formed value: that is no session cookie.
        # No blank either between name and "=": a browser guards the prefix of the exact name.
        name = re.escape(self._name.encode("latin-1"))
        pattern = re.compile(rb"(?:\A|;)[ \t]*" + name + rb"=" + _CREDENTIALS + rb"[ \t]*(?=;|\Z)")
        self._find = pattern.search
        self._find_all = pattern.finditer
        self._max_age = config.max_age
        self.secure = config.secure
        attributes = [f"Path={config.path}", "HttpOnly", f"SameSite={config.same_site.capitalize()}"]
        if config.secure:
            attributes.append("Secure")
        if config.domain is not None:
            attributes.append(f"Domain={config.domain}")
        if config.partitioned:
            attributes.append("Partitioned")
        self._attributes = "; ".join(attributes)

    def read(self, headers: Headers) -> Credentials | None:
        """The handle and the secret that the request carries, or ``None``.

        Of several cookies of that name this is the first well-formed one; a malformed one is as good as none.
        """
        for key, value in headers:
            if key == b"cookie":
                found = self._find(value)
                if found is not None:
                    return Handle(found[1].decode()), found[2]
        return None

    def others(self, headers: Headers) -> Iterator[Credentials]:
        """What further well-formed cookies of that name hold, in the order of the header, at most three.

        For a request whose first one opens no session: it may be outdated, or planted by a sibling subdomain
        with a longer path, which a browser sends first.
        """
        found = (match for key, value in headers if key == b"cookie" for match in self._find_all(value))
        return ((Handle(match[1].decode()), match[2]) for match in islice(found, 1, _MOST))

    def max_age(self, record: Record) -> int | None:
        """Of the cookie of this session, in seconds; ``None``: until the browser closes."""
        if record.persistent:
            return int(min(record.idle, record.absolute_in))
        return None if self._max_age is None else int(min(self._max_age, record.absolute_in))

    def set(self, record: Record, secret: str) -> tuple[bytes, bytes]:
        """The ``Set-Cookie`` header for a session."""
        max_age = self.max_age(record)
        lifetime = "" if max_age is None else f"; Max-Age={max_age}"
        return b"set-cookie", f"{self._name}={record.handle}.{secret}{lifetime}; {self._attributes}".encode(
            "latin-1"
        )

    def clear(self) -> tuple[bytes, bytes]:
        """The ``Set-Cookie`` header that removes it."""
        expired = "Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT"
        return b"set-cookie", f'{self._name}=""; {expired}; {self._attributes}'.encode("latin-1")
