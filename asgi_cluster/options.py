"""The arguments of ``Cluster``, checked."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any

from asgi_cluster.arguments import expect, expect_callable
from asgi_cluster.config import RealtimeConfig
from asgi_cluster.sessions.config import CacheConfig, CookieConfig, SessionConfig

__all__ = ["Identify", "Options"]

Identify = Callable[[Mapping[str, Any]], str | Awaitable[str | None] | None]
"""Names the user of a socket from its ASGI scope; see ``Cluster``."""

_WRAPPED: Mapping[type, str] = {
    CookieConfig: ": write SessionConfig(cookie=CookieConfig(…))",
    CacheConfig: ": write SessionConfig(cache=CacheConfig(…))",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What ``Cluster`` was given, as described there; ``deadline`` in seconds, and no config is ``None``."""

    url: str | None
    prefix: str
    node_label: str | None
    listen: bool
    deadline: float
    rooms_url: str | None
    identify: Identify | None
    sessions: SessionConfig
    realtime: RealtimeConfig
    ssl_context: SSLContext | None
    credential_provider: Any

    def __post_init__(self) -> None:
        expect("url", self.url, str, None)
        if self.url == "":
            raise ValueError(
                "url is an empty string: give a URL, or None for the environment variable ASGI_CLUSTER_URL "
                "or memory://"
            )
        expect("prefix", self.prefix, str)
        expect("node_label", self.node_label, str, None)
        expect("listen", self.listen, bool)
        expect("rooms_url", self.rooms_url, str, None)
        expect_callable("identify", self.identify)
        cure = _WRAPPED.get(type(self.sessions), "")
        expect("sessions", self.sessions, SessionConfig, None, cure=cure)
        expect("realtime", self.realtime, RealtimeConfig, None)
        lease = self.sessions.cache.lease
        if not 0 < self.deadline <= lease:
            raise ValueError(
                f"deadline must be above 0, at most the lease {lease:g}, not {self.deadline!r}: "
                "a write whose outcome is unknown has to be settled before the cache may be used again"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", self.prefix):
            raise ValueError(f"prefix must be 1 to 64 of A-Z a-z 0-9 _ . : -, not {self.prefix!r}")
        if self.node_label is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.node_label):
            raise ValueError(f"node_label must be 1 to 64 of A-Z a-z 0-9 _ . -, not {self.node_label!r}")
