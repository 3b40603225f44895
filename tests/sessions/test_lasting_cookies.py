"""Cookies that outlive the browser, and their renewal while the session is used."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from asgi_cluster import (
    Cluster,
    ClusterMiddleware,
    CookieConfig,
    Session,
    SessionConfig,
    StoreUnavailable,
    get_session,
)
from asgi_cluster.bus.lease import boot_clock
from tests.sessions.app import Gate, client_for, make_app, nodes
from tests.sessions.requests import Browser

pytestmark = pytest.mark.quick

DAY = 86400


def lasting(max_age: float | None = 7200, *, rolling: bool = True, **options: Any) -> SessionConfig:
    return SessionConfig(cookie=CookieConfig(max_age=max_age, rolling=rolling), **options)


def max_age(response: httpx.Response) -> int | None:
    found = re.search(r"; Max-Age=(\d+)", response.headers.get("set-cookie", ""))
    return None if found is None else int(found[1])


def value(response: httpx.Response) -> str:
    cookie: str = response.headers["set-cookie"].partition(";")[0]
    return cookie


def later(cluster: Cluster, seconds: float) -> None:
    """Requests take the time for so much later; the store goes on with its own clock."""
    cluster._parts.node.clock = lambda: boot_clock() + seconds


@pytest.fixture
async def rolling(cluster_url: str, prefix: str) -> AsyncIterator[Cluster]:
    async with nodes(cluster_url, 1, prefix=prefix, sessions=lasting()) as (cluster,):
        yield cluster


# max_age


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_age": 3600, "rolling": False}, 3600),
        ({"max_age": timedelta(hours=1), "rolling": False}, 3600),
        ({"max_age": 14 * DAY, "rolling": False}, 43200),
        ({"max_age": 14 * DAY, "idle_timeout": 14 * DAY, "absolute_timeout": 365 * DAY}, 14 * DAY),
        ({"max_age": None}, None),
    ],
)
async def test_max_age_is_that_of_the_cookie_and_at_most_the_sessions(
    cluster_url: str, prefix: str, options: dict[str, Any], expected: int | None
) -> None:
    """Of anonymous sessions, logins and rotations alike; no cookie outlives the absolute timeout."""
    async with (
        nodes(cluster_url, 1, prefix=prefix, sessions=lasting(**options)) as (cluster,),
        client_for(cluster) as client,
    ):
        anonymous = await client.post("/put", json={"a": 1})
        login = await client.post("/login?user=ada")
        rotated = await client.post("/rotate")
        remembered = await client.post("/login?user=ada&lifetime=1000")
    for response in (anonymous, login, rotated):
        found = max_age(response)
        assert found == expected or (expected and found and expected - 10 < found < expected)
    assert max_age(remembered) == 1000


def test_options_that_contradict_each_other_are_refused() -> None:
    """A rolling cookie that ends before its session would be lost between two renewals."""
    with pytest.raises(ValueError, match="max_age must not be shorter than idle_timeout when rolling"):
        lasting(60)
    with pytest.raises(ValueError, match="max_age must be above 0"):
        CookieConfig(max_age=0)
    with pytest.raises(TypeError, match="rolling must be a bool"):
        CookieConfig(rolling="yes")  # type: ignore[arg-type]
    assert lasting(60, rolling=False).cookie.max_age == 60


# Renewal


@pytest.mark.parametrize("step", ["/put", "/login?user=ada", "/login?user=ada&lifetime=30000"])
async def test_cookie_is_renewed_while_the_session_is_used(rolling: Cluster, step: str) -> None:
    """The same cookie, for its whole time again, by reads and by writes; not before a tenth of the idle time
    is over.
    """
    async with client_for(rolling) as client:
        made = await client.post(step, json={"a": 1})
        for path in ("/show", "/put"):
            assert "set-cookie" not in (await client.post(path, json={"b": 1})).headers
        later(rolling, 8000 if "lifetime" in step else 1000)
        for path, changes in (("/show", {}), ("/put", {"c": 1})):
            renewed = await client.post(path, json=changes)
            assert value(renewed) == value(made)
            assert max_age(renewed) == max_age(made)
            assert renewed.headers["vary"] == "Cookie"


async def test_cookie_without_max_age_is_not_renewed(cluster_url: str, prefix: str) -> None:
    """It ends with the browser; there is nothing to extend."""
    async with (
        nodes(cluster_url, 1, prefix=prefix, sessions=lasting(None)) as (cluster,),
        client_for(cluster) as client,
    ):
        await client.post("/login?user=ada")
        later(cluster, 1000)
        assert "set-cookie" not in (await client.post("/put", json={"a": 1})).headers


async def test_request_that_ignores_the_session_renews_nothing(rolling: Cluster) -> None:
    """Its response may be cached for everyone, and must not hold a cookie. Nor does it take the renewal away
    from the next one.
    """
    async with client_for(rolling) as client:
        made = await client.post("/login?user=ada")
        later(rolling, 1000)
        assert "set-cookie" not in (await client.get("/nothing")).headers
        assert value(await client.get("/show")) == value(made)


@pytest.mark.parametrize("path", ["/show", "/put"])
async def test_cookie_is_renewed_once_per_tenth(cluster_url: str, prefix: str, path: str) -> None:
    """Of a session in steady use, also one that every request writes; around the border of two tenths a
    second time, since a read knows the last use to a round trip only.
    """
    options = lasting(8.0, idle_timeout=8.0, absolute_timeout=600)
    clock = asyncio.get_running_loop().time
    async with (
        nodes(cluster_url, 1, prefix=prefix, sessions=options) as (cluster,),
        client_for(cluster) as client,
    ):
        await client.post("/login?user=ada")
        started, renewed, requests = clock(), 0, 0
        while clock() - started < 2.5 or renewed < 2:
            response = await client.post(path, json={"n": requests})
            assert response.json()["user"] == "ada"
            renewed += "set-cookie" in response.headers
            requests += 1
            await asyncio.sleep(0.01)
        tenths = (clock() - started) / 0.8
    assert renewed <= 3 * (tenths + 1)
    assert requests > 3 * renewed


async def test_remembered_session_lasts_while_it_is_used(rolling: Cluster) -> None:
    """With ``rolling`` its lifetime counts from the last use, for a year at most; without it from the
    login.
    """
    plain = Cluster("memory://", sessions=lasting(rolling=False))
    for cluster, longest in ((rolling, 365 * DAY), (plain, 30 * DAY)):
        async with client_for(cluster) as client:
            made = await client.post(f"/login?user=ada&lifetime={30 * DAY}")
        record = await cluster._parts.service.reader.read_fresh(made.json()["handle"], timeout=5)
        assert record is not None
        assert record.idle == 30 * DAY
        assert record.absolute_in == pytest.approx(longest, abs=60)
        assert max_age(made) == 30 * DAY


async def test_request_overtaken_by_a_rotation_renews_nothing(cluster_url: str, prefix: str) -> None:
    """The secret it came with is good for a few seconds only: its cookie must not replace the new one."""
    gate = Gate()
    async with (
        nodes(cluster_url, 1, prefix=prefix, sessions=lasting(rotate_grace=3600)) as (cluster,),
        client_for(cluster, make_app(gate)) as client,
    ):
        made = await client.post("/login?user=ada")
        later(cluster, 1000)
        slow = asyncio.create_task(client.post("/put_late", json={"a": 1}))
        await gate.reached.wait()
        rotated = await client.post("/rotate")
        assert value(rotated) != value(made)
        gate.open.set()
        response = await slow
        assert response.status_code == 200
        assert "set-cookie" not in response.headers
        # Also a later request with the old secret, in its grace.
        client.cookies.clear()
        late = await client.get("/show", headers={"cookie": value(made)})
        assert late.json()["user"] == "ada"
        assert "set-cookie" not in late.headers


@pytest.mark.parametrize("end", ["/logout", "/login?user=bob"])
async def test_request_overtaken_by_an_end_renews_nothing(rolling: Cluster, end: str) -> None:
    """Neither a logout nor a newer login is undone by the response of the old session."""
    gate = Gate()
    async with client_for(rolling, make_app(gate)) as client:
        await client.post("/login?user=ada")
        later(rolling, 1000)
        slow = asyncio.create_task(client.post("/put_late", json={"a": 1}))
        await gate.reached.wait()
        await client.post(end)
        gate.open.set()
        assert "set-cookie" not in (await slow).headers


async def test_renewal_that_the_store_does_not_confirm_is_left_out(
    rolling: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request itself succeeded, and says so."""

    read_fresh, reads = rolling._parts.service.reader.read_fresh, 0

    async def down_after_one(handle: Any, *, timeout: float) -> object:
        nonlocal reads
        reads += 1
        if reads > 1:
            raise StoreUnavailable("down")
        return await read_fresh(handle, timeout=timeout)

    async with client_for(rolling) as client:
        await client.post("/login?user=ada")
        later(rolling, 1000)
        monkeypatch.setattr(rolling._parts.service.reader, "read_fresh", down_after_one)
        response = await client.post("/put", json={"a": 1})
        assert response.status_code == 200
        assert reads == 2  # the request's own, and the one of the renewal
        assert "set-cookie" not in response.headers


