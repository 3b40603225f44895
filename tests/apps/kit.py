"""The same small app, written once per framework, and what the tests need to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from asgi_cluster import Cluster, CookieConfig, RealtimeConfig, SessionConfig

CHUNKS = ["one ", "two ", "three"]


@dataclass
class Seen:
    """What happened inside the app: the code its own socket was closed with, and background work done."""

    closes: list[int] = field(default_factory=list)
    background: list[str | None] = field(default_factory=list)


MakeApp = Callable[[Cluster, Seen], Any]
"""Gives the bare app. Its routes:

``POST /login?user=``, ``/logout``, ``/visit`` (counts in the session, by the framework's own way to it),
``/clear``; ``GET /me``, ``/quiet`` (touches nothing), ``/stream`` (counts, then streams), ``/background``
(works after the response); WebSockets ``/plain`` (knows nothing of us, echoes) and ``/room``
(``cluster.accept``, in the room ``lobby``).
"""


def make_cluster(url: str, prefix: str, *, scope_key: str | None = "session", **realtime: Any) -> Cluster:
    """Cookies that pass over http, as real servers speak it here."""
    return Cluster(
        url,
        prefix=prefix,
        sessions=SessionConfig(scope_key=scope_key, cookie=CookieConfig(secure=False)),
        realtime=RealtimeConfig(**realtime),
    )
