"""A deadline belongs to one operation, and an operation that failed leaves nothing half done: a lock is given
back, an end is tried again, and a login that could not be answered leaves no session.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import websockets
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import (
    Cluster,
    ClusterMiddleware,
    CookieConfig,
    Session,
    SessionConfig,
    SessionConflict,
    StoreUnavailable,
    get_session,
)
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.store import RedisSessionStore
from tests.sessions.app import client_for, nodes
from tests.sessions.requests import Browser, attempt
from tests.support.nodes import serve
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.waiting import eventually

OVER = {"a": 1}


def put(**values: Any) -> Any:
    return lambda session: session.update(values)


@asynccontextmanager
async def behind_a_proxy(
    valkey: Server, prefix: str, *, deadline: float = 1.0, **options: Any
) -> AsyncIterator[tuple[Proxy, Cluster, Cluster]]:
    """A node whose commands can be lost, and one that sees what the store has. The server knows the
    scripts.
    """
    config = SessionConfig(cookie=CookieConfig(secure=False), **options)
    async with (
        Proxy(valkey.url) as proxy,
        nodes(valkey.url, 1, prefix=prefix, sessions=config) as (direct,),
        nodes(proxy.url, 1, prefix=prefix, sessions=config, deadline=deadline) as (behind,),
    ):
        warm = Browser()
        await warm.on(direct, put(a=1))
        await warm.on(direct, lambda session: session.login("warm"))
        await warm.on(direct, put(a=2))
        await warm.on(direct, lambda session: session.logout())
        yield proxy, behind, direct


# C1: after the response has started


async def test_session_of_a_long_websocket(valkey: Server, prefix: str) -> None:
    """Its Redis time adds up to several deadlines; ``save``, ``reload``, ``lock`` and ``logout`` go on."""
    async with behind_a_proxy(valkey, prefix, deadline=0.5) as (proxy, behind, _):
        failures: list[BaseException] = []
        done = asyncio.Event()

        async def endpoint(websocket: WebSocket) -> None:
            await websocket.accept()
            session = get_session(websocket)
            try:
                for n in range(8):
                    session["n"] = n
                    assert await session.save()
                    assert await session.reload()
                async with session.lock():
                    session["locked"] = True
                assert dict(session) == {"n": 7, "locked": True}
                assert (await session.logout()).sessions == 1
            except Exception as error:
                failures.append(error)
            done.set()

        browser = Browser()
        await browser.on(behind, put(n=0))
        app = Starlette(routes=[WebSocketRoute("/", endpoint)])
        cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        async with serve(ClusterMiddleware(app, behind), lifespan="off") as node:
            proxy.delay(0.02)
            async with websockets.connect(node.ws_url, additional_headers={"Cookie": cookie}):
                await done.wait()
            proxy.delay(0.0)
        assert failures == []


async def test_session_of_a_long_response(valkey: Server, prefix: str) -> None:
    """A stream of events reads its session again for as long as it goes on."""
    async with behind_a_proxy(valkey, prefix, deadline=0.5) as (proxy, behind, _):

        async def stream(request: Request) -> StreamingResponse:
            async def events() -> AsyncIterator[str]:
                for _ in range(15):
                    yield f"{await get_session(request).reload()} "

            return StreamingResponse(events())

        browser = Browser()
        await browser.on(behind, put(n=0))
        async with client_for(behind, Starlette(routes=[Route("/", stream)])) as client:
            client.cookies = browser.cookies
            proxy.delay(0.02)
            response = await client.get("/")
            proxy.delay(0.0)
        assert response.text.split() == ["True"] * 15


# C4: the lock


@pytest.mark.parametrize("how", ["work took all the time", "work failed", "save failed"])
async def test_lock_is_given_back(valkey: Server, prefix: str, how: str) -> None:
    """Whatever became of the work: the next request need not wait until ``hold`` is over."""
    async with behind_a_proxy(valkey, prefix, deadline=0.5) as (proxy, behind, direct):

        async def work(session: Session) -> None:
            async with session.lock(hold=60):
                session["locked"] = True
                if how == "work failed":
                    raise RuntimeError("the work failed")
                if how == "save failed":
                    proxy.lose(load("session_write").sha.encode())
                    return
                proxy.delay(0.02)
                for _ in range(15):
                    await attempt(session.reload())
                session["locked"] = True
            proxy.delay(0.0)

        async def next_one(session: Session) -> bool:
            async with session.lock(wait=5):
                return bool(session.get("locked", False))

        browser = Browser()
        await browser.on(direct, put(n=0))
        response = await browser.on(behind, work)
        proxy.delay(0.0)
        statuses = {"work took all the time": 200, "work failed": 500, "save failed": 503}
        assert response.status_code == statuses[how]
        response = await browser.on(direct, next_one)
        assert response.status_code == 200
        assert response.json() == (how != "save failed")  # the app's own 500 is a response like any other


async def test_lock_of_a_store_that_is_gone(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """Giving it back is tried and its failure is logged; the error is the one of the work."""
    with start_valkey() as own:
        async with nodes(own.url, 1, prefix=prefix) as (cluster,):

            async def work(session: Session) -> None:
                async with session.lock(hold=7):
                    session["n"] = 1
                    own.pause()

            browser = Browser()
            await browser.on(cluster, put(n=0))
            try:
                assert (await browser.on(cluster, work)).status_code == 503
            finally:
                own.resume()
    assert "expires within 7 s" in caplog.text


# A7: an end that was not confirmed


@pytest.mark.parametrize("verb", ["clear", "remove"])
async def test_save_after_an_end_that_failed(valkey: Server, prefix: str, verb: str) -> None:
    """It ends the session, and does not say that it did because it was tried before."""
    async with behind_a_proxy(valkey, prefix) as (proxy, behind, direct):

        async def work(session: Session) -> bool:
            if verb == "clear":
                session.clear()
            else:
                del session["a"]
            proxy.lose(load("session_end" if verb == "clear" else "session_write").sha.encode())
            with pytest.raises(StoreUnavailable):
                await session.save()
            return await session.save()

        browser = Browser()
        await browser.on(behind, put(**OVER))
        thief = browser.tab()
        response = await browser.on(behind, work)
        assert response.json() is True
        assert "Max-Age=0" in response.headers["set-cookie"]
        assert await thief.truth(direct) is None
        assert proxy.swallowed == 1


async def test_handshake_whose_end_failed(valkey: Server, prefix: str) -> None:
    """A socket is accepted with a close code, and the cookie of the session that lives is not taken away."""
    async with behind_a_proxy(valkey, prefix) as (proxy, behind, direct):

        async def endpoint(websocket: WebSocket) -> None:
            websocket.session.clear()
            proxy.lose(load("session_end").sha.encode())
            await websocket.accept()

        browser = Browser()
        await browser.on(behind, put(**OVER))
        app = Starlette(routes=[WebSocketRoute("/", endpoint)])
        cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        async with (
            serve(ClusterMiddleware(app, behind), lifespan="off") as node,
            websockets.connect(node.ws_url, additional_headers={"Cookie": cookie}) as socket,
        ):
            assert socket.response is not None
            assert "set-cookie" not in socket.response.headers
            with pytest.raises(websockets.ConnectionClosed):
                await socket.recv()
        assert await browser.truth(direct) == OVER


# A8: what stands for a session that could not be read


@pytest.mark.parametrize("verb", ["login", "logout"])
async def test_after_a_read_that_failed(valkey: Server, prefix: str, verb: str) -> None:
    """Signing in or out ends the session that the cookie names, although it was shown as an empty one."""
    async with behind_a_proxy(valkey, prefix, on_store_error="anonymous") as (proxy, behind, direct):

        async def work(session: Session) -> None:
            assert dict(session) == {}
            await (session.login("ada") if verb == "login" else session.logout())

        browser = Browser()
        await browser.on(direct, put(**OVER))
        old = browser.tab()
        proxy.lose(load("session_read").sha.encode())
        assert (await browser.on(behind, work)).status_code == 200
        assert proxy.swallowed == 1
        assert await old.truth(direct) is None
        assert await browser.truth(direct) == (OVER if verb == "login" else None)


@pytest.mark.parametrize("verb", ["login", "logout"])
async def test_wrong_secret_after_a_read_that_failed(valkey: Server, prefix: str, verb: str) -> None:
    """Who knows only the public handle ends nothing with it."""
    async with behind_a_proxy(valkey, prefix, on_store_error="anonymous") as (proxy, behind, direct):
        victim = Browser()
        await victim.on(direct, put(**OVER))
        ((name, value),) = victim.cookies.items()
        wrong = "A" if value[-1] != "A" else "B"
        attacker = Browser(httpx.Cookies({name: value[:-1] + wrong}))
        proxy.lose(load("session_read").sha.encode())
        response = await attacker.on(
            behind, lambda session: session.login("eve") if verb == "login" else _sessions(session)
        )
        assert response.status_code == 200
        assert proxy.swallowed == 1
        assert await victim.truth(direct) == OVER


async def _sessions(session: Session) -> int:
    return (await session.logout()).sessions


# B5: a login that fails


LOST: dict[str, tuple[str, bool]] = {
    "create ran": ("session_create", True),
    "create never came": ("session_create", False),
    "end never came": ("session_end", False),
    "write after it never came": ("session_write", False),
}


@pytest.mark.parametrize("lost", list(LOST))
async def test_login_that_fails_leaves_no_session(valkey: Server, prefix: str, lost: str) -> None:
    """503 with Retry-After and no cookie, and the user's list of devices is empty. What the visitor had is
    there as long as it was not ended.
    """
    script, ran = LOST[lost]
    async with behind_a_proxy(valkey, prefix) as (proxy, behind, direct):
        browser = Browser()
        await browser.on(direct, put(**OVER))

        async def sign_in(session: Session) -> None:
            command = load(script).sha.encode()
            if ran:
                proxy.swallow(command)
            else:
                proxy.lose(command)
            await session.login("ada")
            session["role"] = "admin"

        response = await browser.on(behind, sign_in)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert "set-cookie" not in response.headers
        assert proxy.swallowed == 1

        async def forgotten() -> bool:
            return not await direct.user("ada").sessions()

        await eventually(forgotten)
        if script != "session_write":
            assert await browser.truth(direct) == OVER
        assert (await browser.on(behind, lambda session: session.login("ada"))).status_code == 200
        assert len(await direct.user("ada").sessions()) == 1


@pytest.mark.quick
async def test_login_whose_request_fails_leaves_no_session(cluster_url: str, prefix: str) -> None:
    """An app that raises without answering sends no cookie: nobody could use that session."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await get_session(scope).login("ada")
        raise RuntimeError("before any response")

    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster, app) as client:
        with pytest.raises(RuntimeError):
            await client.get("/")
        assert await cluster.user("ada").sessions() == []


