"""What a request finds when its session was ended, or is held, by another one meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from asgi_cluster import Cluster, Session, get_session
from tests.sessions.app import client_for

pytestmark = pytest.mark.quick


async def in_session_of_ada(cluster: Cluster, work: Callable[[Session], Awaitable[None]]) -> dict[str, Any]:
    """Run ``work`` in a request that has ada's session; what the request after it sees."""
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session(scope)
        match scope["path"]:
            case "/login":
                await session.login("ada")
            case "/work":
                assert session.user_id == "ada"
                await work(session)
            case "/show":
                seen.update(user=session.user_id, data=dict(session))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with client_for(cluster, app) as client:
        for path in ("/login", "/work", "/show"):
            assert (await client.get(path)).status_code == 200
    return seen


async def ended(cluster: Cluster, session: Session) -> None:
    assert session.handle is not None
    assert (await cluster.session(session.handle).logout()).complete


async def test_rotate_of_a_session_that_was_ended() -> None:
    """It does not come back: the request goes on without a session."""
    cluster = Cluster("memory://")

    async def work(session: Session) -> None:
        await ended(cluster, session)
        await session.rotate()
        assert session.handle is None
        assert session.user_id is None

    assert await in_session_of_ada(cluster, work) == {"user": None, "data": {}}


async def test_reload_of_a_session_that_was_ended() -> None:
    """``False``, and the next request has no session."""
    cluster = Cluster("memory://")

    async def work(session: Session) -> None:
        session["a"] = 1
        await session.save()
        assert await session.reload()
        await ended(cluster, session)
        assert not await session.reload()
        assert session.handle is None
        assert session.user_id is None

    assert await in_session_of_ada(cluster, work) == {"user": None, "data": {}}


async def test_lock_that_another_request_holds() -> None:
    """It is waited for, for as long as the caller says; the one that holds it saves what it did."""
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session(scope)
        match scope["path"]:
            case "/login":
                await session.login("ada")
            case "/holds":
                async with session.lock():
                    session["a"] = 1
                    await client.get("/waits")
            case "/waits":
                try:
                    async with session.lock(wait=0.05):
                        pytest.fail("two requests hold the lock")
                except TimeoutError as error:
                    told.append(str(error))
            case "/show":
                told.append(str(session["a"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with client_for(Cluster("memory://"), app) as client:
        for path in ("/login", "/holds", "/show"):
            assert (await client.get(path)).status_code == 200
    assert "was not free within 0.05 s" in told[0]
    assert told[1:] == ["1"]


async def test_lock_of_a_session_that_is_not_stored() -> None:
    """No other request can have it: nothing is waited for, and nothing is stored."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session(scope)
        async with session.lock():
            assert session.handle is None
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with client_for(Cluster("memory://"), app) as client:
        assert "set-cookie" not in (await client.get("/")).headers


async def test_expires_at_is_the_idle_timeout_from_now() -> None:
    """In wall-clock time, for a cookie or a note to the user; none before anything is stored."""

    async def work(session: Session) -> None:
        assert session.expires_at is not None
        left = session.expires_at - datetime.now(UTC)
        assert timedelta(hours=1, minutes=58) < left <= timedelta(hours=2)
        await session.logout()
        assert session.expires_at is None

    assert await in_session_of_ada(Cluster("memory://"), work) == {"user": None, "data": {}}
