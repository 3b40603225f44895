"""Which pages may open a WebSocket here: ``Origin`` against the host that the browser connected to."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

__all__ = ["Origins"]

logger = logging.getLogger("asgi_cluster.realtime")

_ALLOW_ORIGIN = b"access-control-allow-origin"
_REMEMBERED = 100  # the latest origins that were logged
_LINES = 20  # log lines at once
_SECONDS_PER_LINE = 3.0  # after those
_LONGEST = 200  # characters of a header in a log line
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_FORWARDED_HOST = re.compile(r'(?:^|[;,])\s*host\s*=\s*(?:"([^"]*)"|([^\s;,"]*))', re.IGNORECASE)


class Origins:
    """The rule for one cluster object: ``RealtimeConfig.allowed_origins``, or the host of the request.

    Browsers send ``Origin`` with every WebSocket, and pages cannot change it. Other clients send none, and no
    page can make them send a cookie (RFC 6455 section 10.2). A page cannot set ``Host``, ``X-Forwarded-Host``
    or ``Forwarded`` on a WebSocket either, so each of them may name the host.
    """

    def __init__(self, allowed: Sequence[str] | None, *, clock: Callable[[], float] = monotonic) -> None:
        self._allowed = None if allowed is None else frozenset(origin.lower() for origin in allowed)
        self._clock = clock
        self._logged: OrderedDict[str, None] = OrderedDict()
        self._lines = float(_LINES)
        self._counted_at = clock()
        self._suppressed = 0

    def permit(self, scope: Mapping[str, Any]) -> bool:
        """Whether the handshake in ``scope`` may go on. A refusal is logged, once for each origin
        while that is one of the last 100; 20 lines at once, then one every 3 seconds at most.
        """
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            if (name := name.lower()) in (b"origin", b"host", b"x-forwarded-host", b"forwarded"):
                headers.setdefault(name, []).append(value.decode("latin-1"))
        for origin in headers.get(b"origin", ()):
            if not self._allows(origin.lower(), headers):
                self._log(origin, headers)
                return False
        return True

    def cors(self, scope: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
        """Headers that let a page of ``allowed_origins`` read an answer of the middleware (Fetch standard,
        "CORS protocol"). Empty where nothing was configured.
        """
        if self._allowed is None:
            return []
        origin = next((value for name, value in scope["headers"] if name.lower() == b"origin"), None)
        headers = [(b"vary", b"Origin")]
        if origin is not None and origin.decode("latin-1").lower() in self._allowed:
            headers += [(_ALLOW_ORIGIN, origin), (b"access-control-allow-credentials", b"true")]
        elif "*" in self._allowed:
            headers += [(_ALLOW_ORIGIN, b"*")]
        return headers

    def _allows(self, origin: str, headers: Mapping[bytes, Iterable[str]]) -> bool:
        if self._allowed is not None:
            return origin in self._allowed or "*" in self._allowed
        # The scheme is not compared: behind a TLS proxy the scheme in the ASGI scope may be the proxy's.
        scheme, separator, rest = origin.partition("://")
        host, port = _split(rest)
        if not separator or not host:
            return False
        # A proxy's "Host $host" drops the port. Without one any port of the same host is allowed: a cookie
        # is sent to every port of its host, too.
        ports = (None, port or _DEFAULT_PORTS.get(scheme))
        return any(name == host and at in ports for name, at in map(_split, _hosts(headers)))

    def _log(self, origin: str, headers: Mapping[bytes, Sequence[str]]) -> None:
        if origin in self._logged:
            self._logged.move_to_end(origin)
            return
        now = self._clock()
        self._lines = min(_LINES, self._lines + (now - self._counted_at) / _SECONDS_PER_LINE)
        self._counted_at = now
        if self._lines < 1:
            self._suppressed += 1  # not noted: the next refusal of this origin may be logged
            return
        self._lines -= 1
        self._logged[origin] = None
        if len(self._logged) > _REMEMBERED:
            self._logged.popitem(last=False)
        suppressed, self._suppressed = self._suppressed, 0
        more = f". {suppressed} refusals before this one were not logged" if suppressed else ""
        if self._allowed is not None:
            logger.warning(
                "refused a WebSocket of the origin %s with 403: RealtimeConfig.allowed_origins allows %s%s",
                _shown([origin]),
                ", ".join(sorted(self._allowed)) or "none",
                more,
            )
            return
        logger.warning(
            "refused a WebSocket of the origin %s with 403: the request is for Host %s, X-Forwarded-Host %s, "
            "Forwarded %s. If that page is yours, let the proxy pass the browser's Host on "
            "(nginx: proxy_set_header Host $http_host), or name the origin in "
            "RealtimeConfig(allowed_origins=[…])%s",
            _shown([origin]),
            *(_shown(headers.get(name)) for name in (b"host", b"x-forwarded-host", b"forwarded")),
            more,
        )


def _hosts(headers: Mapping[bytes, Iterable[str]]) -> Iterator[str]:
    """Every host that the request was sent to, as the browser or a proxy wrote it."""
    yield from headers.get(b"host", ())
    for value in headers.get(b"x-forwarded-host", ()):
        yield from value.split(",")
    for value in headers.get(b"forwarded", ()):
        for quoted, token in _FORWARDED_HOST.findall(value):  # RFC 7239 section 4
            yield quoted or token


def _split(authority: str) -> tuple[str, str | None]:
    host, separator, port = authority.strip().lower().rpartition(":")
    if not separator or port.endswith("]"):  # an IPv6 address without a port
        return authority.strip().lower(), None
    return host, port


def _shown(values: Sequence[str] | None) -> str:
    return "(none)" if not values else repr(", ".join(values)[:_LONGEST])
