"""What the public calls accept, and what they say of what they do not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from litestar import Litestar, Request, post
from litestar.exceptions import LitestarException
from starlette.applications import Starlette
from starlette.testclient import TestClient

import asgi_cluster
from asgi_cluster import (
    CacheConfig,
    Cluster,
    ClusterMiddleware,
    Connected,
    CookieConfig,
    RealtimeConfig,
    RoomRule,
    SessionConfig,
    get_session,
)
from asgi_cluster.ids import UserId, bucket_of
from tests.sessions.app import client_for

pytestmark = pytest.mark.quick

api: Any = asgi_cluster
"""Without its types: what is called with wrong arguments below is so on purpose."""

# Configuration


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: api.Cluster(sessions=CookieConfig()), r"SessionConfig\(cookie=CookieConfig\(…\)\)"),
        (lambda: api.Cluster(sessions=CacheConfig()), r"SessionConfig\(cache=CacheConfig\(…\)\)"),
        (
            lambda: api.Cluster(sessions=SessionConfig),
            "SessionConfig or None, not the class itself",
        ),
        (
            lambda: api.Cluster(sessions={"idle_timeout": 5}),
            "SessionConfig or None, not a dict",
        ),
        (lambda: api.Cluster(realtime=SessionConfig()), "realtime must be a RealtimeConfig or None"),
        (
            lambda: api.Cluster(sessions=RealtimeConfig()),
            "sessions must be a SessionConfig or None",
        ),
        (lambda: api.Cluster(5), "url must be a str"),
        (lambda: api.Cluster(prefix=b"x"), "prefix must be a str, not a bytes"),
        (lambda: api.Cluster(node_label=7), "node_label must be a str or None, not an int"),
        (lambda: api.Cluster(rooms_url=7), "rooms_url must be a str or None"),
        (lambda: api.Cluster(listen="no"), "listen must be a bool, not a str"),
        (lambda: api.Cluster(deadline="1"), "deadline must be a number of seconds or a timedelta, not a str"),
        (lambda: api.Cluster(identify="user"), "identify must be callable, not a str"),
        (lambda: api.SessionConfig(cookie=CacheConfig()), "cookie must be a CookieConfig, not a CacheConfig"),
        (lambda: api.SessionConfig(cookie="session"), r"CookieConfig\(name="),
        (lambda: api.SessionConfig(cache=CookieConfig()), "cache must be a CacheConfig, not a CookieConfig"),
        (lambda: api.SessionConfig(cache=30), "cache must be a CacheConfig, not an int"),
        (
            lambda: api.SessionConfig(idle_timeout="2h"),
            "idle_timeout must be a number of seconds or a timedelta",
        ),
        (lambda: api.SessionConfig(idle_timeout=True), "idle_timeout must be a number of seconds"),
        (lambda: api.SessionConfig(rotate_grace=None), "rotate_grace must be a number of seconds"),
        (lambda: api.SessionConfig(max_bytes="1k"), "max_bytes must be an int, not a str"),
        (lambda: api.SessionConfig(scope_key=5), "scope_key must be a str or None, not an int"),
        (lambda: api.SessionConfig(wait_replicas=1.5), "wait_replicas must be an int, not a float"),
        (lambda: api.CookieConfig(name=5), "name must be a str, not an int"),
        (lambda: api.CookieConfig(path=None), "path must be a str, not None"),
        (lambda: api.CookieConfig(domain=5), "domain must be a str or None, not an int"),
        (lambda: api.CookieConfig(secure="false"), "secure must be a bool, not a str"),
        (lambda: api.CookieConfig(partitioned=1), "partitioned must be a bool, not an int"),
        (lambda: api.CacheConfig(max_entries=1e3), "max_entries must be an int, not a float"),
        (lambda: api.CacheConfig(ttl="30"), "ttl must be a number of seconds or a timedelta"),
        (lambda: api.RealtimeConfig(path=b"/x"), "path must be a str or None, not a bytes"),
        (lambda: api.RealtimeConfig(connect="hook"), "connect must be callable, not a str"),
        (lambda: api.RealtimeConfig(on_message=5), "on_message must be callable, not an int"),
        (lambda: api.RealtimeConfig(rpc=print), r"rpc must be a Mapping, not a builtin_function_or_method"),
        (lambda: api.RealtimeConfig(rpc={"add": 5}), r"rpc\['add'\] must be callable, not an int"),
        (lambda: api.RealtimeConfig(allowed_origins="https://a.example"), "allowed_origins must be a list"),
        (lambda: api.RealtimeConfig(allowed_origins=[5]), "an origin must be a str, not an int"),
        (lambda: api.RealtimeConfig(outbox_bytes=None), "outbox_bytes must be an int, not None"),
        (lambda: api.RealtimeConfig(drain="10"), "drain must be a number of seconds or a timedelta"),
        (lambda: api.RealtimeConfig(outbox_bytes=1.5), "outbox_bytes must be an int, not a float"),
        (lambda: api.RealtimeConfig(max_rooms=1.5), "max_rooms must be an int, not a float"),
        (lambda: api.RealtimeConfig(max_connections_per_user=1.5), "max_connections_per_user must be an int"),
        (
            lambda: api.RealtimeConfig(max_connections_per_session=True),
            "max_connections_per_session must be an int",
        ),
        (
            lambda: api.ClusterMiddleware(Cluster(), Starlette()),
            r"cluster must be a Cluster, not a Starlette: write ClusterMiddleware\(app, cluster\)",
        ),
        (lambda: api.ClusterMiddleware(Starlette(), None), "cluster must be a Cluster, not None$"),
        (lambda: api.ClusterMiddleware(None, Cluster()), "app must be an ASGI application, not None"),
        (lambda: api.RoomRule(None), "pattern must be a str, not None"),
        (lambda: api.RoomRule("r", presence="no"), "room rule 'r': presence must be a bool, not a str"),
        (lambda: api.RoomRule("r", join_leave="x"), "room rule 'r': join_leave must be a bool, not a str"),
        (
            lambda: api.RoomRule("r", history_ttl="1h"),
            "history_ttl must be a number of seconds or a timedelta",
        ),
        (lambda: api.Connected(expires_in="1h"), "expires_in must be a number of seconds or a timedelta"),
        (lambda: api.get_session(42), "a request, a WebSocket or an ASGI scope, not an int: pass the object"),
        (lambda: api.get_session(None), "a request, a WebSocket or an ASGI scope, not None"),
    ],
)
def test_argument_of_the_wrong_type_is_named(make: Callable[[], Any], told: str) -> None:
    """The error names the argument, what it takes and what it got, and where it belongs if that is known."""
    with pytest.raises(TypeError, match=told):
        make()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: api.Cluster(""),
            "url is an empty string: .* None for the environment variable ASGI_CLUSTER_URL",
        ),
        (
            lambda: api.Cluster("redis://h", rooms_url="memory://"),
            "rooms_url has the scheme 'memory', and must be",
        ),
        (lambda: api.Cluster("redis://h", rooms_url=""), "rooms_url has the scheme ''"),
        (lambda: api.RoomRule("r", history="100"), "history must be a whole number of at least 0, not '100'"),
        (lambda: api.RoomRule("r", history=1.5), "history must be a whole number of at least 0, not 1.5"),
        (lambda: api.RoomRule("r", history=True), "history must be a whole number of at least 0, not True"),
        (lambda: api.RoomRule("r", history=-1), "history must be a whole number of at least 0, not -1"),
        (
            lambda: api.RoomRule("a\nb"),
            r"room rule 'a\\nb' can never match: a room name has no control characters",
        ),
        (lambda: api.RoomRule("a\x00{x}"), "a room name has no control characters"),
        (lambda: api.RealtimeConfig(max_rooms=0), "max_rooms must be a whole number of at least 1, not 0"),
    ],
)
def test_argument_that_makes_no_sense_is_named(make: Callable[[], Any], told: str) -> None:
    """The right type, and nothing that can work."""
    with pytest.raises(ValueError, match=told):
        make()


def test_publisher_without_a_url_is_warned_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With ``listen=False`` and no URL anywhere its logouts reach no node. A URL, or a node that listens, is
    no reason to warn.
    """
    monkeypatch.delenv("ASGI_CLUSTER_URL", raising=False)
    Cluster()
    Cluster("memory://", listen=False)
    Cluster("redis://h", listen=False)
    assert not caplog.records
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    Cluster(listen=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "reach no other process. Set ASGI_CLUSTER_URL" in record.message
    caplog.clear()
    monkeypatch.setenv("ASGI_CLUSTER_URL", "redis://h")
    Cluster(listen=False)
    assert not caplog.records


SECONDS = {
    SessionConfig: ("idle_timeout", "absolute_timeout", "rotate_grace", "stale_for"),
    CacheConfig: ("ttl", "lease"),
    CookieConfig: ("max_age",),
    RealtimeConfig: (
        "ping_interval", "pong_timeout", "connect_timeout", "unverified_limit", "close_timeout", "drain",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "name"), [(kind, name) for kind in SECONDS for name in SECONDS[kind]])
def test_duration_may_be_a_timedelta(config: Any, name: str) -> None:
    """Seconds and ``timedelta`` are the same configuration; what is read from it is seconds."""
    value = {"ping_interval": 90.0, "absolute_timeout": 90_000.0}.get(name, 3.5)
    made = config(**{name: timedelta(seconds=value)})
    assert getattr(made, name) == value
    assert isinstance(getattr(made, name), float)
    assert made == config(**{name: value})
    with pytest.raises(ValueError, match=name):
        config(**{name: timedelta(seconds=-1)})
    with pytest.raises(ValueError, match=name):
        config(**{name: float("nan")})


def test_every_duration_is_listed_above() -> None:
    """A field whose documentation starts with "Seconds" takes a ``timedelta``: its type says so."""
    for config in (SessionConfig, CacheConfig, RealtimeConfig, CookieConfig):
        typed = {field.name for field in fields(config) if "Seconds" in str(field.type)}
        assert typed == set(SECONDS.get(config, ())), config


def test_deadline_may_be_a_timedelta() -> None:
    """As the fields of the configuration."""
    assert Cluster("memory://", deadline=timedelta(milliseconds=500))._parts.node.deadline == 0.5
    with pytest.raises(ValueError, match="deadline must be above 0, at most the lease 2"):
        Cluster("memory://", deadline=timedelta(seconds=3))


async def test_timedelta_is_taken_where_a_call_takes_seconds(cluster_url: str, prefix: str) -> None:
    """As in the configuration."""
    hour = timedelta(hours=1)
    assert RoomRule("r", history_ttl=hour) == RoomRule("r", history_ttl=3600)
    assert RoomRule("r", history_ttl=hour).history_ttl == 3600
    assert RoomRule("r").history_ttl == 600
    assert Connected(expires_in=hour).expires_in == 3600
    assert Connected().expires_in is None
    receipts = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session(scope)
        await session.login("ada")
        receipts.append(await session.logout(timeout=timedelta(seconds=1)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with Cluster(cluster_url, prefix=prefix) as cluster, client_for(cluster, app) as client:
        await client.get("/")
        handle = f"{bucket_of(UserId('ada')):02x}.{'a' * 22}"
        receipts.append(await cluster.session(handle).logout(timeout=timedelta(seconds=1)))
        receipts.append(await cluster.user("ada").logout(timeout=timedelta(seconds=1)))
        assert [receipt.complete for receipt in receipts] == [True, True, True]
        await cluster.drain(timedelta(milliseconds=1))
        assert cluster.draining


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda cluster: cluster.user("ada").logout(timeout="1"), "timeout must be a number of seconds or a"),
        (lambda cluster: cluster.session(f"00.{'a' * 22}").logout(timeout="1"), "timeout must be a number"),
        (lambda cluster: cluster.drain("5"), "seconds must be a number of seconds or a timedelta, not a str"),
        (lambda cluster: cluster.user("ada").disconnect(code="a"), "code must be an int, not a str"),
        (lambda cluster: cluster.room("r").history(limit="5"), "limit must be an int or None, not a str"),
        (lambda cluster: cluster.room("r").history(limit=True), "limit must be an int or None, not a bool"),
        (lambda cluster: cluster.room("r").history(since=5), "since must be a Position or None, not an int"),
    ],
)
async def test_number_of_the_wrong_type_in_a_call_is_named(call: Callable[[Cluster], Any], told: str) -> None:
    """Before anything is done: the node does not drain, for example."""
    cluster = Cluster("memory://", realtime=RealtimeConfig(rules=[RoomRule("r", history=5)]))
    with pytest.raises(TypeError, match=told):
        await call(cluster)
    assert not cluster.draining


