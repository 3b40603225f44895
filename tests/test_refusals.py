"""Values of the right type that cannot be meant are refused at once. And what objects show of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asgi_cluster import (
    Cluster,
    NotPermitted,
    Position,
    RealtimeConfig,
    SessionConfig,
    SessionConflict,
    TokenExpired,
)
from asgi_cluster.ids import bucket_of

pytestmark = pytest.mark.quick

OTHERS = f"{(bucket_of('ada') + 1) % 256:02x}.{'x' * 22}"
"""A handle that cannot be one of ada's."""


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: Cluster("ftp://h"),
            "unknown scheme 'ftp': a cluster URL starts with one of memory://, redis://",
        ),
        (lambda: Cluster("memory://", rooms_url="redis://h"), "rooms_url, .* mean nothing to memory://"),
        (lambda: Cluster("memory://", prefix="a b"), "prefix must be 1 to 64 of A-Z a-z 0-9"),
        (lambda: Cluster("memory://", node_label="a b"), "node_label must be 1 to 64 of A-Z a-z 0-9"),
        (lambda: Cluster("memory://", deadline=0), "deadline must be above 0"),
        (lambda: Cluster("memory://", deadline=60), "deadline must be above 0, at most the lease"),
        (lambda: RealtimeConfig(path="live"), "path must start with '/'"),
        (lambda: RealtimeConfig(path="/live/"), "path must start with '/' and not end with one"),
        (
            lambda: RealtimeConfig(ping_interval=5, pong_timeout=5),
            "must be shorter than ping_interval",
        ),
        (lambda: RealtimeConfig(allowed_origins=["a.example"]), r"an origin is scheme://host\[:port\]"),
        (
            lambda: RealtimeConfig(max_commands_per_second=0),
            "max_commands_per_second must be a number above 0",
        ),
        (lambda: SessionConfig(conflict="ask"), "conflict must be"),  # type: ignore[arg-type]
        (lambda: NotPermitted(code=4000), r"code must be None \(error 103\) or 3500"),
        (lambda: Cluster("memory://").session("no handle"), "not a session handle: 'no handle'"),
        (lambda: Cluster("memory://").user("ada").session(OTHERS), "is no session of this user"),
    ],
)
def test_value_that_cannot_be_meant(make: Callable[[], Any], told: str) -> None:
    """The error says what would do."""
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda cluster: cluster.drain(-1), "seconds must be at least 0"),
        (lambda cluster: cluster.user("ada").disconnect(code=1000), "a close code is 3000 to 4999, not 1000"),
        (lambda cluster: cluster.room("r").history(limit=-1), "limit must be at least 0, or None, not -1"),
        (lambda cluster: cluster.room("r").history(since=Position(-1, "e")), "-1"),
    ],
)
async def test_value_that_cannot_be_meant_in_a_call(call: Callable[[Cluster], Any], told: str) -> None:
    """The same for what is awaited: nothing was sent."""
    with pytest.raises(ValueError, match=told):
        await call(Cluster("memory://"))


def test_number_that_is_none() -> None:
    """A limit per second takes fractions, and nothing but numbers."""
    wrong: Any = "many"
    with pytest.raises(TypeError, match="max_commands_per_second must be a number, not a str"):
        RealtimeConfig(max_commands_per_second=wrong)
    assert RealtimeConfig(max_commands_per_second=0.5).max_commands_per_second == 0.5


def test_objects_show_what_they_stand_for() -> None:
    """In logs and debuggers: the name, and nothing that is secret."""
    cluster = Cluster("memory://")
    assert repr(cluster.user("ada")) == "<RemoteUser 'ada'>"
    assert repr(cluster.session(OTHERS)) == f"<RemoteSession {OTHERS}>"
    assert repr(cluster.room("news")) == "<Room 'news'>"


def test_errors_say_what_happened() -> None:
    """As text, for logs and for clients."""
    assert (
        str(SessionConflict(OTHERS))
        == f"session {OTHERS} was changed by another request since this one read it"
    )
    assert str(NotPermitted("members only")) == "members only"
    assert str(TokenExpired()) == "the token has expired"


async def test_message_to_a_session_without_sockets() -> None:
    """It reaches nobody and is no error: a socket that is not connected misses it."""
    cluster = Cluster("memory://")
    await cluster.session(OTHERS).send({"role": "editor"})
    await cluster.user("ada").send("hello")
    await cluster.user("ada").disconnect()
    await cluster.room("news").disconnect(user="ada")
    assert cluster.stats().realtime.sent == 0
