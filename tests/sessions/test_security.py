"""The points of docs/security.md, each with its test."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from asgi_cluster import Cluster, CookieConfig, SessionConfig, StoreUnavailable
from asgi_cluster.ids import new_handle, new_secret
from tests.sessions.app import client_for, nodes
from tests.sessions.test_least_privilege import BASE, NEWER
from tests.support.servers import Server
from tests.support.waiting import eventually


@pytest.fixture
def raw(valkey: Server) -> Iterator[redis.Redis]:
    client = valkey.client()
    yield client
    client.close()


def everything(raw: redis.Redis, prefix: str) -> list[bytes]:
    """All keys of a prefix, and all that is in them."""
    found: list[Any] = []
    for key in raw.scan_iter(f"{prefix}*"):
        found.append(key)
        kind = raw.type(key)
        if kind == b"hash":
            found += itertools.chain.from_iterable(raw.hgetall(key).items())
        elif kind == b"string":
            found.append(raw.get(key) or b"")
        elif kind == b"zset":
            found.extend(raw.zrange(key, 0, -1))
    return found


@pytest.mark.quick
def test_ids_have_the_entropy_that_owasp_asks_for() -> None:
    """OWASP: at least 64 bits. The secret has 256, the handle 128, and no two are alike."""
    secrets = {new_secret() for _ in range(2000)}
    handles = {new_handle(None) for _ in range(2000)}
    assert len(secrets) == len(handles) == 2000
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{43}", secret) for secret in secrets)
    assert all(re.fullmatch(r"[0-9a-f]{2}\.[A-Za-z0-9_-]{22}", handle) for handle in handles)
    assert len({secret[position] for secret in secrets for position in (0, 20, 41)}) >= 60


async def test_secret_is_neither_stored_nor_published_nor_logged(
    valkey: Server, raw: redis.Redis, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Through login, write, rotation and logout the cookie's secret appears in no key, value, message or log
    line.
    """
    caplog.set_level(logging.DEBUG)
    listener = raw.pubsub()
    listener.psubscribe(f"{prefix}*")
    seen_secrets = []
    stored: list[bytes] = []
    async with nodes(valkey.url, prefix=prefix) as (first, _), client_for(first) as client:
        for step in ("/login?user=ada", "/rotate", "/put", "/logout"):
            response = await client.post(step, json={"a": 1})
            for cookie in response.headers.get_list("set-cookie"):
                found = re.search(r"session=[0-9a-f]{2}\.[^.]+\.([A-Za-z0-9_-]{43});", cookie)
                if found:
                    seen_secrets.append(found[1].encode())
            stored += everything(raw, prefix)
    published = []
    while (message := listener.get_message(timeout=0.1)) is not None:
        published.append(str(message).encode())
    listener.close()
    assert len(seen_secrets) == 2
    assert len(published) > 4
    assert len(stored) > 20
    for secret in seen_secrets:
        assert not [item for item in stored + published if secret in item]
        assert secret.decode() not in caplog.text


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "name", "attributes"),
    [
        (CookieConfig(), "__Host-session", {"Secure", "HttpOnly", "SameSite=Lax", "Path=/"}),
        (CookieConfig(domain="example.org"), "session", {"Secure", "HttpOnly", "Domain=example.org"}),
        (CookieConfig(path="/app"), "session", {"Path=/app", "Secure"}),
        (CookieConfig(secure=False), "session", {"HttpOnly", "SameSite=Lax"}),
        (CookieConfig(same_site="strict", name="sid"), "__Host-sid", {"SameSite=Strict"}),
        (
            CookieConfig(same_site="none", partitioned=True),
            "__Host-session",
            {"SameSite=None", "Partitioned"},
        ),
    ],
)
async def test_cookie_has_the_attributes_that_were_asked_for(
    config: CookieConfig, name: str, attributes: set[str]
) -> None:
    """Each option of CookieConfig shows in the header, and the prefix only where browsers accept it."""
    cluster = Cluster("memory://", sessions=SessionConfig(cookie=config))
    async with client_for(cluster) as client:
        cookie = (await client.post("/put", json={"a": 1})).headers["set-cookie"]
    parts = [part.strip() for part in cookie.split(";")]
    assert parts[0].startswith(f"{name}=")
    assert attributes <= set(parts)
    assert ("Secure" in parts) == config.secure
    assert not any(part.startswith(("Max-Age", "Expires")) for part in parts)


