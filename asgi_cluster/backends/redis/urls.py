"""From a URL to servers, refused at construction when it cannot work, and never with a password in the
message.

    redis://[user:password@]host[:6379][/db]            rediss:// the same with TLS
    unix://[user:password@]/path/to/socket[?db=0]
    redis+sentinel://[user:password@]host[:26379][,host…]/service[/db][?sentinel_username=…&sentinel_password=…]
    redis+cluster://[user:password@]host[:6379][,host…]

with ``rediss+…`` for TLS, and the options ``socket_connect_timeout`` (seconds), ``client_name`` and
redis-py's ``ssl_…``.
"""

from __future__ import annotations

from dataclasses import dataclass
from ssl import SSLContext
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlencode

from asgi_cluster.backends.redis.address import Address

__all__ = ["Target", "parse_target", "parse_targets"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a cluster URL means."""

    kind: Literal["single", "sentinel", "cluster"]
    addresses: tuple[Address, ...]
    """The server; the sentinels; or some of the Cluster's nodes."""
    primary: Address
    """How to connect to a primary, once its address has been found; for ``single`` the address itself."""
    service: str = ""
    """What the sentinels call the primary."""

    @property
    def db(self) -> int:
        """The database number."""
        return self.primary.db


def parse_targets(
    url: str, rooms_url: str | None, *, ssl_context: SSLContext | None = None, credential_provider: Any = None
) -> tuple[Target, Target | None]:
    """The servers of ``url`` and, if it is given, of ``rooms_url``.

    ``ssl_context`` is for those that are reached over TLS, ``credential_provider`` for those whose URL has no
    user or password.

    Raises:
        ValueError: one of them cannot work, or an argument would have no effect at all.
    """
    if rooms_url is None:
        return parse_target(url, ssl_context=ssl_context, credential_provider=credential_provider), None
    secured = [each for each in (url, rooms_url) if each.startswith("rediss")]
    if ssl_context is not None and not secured:
        raise ValueError("ssl_context goes with rediss://, and neither the URL nor rooms_url starts with it")
    open_to = [each for each in (url, rooms_url) if not _has_credentials(each)]
    if credential_provider is not None and not open_to:
        raise ValueError(
            "give user and password in the URLs, or a credential_provider, not both: "
            "the URL and rooms_url have their own"
        )
    first, second = (
        parse_target(
            each,
            ssl_context=ssl_context if each in secured else None,
            credential_provider=credential_provider if each in open_to else None,
        )
        for each in (url, rooms_url)
    )
    return first, second


def _has_credentials(url: str) -> bool:
    authority, _, query = url.partition("://")[2].partition("?")
    named = {key for key, _ in parse_qsl(query, keep_blank_values=True)}
    return "@" in authority.partition("/")[0] or not named.isdisjoint(("username", "password"))


def parse_target(
    url: str, *, ssl_context: SSLContext | None = None, credential_provider: Any = None
) -> Target:
    """The servers that ``url`` names.

    Raises:
        ValueError: it cannot work; says what is wrong.
    """
    scheme, separator, rest = url.partition("://")
    if "+" not in scheme or not separator:
        address = Address(url, ssl_context=ssl_context, credential_provider=credential_provider)
        return Target(kind="single", addresses=(address,), primary=address)
    plain, _, kind = scheme.partition("+")
    if kind not in ("sentinel", "cluster") or plain not in ("redis", "rediss"):
        raise ValueError(f"unknown scheme {scheme!r}")
    rest, _, fragment = rest.partition("#")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    names = hosts.split(",")
    if fragment or not all(names):
        raise ValueError(f"a {scheme} URL lists its servers: {scheme}://host:port,host:port")
    options = parse_qsl(query, keep_blank_values=True)
    of_sentinels = {key: value for key, value in options if key.startswith("sentinel_")}
    others = urlencode([(key, value) for key, value in options if not key.startswith("sentinel_")])
    tail = f"?{others}" if others else ""
    segments = [unquote(segment) for segment in path.split("/") if segment]

    def one(host: str, before: str, db: str = "", **more: Any) -> Address:
        return Address(f"{plain}://{before}{host}/{db}{tail}", ssl_context=ssl_context, **more)

    if kind == "cluster":
        if segments not in ([], ["0"]) or of_sentinels:
            raise ValueError("a Redis Cluster has database 0 only: redis+cluster://host:port,host:port")
        seeds = tuple(one(host, credentials + at, credential_provider=credential_provider) for host in names)
        return Target(kind="cluster", addresses=seeds, primary=seeds[0])
    if not 1 <= len(segments) <= 2 or (len(segments) == 2 and not segments[1].isdigit()):
        raise ValueError(
            "a Sentinel URL names the service: redis+sentinel://host:26379,host:26379/mymaster/0"
        )
    unknown = set(of_sentinels) - {"sentinel_username", "sentinel_password"}
    if unknown:
        raise ValueError(f"a Sentinel URL does not take the option {min(unknown)!r}")
    sentinels = []
    for name in names:
        # An address without a port is on the sentinels' default port; IPv6 is in brackets, as in any URL.
        sentinel = one(name if name.rpartition("]")[2].count(":") else f"{name}:26379", "")
        own = {key.removeprefix("sentinel_"): value for key, value in of_sentinels.items()}
        sentinels.append(sentinel.replaced(db=0, **own))
    primary = one(
        names[0],
        credentials + at,
        segments[1] if len(segments) == 2 else "",
        credential_provider=credential_provider,
    )
    return Target(kind="sentinel", addresses=tuple(sentinels), primary=primary, service=segments[0])