async def test_session_logout_with_a_timeout_of_the_wrong_type_ends_nothing() -> None:
    """The session is not lost to the mistake."""
    kept = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session(scope)
        await session.login("ada")
        with pytest.raises(TypeError, match="timeout must be a number of seconds or a timedelta, not a str"):
            await api.Session.logout(session, timeout="1")
        kept.append(session.user_id)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with client_for(Cluster("memory://"), app) as client:
        await client.get("/")
    assert kept == ["ada"]


# Users and handles


@pytest.mark.parametrize(
    ("user", "error", "told"),
    [
        (42, TypeError, r"user_id must be a str, not an int: convert it, str\(42\)"),
        (None, TypeError, "user_id must be a str, not None"),
        (b"ada", TypeError, "user_id must be a str, not a bytes"),
        ("", ValueError, "1 to 255 printable characters"),
        ("x" * 256, ValueError, "1 to 255 printable characters"),
        ("a\nb", ValueError, "1 to 255 printable characters"),
        ("\ud83d", ValueError, "1 to 255 printable characters"),
    ],
)
async def test_user_id_of_the_wrong_kind_is_refused_everywhere(
    user: Any, error: type[Exception], told: str
) -> None:
    """The same rule for whoever signs in and for whoever is looked for."""
    cluster: Any = Cluster("memory://")
    with pytest.raises(error, match=told):
        cluster.user(user)
    with pytest.raises(error, match=told):
        cluster.accept((), user_id=user) if user is not None else cluster.user(user)
    with pytest.raises(error, match=told):
        await cluster.room("r").disconnect(user=user) if user is not None else cluster.user(user)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await scope["session"].login(user)

    async with client_for(cluster, app) as client:
        with pytest.raises(error, match=told):
            await client.get("/")


