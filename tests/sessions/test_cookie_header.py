"""Which session a ``Cookie`` header names, byte by byte through a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import NamedTuple

import httpx
import pytest

from asgi_cluster import Cluster, ClusterMiddleware, CookieConfig, SessionConfig
from asgi_cluster.ids import new_handle, new_secret, new_token
from tests.sessions.app import client_for, make_app, nodes
from tests.support.machine import LOCAL
from tests.support.nodes import Node, serve


class People(NamedTuple):
    """Two living sessions on a served node: the visitor's, and the one that an attacker wants to be taken."""

    node: Node
    genuine: bytes
    forged: bytes


@pytest.fixture(scope="module", params=["h11", "httptools"])
async def people(request: pytest.FixtureRequest) -> AsyncIterator[People]:
    app = ClusterMiddleware(make_app(), Cluster(f"memory://{new_token()}"))
    async with serve(app, http=request.param) as node:
        yield People(node, await sign_in(node, "victim"), await sign_in(node, "attacker"))


async def sign_in(node: Node, user: str) -> bytes:
    async with httpx.AsyncClient(base_url=node.url) as client:
        response = await client.post("/login", params={"user": user})
    cookie: str = response.headers["set-cookie"].partition(";")[0]
    return cookie.encode()


async def user_of(node: Node, *headers: bytes) -> str | None:
    """Who is signed in for a request with these ``Cookie`` headers, sent as they are."""
    reader, writer = await asyncio.open_connection(LOCAL, node.port)
    lines = [b"GET /show HTTP/1.1", b"Host: x", b"Connection: close", *[b"Cookie: " + h for h in headers]]
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
    try:
        async with asyncio.timeout(10):
            answer = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    user: str | None = json.loads(body)["user"]
    return user


@pytest.mark.parametrize(
    "form",
    [
        b"%(forged)s",
        b"zz=1 %(forged)s",
        b"zz=1\t%(forged)s",
        b"zz=1 \t %(forged)s",
        b"zz=1, %(forged)s",
        b'zz="1 %(forged)s"',
        b"zz=%(forged)s",
        b"zz=1&%(forged)s",
        b"x%(forged)s",
        b"$Version=1 %(forged)s",
    ],
)
async def test_name_inside_another_cookie_is_not_the_session(people: People, form: bytes) -> None:
    """Only ``;`` separates cookies. What a value holds is that cookie's affair, before and after ours."""
    planted = form % {b"forged": people.forged}
    expected = "attacker" if planted == people.forged else None
    assert await user_of(people.node, planted) == expected
    if expected is None:
        assert await user_of(people.node, planted + b"; " + people.genuine) == "victim"
        assert await user_of(people.node, people.genuine + b"; " + planted) == "victim"
        assert await user_of(people.node, planted, people.genuine) == "victim"


@pytest.mark.parametrize(
    "form",
    [
        b"%(genuine)s",
        b"a=1;%(genuine)s;b=2",
        b"a=1;\t%(genuine)s\t; b=2",
        b"a=1; %(genuine)s ",
        b";; ;%(genuine)s;",
        b"a; %(genuine)s",
        b"=a=b; %(genuine)s",
        b"a=\xff\xfe; %(genuine)s",
    ],
)
async def test_cookie_is_found_among_others(people: People, form: bytes) -> None:
    """Blanks and tabs around a cookie do not matter, nor what its neighbours look like."""
    assert await user_of(people.node, form % {b"genuine": people.genuine}) == "victim"
    assert await user_of(people.node, b"a=1", form % {b"genuine": people.genuine}, b"b=2") == "victim"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"nonsense",
        b"%(genuine)sx",
        b"%(genuine)s.x",
        b'"%(genuine)s"',
        b"%(genuine)s %(genuine)s",
        b"x%(genuine)s",
    ],
)
async def test_malformed_cookie_does_not_hide_the_genuine_one(people: People, value: bytes) -> None:
    """A second cookie of the same name, first in the header as one with a longer path is (RFC 6265 section
    5.4), is passed over when it is malformed.
    """
    name, _, genuine = people.genuine.partition(b"=")
    planted = name + b"=" + value % {b"genuine": genuine}
    assert await user_of(people.node, planted) is None
    assert await user_of(people.node, planted + b"; " + people.genuine) == "victim"
    assert await user_of(people.node, planted, people.genuine) == "victim"


async def test_wrong_case_or_missing_prefix_is_another_cookie(people: People) -> None:
    """A browser guards the exact name ``__Host-session`` only."""
    value = people.forged.partition(b"=")[2]
    for name in (b"session", b"__host-session", b"__Host-Session", b"__Secure-session", b"__Host-session "):
        assert await user_of(people.node, name + b"=" + value) is None


def invented(count: int) -> str:
    return "; ".join(f"__Host-session={new_handle(None)}.{new_secret()}" for _ in range(count))


async def test_cookie_that_opens_no_session_does_not_hide_the_genuine_one(people: People) -> None:
    """An outdated or invented cookie of the same name comes first: the session behind the next one is
    found.
    """
    planted = invented(1).encode()
    stolen_handle = people.genuine.rpartition(b".")[0] + b"." + new_secret().encode()
    for first in (planted, stolen_handle, planted + b"; " + stolen_handle):
        assert await user_of(people.node, first + b"; " + people.genuine) == "victim"
        assert await user_of(people.node, first, people.genuine) == "victim"


@pytest.mark.quick
async def test_invented_cookies_cost_a_bounded_number_of_reads(cluster_url: str, prefix: str) -> None:
    """However many cookies of that name a request brings, at most four are looked up."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        before = cluster.stats().cache.misses
        response = await client.get("/show", headers={"cookie": invented(50)})
        assert response.json()["user"] is None
        assert cluster.stats().cache.misses - before == 4


@pytest.mark.quick
async def test_session_behind_the_second_cookie_can_be_changed_and_ended(
    cluster_url: str, prefix: str
) -> None:
    """It is a session like any other, whatever came before it."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        login = await client.post("/login?user=ada")
        cookie = f"{invented(2)}; {login.headers['set-cookie'].partition(';')[0]}"
        client.cookies.clear()
        put = await client.post("/put", json={"a": 1}, headers={"cookie": cookie})
        assert put.json()["user"] == "ada"
        assert (await client.get("/show", headers={"cookie": cookie})).json()["data"] == {"a": 1}
        assert (await client.post("/logout", headers={"cookie": cookie})).json()["sessions"] == 1


@pytest.mark.quick
async def test_unprefixed_cookie_keeps_the_browsers_order(prefix: str) -> None:
    """With ``domain=`` a browser may send two cookies that both open a session: the first counts, which is
    the one with the longer path.
    """
    config = SessionConfig(cookie=CookieConfig(domain="example.test"))
    async with client_for(Cluster(f"memory://{prefix}", sessions=config)) as client:
        cookies = [
            (await client.post(f"/login?user={user}")).headers["set-cookie"].partition(";")[0]
            for user in ("ada", "bob")
        ]
        client.cookies.clear()
        both = await client.get("/show", headers={"cookie": "; ".join(cookies)})
        assert both.json()["user"] == "ada"