@pytest.mark.quick
async def test_login_whose_request_is_cancelled_leaves_no_session(cluster_url: str, prefix: str) -> None:
    """The server cancels a request that has signed in and not answered: nobody gets that cookie either."""
    signed_in = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await get_session(scope).login("ada")
        signed_in.set()
        await asyncio.Event().wait()

    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster, app) as client:
        request = asyncio.create_task(client.get("/"))
        await signed_in.wait()
        assert len(await cluster.user("ada").sessions()) == 1
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()
        assert await cluster.user("ada").sessions() == []


async def test_login_in_a_stall(prefix: str) -> None:
    """The server stands still and carries the login out later: 503 within the deadline, and when the server
    goes on nothing is left of it.
    """
    with start_valkey() as own:
        async with nodes(own.url, 1, prefix=prefix) as (cluster,):
            browser = Browser()
            await browser.on(cluster, put(**OVER))

            async def sign_in(session: Session) -> None:
                own.pause()
                await session.login("ada")

            try:
                assert (await browser.on(cluster, sign_in)).status_code == 503
                assert len(cluster._parts.service.logouts.tombstones) == 1
            finally:
                own.resume()

            async def forgotten() -> bool:
                return cluster.ready and not await cluster.user("ada").sessions()

            await eventually(forgotten, timeout=10)
            assert await browser.truth(cluster) == OVER