def test_identify_that_returns_no_str_is_an_error() -> None:
    """A socket of a user that ``cluster.user`` could not name would miss that user's logout."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})

    client = TestClient(ClusterMiddleware(app, api.Cluster("memory://", identify=lambda scope: 42)))
    refused = pytest.RaisesExc(TypeError, match="user_id must be a str, not an int")
    with pytest.RaisesGroup(refused, allow_unwrapped=True), client.websocket_connect("/"):
        pass


@pytest.mark.parametrize("handle", [42, None, b"00.xxx"])
async def test_session_handle_of_the_wrong_type_is_named(handle: Any) -> None:
    """Not an ``AttributeError`` from inside."""
    cluster = Cluster("memory://")
    with pytest.raises(TypeError, match="a session handle is a str, not"):
        cluster.session(handle)
    with pytest.raises(TypeError, match="a session handle is a str, not"):
        cluster.user("ada").session(handle)
    if handle is not None:
        with pytest.raises(TypeError, match="a session handle is a str, not"):
            await cluster.user("ada").logout(exclude=handle)


@pytest.mark.parametrize(
    ("lifetime", "error"),
    [("1h", TypeError), (True, TypeError), (0, ValueError), (timedelta(-1), ValueError)],
)
async def test_lifetime_of_the_wrong_kind_is_refused(lifetime: Any, error: type[Exception]) -> None:
    """Before anything is stored."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await scope["session"].login("ada", lifetime=lifetime)

    async with client_for(Cluster("memory://"), app) as client:
        with pytest.raises(error, match="lifetime must be"):
            await client.get("/")