def test_websocket_handshake_renews_the_cookie(prefix: str) -> None:
    """An app that a browser keeps open may send nothing else for days."""

    async def echo(websocket: WebSocket) -> None:
        assert get_session(websocket).user_id == "ada"
        await websocket.accept()
        await websocket.close()

    routes = [*make_app().routes, WebSocketRoute("/ws", echo)]
    cluster = Cluster(f"memory://{prefix}", sessions=lasting())
    app = ClusterMiddleware(Starlette(routes=routes), cluster)
    with TestClient(app, base_url="https://testserver") as client:
        made = client.post("/login?user=ada")
        later(cluster, 1000)
        with client.websocket_connect("wss://testserver/ws") as socket:
            headers: dict[bytes, bytes] = dict(socket.extra_headers or ())
    assert headers[b"set-cookie"].decode() == made.headers["set-cookie"]


# created_at


async def test_created_at_is_the_same_for_every_request(cluster_url: str, prefix: str) -> None:
    """The store's moment, for the request that creates the session as for those that read it."""

    async def touch(request: Request) -> JSONResponse:
        session = get_session(request)
        if request.query_params.get("user"):
            await session.login(request.query_params["user"])
        else:
            request.session["a"] = 1
            await session.save()
        assert session.created_at is not None
        return JSONResponse(session.created_at.isoformat())

    app = Starlette(routes=[Route("/", touch)])
    async with (
        nodes(cluster_url, 2, prefix=prefix) as (first, second),
        client_for(first, app) as here,
        client_for(second, app) as there,
    ):
        for query in ("/", "/?user=ada"):
            made = await here.get(query)
            there.cookies = here.cookies
            assert [(await client.get("/")).json() for client in (here, there)] == [made.json()] * 2
        (info,) = await first.user("ada").sessions()
        assert info.created_at == datetime.fromisoformat(made.json())


async def test_save_while_the_cookie_is_renewed(rolling: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another task of the request: it stays saved, and the response does not fail because of it."""
    browser = Browser()
    await browser.on(rolling, lambda session: session.login("ada"))
    later(rolling, 1000)
    store = type(rolling._parts.backend.store)
    read = store.read

    async def work(session: Session) -> None:
        session.get("late")

        async def read_beside_a_save(self: Any, *arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(store, "read", read)
            record = await read(self, *arguments, **options)
            session["late"] = [2]
            assert await session.save()
            return record

        monkeypatch.setattr(store, "read", read_beside_a_save)

    response = await browser.on(rolling, work, raise_app_exceptions=True)
    assert response.status_code == 200
    assert "set-cookie" in response.headers
    assert await browser.truth(rolling) == {"late": [2]}