@pytest.mark.quick
@pytest.mark.parametrize(
    "options",
    [
        {"name": "a b"},
        {"name": ""},
        {"name": "__Host-x"},
        {"same_site": "none", "secure": False},
        {"partitioned": True, "secure": False},
        {"same_site": "loose"},
        {"domain": "a;b"},
        {"path": "app"},
        {"path": "/;x"},
    ],
)
def test_cookie_option_that_browsers_refuse_is_refused_first(options: dict[str, Any]) -> None:
    """A cookie that would not come back is an error at construction."""
    with pytest.raises(ValueError, match=r"."):
        CookieConfig(**options)


@pytest.mark.quick
async def test_remember_me_outlives_the_browser_and_nothing_else_does(cluster_url: str, prefix: str) -> None:
    """login(lifetime=…) sets Max-Age; an ordinary login's cookie ends with the browser."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        remembered = await client.post("/login?user=ada&lifetime=1000")
        ordinary = await client.post("/login?user=ada")
    assert re.search(r"Max-Age=(1000|999);", remembered.headers["set-cookie"])
    assert "Max-Age" not in ordinary.headers["set-cookie"]


@pytest.mark.quick
async def test_idle_session_ends_and_a_used_one_does_not(cluster_url: str, prefix: str) -> None:
    """The idle timeout counts from the last use, a mere look included; the node that is asked makes no
    difference.
    """
    options = SessionConfig(idle_timeout=1.0, absolute_timeout=60)
    async with (
        nodes(cluster_url, prefix=prefix, sessions=options) as (first, second),
        client_for(first) as used,
        client_for(second) as idle,
    ):
        await used.post("/login?user=ada")
        await idle.post("/login?user=ada")
        for _ in range(8):
            await asyncio.sleep(0.2)
            assert (await used.get("/show")).json()["user"] == "ada"
        assert (await idle.get("/show")).json()["user"] is None


@pytest.mark.quick
async def test_busy_session_ends_at_its_absolute_timeout(cluster_url: str, prefix: str) -> None:
    """However often it is used: the absolute timeout cannot be extended."""
    options = SessionConfig(idle_timeout=0.8, absolute_timeout=1.0)
    async with (
        nodes(cluster_url, 1, prefix=prefix, sessions=options) as (cluster,),
        client_for(cluster) as client,
    ):
        await client.post("/login?user=ada")
        seen: list[str | None] = []

        async def over() -> bool:
            seen.append((await client.post("/put", json={"n": len(seen)})).json()["user"])
            return seen[-1] is None

        await eventually(over, interval=0.2)
    assert seen[0] == "ada"


LEAST_PRIVILEGE = [rule.replace("asgi-cluster:", "{prefix}:") for rule in (*BASE, *NEWER)]
"""The rights that docs/security.md lists."""


def grant(raw: redis.Redis, name: str, prefix: str, *without: str) -> None:
    rules = [rule.format(prefix=prefix) for rule in LEAST_PRIVILEGE if rule.split("|")[0] not in without]
    raw.execute_command("ACL", "SETUSER", name, "reset", "on", ">pa55-word", *rules)


def url_for(valkey: Server, name: str) -> str:
    return f"redis://{name}:pa55-word@127.0.0.1:{valkey.port}/0"


async def test_everything_works_under_the_documented_least_privilege(
    valkey: Server, raw: redis.Redis, prefix: str
) -> None:
    """Login, write, rotation, locks, list, logout and broadcast need no right that is not in the list."""
    grant(raw, "least", prefix)
    url, sessions = url_for(valkey, "least"), SessionConfig(wait_replicas=1)
    async with nodes(url, prefix=prefix, sessions=sessions) as (first, second), client_for(first) as client:
        for step in ("/login?user=ada", "/put", "/rotate", "/lock"):
            assert (await client.post(step, json={"a": 1})).status_code == 200
        assert len(await second.user("ada").sessions()) == 1
        assert len(await second.nodes()) == 2
        await second.room("news").broadcast("hello")
        assert (await second.user("ada").logout()).complete


@pytest.mark.parametrize("missing", ["&{prefix}:*", "+publish", "+subscribe", "+evalsha"])
async def test_missing_right_stops_the_start(
    valkey: Server, raw: redis.Redis, prefix: str, missing: str
) -> None:
    """It is found at start, where somebody looks, and not at the first logout. The error has no password in
    it.
    """
    grant(raw, "lacking", prefix, missing)
    cluster = Cluster(url_for(valkey, "lacking"), prefix=prefix)
    with pytest.raises(StoreUnavailable) as caught:
        await cluster.__aenter__()
    assert "permission" in str(caught.value) or "NOPERM" in str(caught.value)
    assert "pa55" not in str(caught.value) + repr(cluster)


async def test_wrong_password_is_a_clear_error_without_the_password(
    valkey: Server, raw: redis.Redis, prefix: str
) -> None:
    """The start fails, says where and why, and keeps the secret."""
    grant(raw, "somebody", prefix)
    cluster = Cluster(f"redis://somebody:wr0ng@127.0.0.1:{valkey.port}/0", prefix=prefix)
    with pytest.raises(StoreUnavailable, match="refused the user name or password") as caught:
        await cluster.__aenter__()
    assert str(valkey.port) in str(caught.value)
    assert "wr0ng" not in str(caught.value) + repr(cluster) + str(caught.value.__cause__)


async def test_tampered_record_is_treated_as_missing(
    valkey: Server, raw: redis.Redis, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A record without its meta fields, of the wrong type, or with a value that is not msgpack logs nobody
    else out.
    """
    async with nodes(valkey.url, 1, prefix=prefix) as (cluster,), client_for(cluster) as other:
        await other.post("/login?user=bob")
        damages = {
            "no msgpack": b"\xc1",
            "no UTF-8": b"\xa2\xff\xfe",
            "no UTF-8 in a list": b"\x91\xa2\xff\xfe",
            "lists in lists": b"\x91" * 100_000,
        }
        for damage in ("no meta", "wrong type", "user", "user without epoch", *damages):
            async with client_for(cluster) as client:
                handle = (await client.post("/login?user=ada")).json()["handle"]
                await client.post("/put", json={"a": 1})
                key = f"{prefix}:{{{handle[:2]}}}:s:{handle[3:]}"
                assert raw.exists(key)
                if damage == "no meta":
                    raw.hdel(key, "@secret")
                elif damage == "wrong type":
                    raw.delete(key)
                    raw.set(key, "x")
                elif damage.startswith("user"):
                    raw.hset(key, "@user", b"\xff\xfe")
                    name = key[: key.index("s:")].encode() + b"e:\xff\xfe"
                    raw.delete(name)
                    if damage == "user":
                        raw.set(name, raw.hget(key, "@epoch") or b"", ex=60)
                else:
                    raw.hset(key, ".a", damages[damage])
                for _ in range(3):
                    response = await client.get("/show")
                    assert response.status_code == 200
                    assert response.json()["data"] == {}
                    assert response.json()["user"] is None
                assert caplog.text.count(handle) == (damage != "user without epoch"), damage
                assert (await cluster.session(handle).logout()).complete
                assert not raw.exists(key)
        assert (await other.get("/show")).json()["user"] == "bob"
        assert cluster._parts.service.corrupt.count >= len(damages)