async def test_lifetime_may_be_a_timedelta(cluster_url: str, prefix: str) -> None:
    """It is the cookie's Max-Age and the session's life."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await get_session(scope).login("ada", lifetime=timedelta(days=30))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with Cluster(cluster_url, prefix=prefix) as cluster, client_for(cluster, app) as client:
        assert "; Max-Age=2592000;" in (await client.get("/")).headers["set-cookie"]
        (info,) = await cluster.user("ada").sessions()
        assert info.expires_at - info.created_at > timedelta(days=29)


# Values


@pytest.mark.parametrize("value", [datetime(2026, 1, 2), {"at": [datetime(2026, 1, 2)]}])
async def test_datetime_without_a_time_zone_is_refused_with_the_cure(value: Any) -> None:
    """msgpack has only moments, and a datetime without a time zone is none."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["session"]["seen"] = value

    async with client_for(Cluster("memory://"), app) as client:
        with pytest.raises(TypeError, match=r"session\['seen'\].*time zone.*datetime\.now\(UTC\)"):
            await client.get("/")


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 1, 2, tzinfo=UTC),
        datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=2))),
        [{"at": datetime(2026, 1, 2, tzinfo=UTC)}],
    ],
)
async def test_datetime_with_a_time_zone_comes_back_equal(value: Any) -> None:
    """The same moment, whatever the zone."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["session"].get("seen"))
        scope["session"]["seen"] = value
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with client_for(Cluster("memory://"), app) as client:
        await client.get("/")
        await client.get("/")
    assert seen == [None, value]


async def test_value_that_msgpack_does_not_know_is_refused_with_the_cure() -> None:
    """As a value that would not come back equal."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["session"]["o"] = object()

    async with client_for(Cluster("memory://"), app) as client:
        with pytest.raises(
            TypeError, match=r"session\['o'\] cannot be stored: .*\. Store plain values: None"
        ):
            await client.get("/")