async def test_login_that_is_cancelled_leaves_no_session(prefix: str, valkey: Server) -> None:
    """A visitor who goes away while the reply to the login is under way."""
    async with behind_a_proxy(valkey, prefix) as (proxy, behind, direct):
        browser = Browser()
        await browser.on(direct, put(**OVER))

        async def sign_in(session: Session) -> None:
            proxy.stall("down")
            await session.login("ada")

        async def listed() -> bool:
            return len(await direct.user("ada").sessions()) == 1

        async def forgotten() -> bool:
            return not await direct.user("ada").sessions()

        request = asyncio.create_task(browser.on(behind, sign_in))
        await eventually(listed)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        proxy.heal()
        await eventually(forgotten, timeout=10)


# B5: other calls of a request


CALLS: dict[str, Callable[[Cluster], Any]] = {
    "user logout": lambda cluster: cluster.user("ada").logout(),
    "sessions": lambda cluster: cluster.user("ada").sessions(),
    "session logout": lambda cluster: cluster.session("00." + "a" * 22).logout(),
    "send": lambda cluster: cluster.user("ada").send("x"),
    "broadcast": lambda cluster: cluster.room("r").broadcast("x"),
}


@pytest.fixture(scope="module")
async def stalled() -> AsyncIterator[Cluster]:
    """A node whose server stands still, and is known to."""
    with start_valkey() as own:
        async with nodes(own.url, 1) as (cluster,):
            own.pause()
            try:
                await eventually(lambda: cluster.stats().bus.lease_remaining == 0, timeout=10)
                yield cluster
            finally:
                own.resume()


