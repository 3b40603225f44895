"""The session cookie: ``<bucket>.<token>.<secret>``, where ``<bucket>.<token>`` is the public handle (RFC
6265bis).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from asgi_cluster.config import CookieConfig
from asgi_cluster.ids import Handle

__all__ = ["Cookie"]

_CREDENTIALS = rb"([0-9a-f]{2}\.[A-Za-z0-9_-]{22})\.([A-Za-z0-9_-]{43})"


class Cookie:
    """Reads the session cookie from request headers and writes it into response headers."""

    __slots__ = ("_attributes", "_find", "_name", "secure")

    def __init__(self, config: CookieConfig) -> None:
        self._name = config.wire_name
        # Between separators: "xsession=…" must not pass for "session=…", nor a longer value for one of ours.
        name = re.escape(self._name.encode("latin-1"))
        self._find = re.compile(rb"(?:^|[; \t])" + name + b"=" + _CREDENTIALS + rb"(?=$|[; \t])").search
        self.secure = config.secure
        attributes = [f"Path={config.path}", "HttpOnly", f"SameSite={config.same_site.capitalize()}"]
        if config.secure:
            attributes.append("Secure")
        if config.domain is not None:
            attributes.append(f"Domain={config.domain}")
        if config.partitioned:
            attributes.append("Partitioned")
        self._attributes = "; ".join(attributes)

    def read(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[Handle, bytes] | None:
        """The handle and the secret that the request carries, or ``None``.

        Of several cookies of that name the first well-formed one counts; a malformed one is as good as none.
        """
        for key, value in headers:
            if key == b"cookie":
                found = self._find(value)
                if found is not None:
                    return Handle(found[1].decode()), found[2]
        return None

    def set(self, handle: str, secret: str, *, max_age: int | None) -> tuple[bytes, bytes]:
        """The ``Set-Cookie`` header for a session. ``max_age`` in seconds; ``None``: until the browser
        closes.
        """
        lifetime = "" if max_age is None else f"; Max-Age={max_age}"
        return b"set-cookie", f"{self._name}={handle}.{secret}{lifetime}; {self._attributes}".encode(
            "latin-1"
        )

    def clear(self) -> tuple[bytes, bytes]:
        """The ``Set-Cookie`` header that removes it."""
        expired = "Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT"
        return b"set-cookie", f'{self._name}=""; {expired}; {self._attributes}'.encode("latin-1")