class Cart(msgspec.Struct):
    items: list[str]


@dataclass
class Basket:
    items: list[str]


class Model:
    """As pydantic's, which need not be installed."""

    def model_dump(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (Cart(["tea"]), r"msgspec\.to_builtins"),
        (Basket(["tea"]), r"dataclasses\.asdict"),
        (Model(), r"model_dump\(\)"),
        (["tea"], "under a name of its own"),
        ("tea", "under a name of its own"),
    ],
)
async def test_object_in_place_of_the_session_is_explained(value: Any, told: str) -> None:
    """Litestar's ``set_session`` takes any object; only a dict can be stored, and the error says how to get
    one. No other session middleware is blamed.
    """

    @post("/")
    async def handler(request: Request[Any, Any, Any]) -> None:
        request.set_session(value)

    async with client_for(Cluster("memory://"), Litestar([handler])) as client:
        with pytest.raises(LitestarException) as caught:
            await client.post("/")
    text = str(caught.value.__cause__)
    assert re.match(rf"scope\['session'\] was set to an? .*{told}", text)
    assert "middleware" not in text


# Rooms


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"exclude": 5}, "exclude must be a Connection or str or None, not an int"),
        ({"exclude": ["c1"]}, "exclude must be a Connection or str or None, not a list"),
        ({"key": 5}, "key must be a str or None, not an int"),
        ({"idempotency_key": 5}, "idempotency_key must be a str or None, not an int"),
    ],
)
async def test_broadcast_with_an_argument_of_the_wrong_type_stores_nothing(
    cluster_url: str, prefix: str, given: dict[str, Any], told: str
) -> None:
    """What cannot be read back is refused before anything is written."""
    realtime = RealtimeConfig(rules=[RoomRule("r", history=5)])
    async with Cluster(cluster_url, prefix=prefix, realtime=realtime) as cluster:
        room = cluster.room("r")
        with pytest.raises(TypeError, match=told):
            await room.broadcast("hello", **given)
        page = await room.history()
        assert (page.offset, page.publications) == (0, [])


async def test_log_line_of_an_undecodable_publication_names_room_and_offset(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It tells where to look. The store is written to directly, as another version would."""
    cluster = Cluster("memory://", realtime=RealtimeConfig(rules=[RoomRule("r", history=5)]))
    room = cluster.room("r")
    await room.broadcast("before")
    await cluster._parts.rooms._history.publish(
        "r",
        b"\xc1",
        size=5,
        ttl=600,
        idempotency_key=None,
        epoch=cluster._parts.rooms.retention.epoch,
        timeout=1.0,
    )
    page = await room.history()
    assert [publication.data for publication in page.publications] == ["before"]
    assert f"publication {page.offset} of room 'r' cannot be decoded" in caplog.text