@pytest.mark.parametrize("call", list(CALLS))
async def test_call_in_a_stall(stalled: Cluster, call: str) -> None:
    """What a request could not do for want of Redis is 503 with Retry-After, and not the app's 500."""

    async def work(session: Session) -> None:
        await CALLS[call](stalled)

    response = await Browser().on(stalled, work)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


async def test_login_that_fails_beside_another_write_loses_nothing(
    prefix: str, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another request wrote during the login is in the old session until the new one has it."""
    async with nodes(valkey.url, 1, prefix=prefix) as (cluster,):
        browser = Browser()
        await browser.on(cluster, put(n=1))
        write, end = RedisSessionStore.write, RedisSessionStore.end

        async def other_request_first(self: RedisSessionStore, *arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(RedisSessionStore, "end", end)
            await browser.tab().on(cluster, put(cart="book"))
            monkeypatch.setattr(RedisSessionStore, "write", unanswered)
            return await end(self, *arguments, **options)

        async def unanswered(*arguments: Any, **options: Any) -> Any:
            raise StoreUnavailable("no answer in time")

        monkeypatch.setattr(RedisSessionStore, "end", other_request_first)
        assert (await browser.on(cluster, lambda session: session.login("ada"))).status_code == 503
        monkeypatch.setattr(RedisSessionStore, "write", write)
        assert await browser.data(cluster) == {"n": 1, "cart": "book"}
        assert await cluster.user("ada").sessions() == []
        assert (await browser.on(cluster, lambda session: session.login("ada"))).status_code == 200
        assert await browser.data(cluster) == {"n": 1, "cart": "book"}


@pytest.mark.quick
@pytest.mark.parametrize("answer", ["fails", "answers 500"])
async def test_error_that_the_app_has_made_good(prefix: str, answer: str) -> None:
    """A conflict that the app caught and repaired does not answer for what goes wrong after it."""
    config = SessionConfig(conflict="error")
    async with nodes(f"memory://{prefix}", 1, prefix=prefix, sessions=config) as (cluster,):
        browser = Browser()
        await browser.on(cluster, put(n=1))

        async def work(session: Session) -> None:
            session["n"] = 2
            await browser.tab().on(cluster, put(n=3))
            with pytest.raises(SessionConflict):
                await session.save()
            await session.reload()
            session["n"] = 4
            await session.save()
            if answer == "fails":
                raise ValueError("another error")
            raise HTTPException(500, "the payment provider is down")

        response = await browser.on(cluster, work)
        assert response.status_code == 500
        assert "Another request" not in response.text
        assert await browser.data(cluster) == {"n": 4}
