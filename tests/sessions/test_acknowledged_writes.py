"""What was saved is not lost: not to another request's empty session, not to a value that the cache still
showed, not to a login, and not to a reference that the app kept.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from asgi_cluster import CacheConfig, Cluster, Session, SessionConfig
from asgi_cluster.backends.redis.store import RedisSessionStore
from tests.sessions.app import Gate, nodes
from tests.sessions.requests import Browser
from tests.support.proxy import Proxy
from tests.support.servers import Server


def put(**values: Any) -> Any:
    return lambda session: session.update(values)


def remove(key: str) -> Any:
    return lambda session: session.pop(key)


@asynccontextmanager
async def slow_request(
    browser: Browser, node: Cluster, work: Any
) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A request of another tab that has done ``work`` before the block, and is answered at its end."""
    gate = Gate()

    async def slowly(session: Session) -> None:
        work(session)
        await gate.pass_through()

    request = asyncio.create_task(browser.tab().on(node, slowly))
    await gate.reached.wait()
    try:
        yield request
    finally:
        gate.open.set()
        await request


@asynccontextmanager
async def second_node_stalled(
    valkey: Server, prefix: str, **stored: Any
) -> AsyncIterator[tuple[Browser, Cluster, Cluster]]:
    """A session with ``stored`` in the caches of two nodes. The second's bus is stalled then, inside a lease
    that is long enough.
    """
    lease = SessionConfig(cache=CacheConfig(lease=8.0))
    async with (
        Proxy(valkey.url) as proxy,
        nodes(valkey.url, 1, prefix=prefix, sessions=lease) as (first,),
        nodes(proxy.url, 1, prefix=prefix, sessions=lease) as (second,),
    ):
        browser = Browser()
        await browser.on(first, put(**stored))
        assert await browser.data(second) == stored
        proxy.stall("down", only=b"SUBSCRIBE")
        yield browser, first, second


# B1: empty


@pytest.mark.quick
@pytest.mark.parametrize("where", ["same node", "another node"])
async def test_key_that_is_written_while_another_request_empties_the_session(
    cluster_url: str, prefix: str, where: str
) -> None:
    """The session is not empty for the store: it goes on with the other request's key."""
    async with nodes(cluster_url, prefix=prefix) as (first, second):
        other = first if where == "same node" else second
        browser = Browser()
        await browser.on(first, put(a=1))
        async with slow_request(browser, first, remove("a")) as emptying:
            assert (await browser.on(other, put(b=2))).status_code == 200
        response = await emptying
        assert response.status_code == 200
        assert "set-cookie" not in response.headers
        assert await browser.truth(second) == {"b": 2}


@pytest.mark.quick
async def test_conflict_between_emptying_and_writing(cluster_url: str, prefix: str) -> None:
    """With conflict="error" the request that empties the session and lost the race gets 409."""
    options = SessionConfig(conflict="error")
    async with nodes(cluster_url, prefix=prefix, sessions=options) as (first, second):
        browser = Browser()
        await browser.on(first, put(a=1))
        async with slow_request(browser, first, remove("a")) as emptying:
            assert (await browser.on(second, put(b=2))).status_code == 200
        assert (await emptying).status_code == 409
        assert await browser.truth(second) == {"a": 1, "b": 2}


@pytest.mark.quick
async def test_two_requests_that_empty_a_session_between_them(cluster_url: str, prefix: str) -> None:
    """Each removes one key of two; the store ends the session when the last one is removed."""
    async with nodes(cluster_url, prefix=prefix) as (first, second):
        browser = Browser()
        await browser.on(first, put(a=1, b=2))
        async with slow_request(browser, first, remove("a")) as slow:
            left = await browser.tab().on(second, remove("b"))
            assert "set-cookie" not in left.headers
        assert "Max-Age=0" in (await slow).headers["set-cookie"]
        assert await browser.truth(second) is None


# B2: an assignment is a write


async def test_value_that_the_cache_still_shows(valkey: Server, prefix: str) -> None:
    """A node that has not received the invalidation writes the older value when the app assigns it."""
    async with second_node_stalled(valkey, prefix, color="red") as (browser, first, second):
        await browser.on(first, put(color="blue"))
        assert (await browser.on(second, put(color="red"))).status_code == 200
        assert await browser.truth(first) == {"color": "red"}


async def test_key_that_the_cache_does_not_show_yet(valkey: Server, prefix: str) -> None:
    """Set and removed by one request: the key is removed, although the request never saw it stored."""
    async with second_node_stalled(valkey, prefix, a=1) as (browser, first, second):
        await browser.on(first, put(b=2))

        def set_and_remove(session: Session) -> None:
            session["b"] = 3
            del session["b"]

        await browser.on(second, set_and_remove)
        assert await browser.truth(first) == {"a": 1}


ASSIGNMENTS: dict[str, Any] = {
    "item": lambda session: session.__setitem__("a", 1),
    "update": lambda session: session.update(a=1),
    "or": lambda session: session.__ior__({"a": 1}),
    "replaced": lambda session: session.work.scope.__setitem__("session", {"a": 1}),
}


@pytest.mark.quick
@pytest.mark.parametrize("how", list(ASSIGNMENTS))
async def test_assignment_of_an_equal_value_by_a_slow_request(
    cluster_url: str, prefix: str, how: str
) -> None:
    """The request that answers last has written last, whatever it had read."""
    async with nodes(cluster_url, prefix=prefix) as (first, second):
        browser, gate = Browser(), Gate()
        await browser.on(first, put(a=1))

        async def assign(session: Session) -> None:
            assert session["a"] == 1
            await gate.pass_through()
            ASSIGNMENTS[how](session)

        slow = asyncio.create_task(browser.tab().on(first, assign))
        await gate.reached.wait()
        await browser.on(second, put(a=2))
        gate.open.set()
        await slow
        assert await browser.truth(second) == {"a": 1}


@pytest.mark.quick
async def test_equal_assignment_changes_no_version(cluster_url: str, prefix: str) -> None:
    """Nothing has changed, so nothing is published and no other request conflicts; ``setdefault`` of a key
    that is there is no assignment.
    """
    options = SessionConfig(conflict="error")
    async with nodes(cluster_url, prefix=prefix, sessions=options) as (first, second):
        browser = Browser()
        await browser.on(first, put(a=1))

        async def twice(session: Session) -> None:
            session["a"] = 1
            assert await session.save()
            assert await session.save()

        async with slow_request(browser, first, put(b=1)) as slow:
            for work in (put(a=1), lambda session: session.setdefault("a", 5), twice):
                assert (await browser.on(second, work)).status_code == 200
            before = second.stats().cache.invalidations
        assert (await slow).status_code == 200
        assert second.stats().cache.invalidations <= before + 1
        assert (await browser.on(second, lambda session: session.version)).json() == 2


# B4: nested changes


class Basket(dict[str, Any]):
    """A dict that an app made its own."""


NESTED: dict[str, tuple[Any, Any, Any]] = {
    "setdefault": (
        lambda session: session.setdefault("k", []),
        lambda value: value.append(1),
        [1],
    ),
    "own reference": (
        lambda session: _assigned(session, {"n": 0}),
        lambda value: value.update(n=1),
        {"n": 1},
    ),
    "OrderedDict": (
        lambda session: _assigned(session, OrderedDict(n=0)),
        lambda value: value.update(n=1),
        {"n": 1},
    ),
    "subclass": (lambda session: _assigned(session, Basket(n=0)), lambda value: value.update(n=1), {"n": 1}),
    "bytearray": (
        lambda session: _assigned(session, bytearray(b"a")),
        lambda value: value.extend(b"b"),
        "ab",
    ),
    "in a tuple": (lambda session: _assigned(session, ([],))[0], lambda value: value.append(1), [[1]]),
}


def _assigned(session: Session, value: Any) -> Any:
    session["k"] = value
    return value


@pytest.mark.quick
@pytest.mark.parametrize("kind", list(NESTED))
@pytest.mark.parametrize("after", ["login", "save"])
async def test_nested_change_after(cluster_url: str, prefix: str, kind: str, after: str) -> None:
    """What the app holds is compared at the end of the request, whatever was stored in between."""
    make, change, expected = NESTED[kind]

    async def work(session: Session) -> None:
        value = make(session)
        if after == "login":
            await session.login("ada")
        else:
            await session.save()
        change(value)

    def show(session: Session) -> Any:
        value = session["k"]
        return value.decode() if isinstance(value, bytes) else value

    async with nodes(cluster_url, prefix=prefix) as (first, second):
        browser = Browser()
        assert (await browser.on(first, work)).status_code == 200
        assert (await browser.on(second, show)).json() == expected


@pytest.mark.quick
async def test_nested_change_of_what_was_read_before_a_login(cluster_url: str, prefix: str) -> None:
    """A list that was handed out before the login is still the session's list after it."""

    async def work(session: Session) -> None:
        cart = session["cart"]
        await session.login("ada")
        cart.append(2)

    async with nodes(cluster_url, prefix=prefix) as (first, second):
        browser = Browser()
        await browser.on(first, put(cart=[1]))
        await browser.on(first, work)
        assert await browser.data(second) == {"cart": [1, 2]}


# B3: what a login carries over


@pytest.mark.quick
@pytest.mark.parametrize("before", ["anonymous", "same user"])
async def test_write_in_parallel_to_a_login(cluster_url: str, prefix: str, before: str) -> None:
    """The write was answered before the login was: the new session has it, and not what it replaced or
    removed."""
    async with nodes(cluster_url, prefix=prefix) as (first, second):
        browser, gate = Browser(), Gate()
        if before == "same user":
            await browser.on(first, lambda session: session.login("ada"))
        await browser.on(first, put(a=1, gone=1, list=[1], mine=1))

        async def sign_in(session: Session) -> dict[str, Any]:
            assert session["a"] == 1
            assert session["list"] == [1]
            session["mine"] = 2
            await gate.pass_through()
            await session.login("ada")
            return dict(session)

        signing_in = asyncio.create_task(browser.on(first, sign_in))
        await gate.reached.wait()

        def change(session: Session) -> None:
            session.update(a=2, b=2, mine=3)
            session["list"].append(2)
            del session["gone"]

        assert (await browser.tab().on(second, change)).status_code == 200
        gate.open.set()
        assert (await signing_in).status_code == 200
        assert await browser.truth(second) == {"a": 2, "b": 2, "list": [1, 2], "mine": 2}
        assert len(await first.user("ada").sessions()) == 1


async def test_login_on_a_node_whose_bus_is_stalled(valkey: Server, prefix: str) -> None:
    """The new session has what the store has, not what the node's cache shows."""
    async with second_node_stalled(valkey, prefix, a=1) as (browser, first, second):
        await browser.on(first, put(a=2, b=2))
        assert (await browser.on(second, lambda session: session.login("ada"))).status_code == 200
        assert await browser.truth(first) == {"a": 2, "b": 2}


async def test_login_with_a_session_that_is_over(valkey: Server, prefix: str) -> None:
    """A session that was ended elsewhere is not carried over from the cache."""
    async with second_node_stalled(valkey, prefix, old=1) as (browser, first, second):
        await browser.tab().on(first, lambda session: session.clear())

        async def sign_in(session: Session) -> None:
            session["new"] = 1
            await session.login("ada")

        await browser.on(second, sign_in)
        assert await browser.truth(first) == {"new": 1}


@pytest.mark.quick
async def test_login_after_the_session_was_lost(cluster_url: str, prefix: str) -> None:
    """A request whose ``save`` returned False takes nothing of the lost session into the new one."""
    async with nodes(cluster_url, prefix=prefix) as (first, second):
        browser = Browser()
        await browser.on(first, put(old=1))

        async def sign_in(session: Session) -> None:
            assert session["old"] == 1
            await second.session(session.handle or "").logout()
            session["lost"] = 1
            assert not await session.save()
            session["new"] = 1
            await session.login("ada")

        assert (await browser.on(first, sign_in)).status_code == 200
        assert await browser.truth(second) == {"new": 1}


@pytest.mark.parametrize("how", ["login", "save"])
async def test_assignment_while_the_session_is_created(redis_url: str, prefix: str, how: str) -> None:
    """By another task of the request: it is saved with the response."""
    async with nodes(redis_url, 1, prefix=prefix) as (cluster,):
        browser = Browser()

        async def work(session: Session) -> None:
            session["before"] = 1
            creating = asyncio.create_task(session.login("ada") if how == "login" else session.save())
            await asyncio.sleep(0)
            session["meanwhile"] = 2
            await creating

        await browser.on(cluster, work)
        assert await browser.truth(cluster) == {"before": 1, "meanwhile": 2}


async def test_save_during_a_login_of_the_same_request(
    redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session is over when it arrives: the new one gets what it was to save, and its cookie is set."""
    end = RedisSessionStore.end

    async with nodes(redis_url, 1, prefix=prefix) as (cluster,):
        browser = Browser()
        await browser.on(cluster, put(old=1))

        async def work(session: Session) -> None:
            saved: list[asyncio.Task[bool]] = []

            async def end_beside_a_save(self: RedisSessionStore, *arguments: Any, **options: Any) -> Any:
                ended = await end(self, *arguments, **options)
                session["late"] = 2
                saved.append(asyncio.create_task(session.save()))
                await asyncio.sleep(0)
                return ended

            monkeypatch.setattr(RedisSessionStore, "end", end_beside_a_save)
            await session.login("ada")
            assert await saved[0]

        assert (await browser.on(cluster, work)).status_code == 200
        assert await browser.truth(cluster) == {"old": 1, "late": 2}
        assert (await browser.on(cluster, lambda session: session.user_id)).json() == "ada"


@pytest.mark.parametrize("mine", [["mine"], "mine", None])
async def test_assignment_during_a_login_that_another_request_overtakes(
    redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, mine: object
) -> None:
    """Of the same key, by another task of the request that signs in: its value, or its removal, is kept."""
    create = RedisSessionStore.create

    async with nodes(redis_url, 1, prefix=prefix) as (cluster,):
        browser = Browser()
        await browser.on(cluster, put(old=1, both=["old"]))

        async def work(session: Session) -> None:
            assert session["old"] == 1

            async def create_beside_others(self: RedisSessionStore, *arguments: Any, **options: Any) -> Any:
                monkeypatch.setattr(RedisSessionStore, "create", create)
                created = await create(self, *arguments, **options)
                await browser.tab().on(cluster, put(both=["theirs"], new=["theirs"]))
                if mine is None:
                    del session["both"]
                else:
                    session.update(both=mine, new=mine)
                return created

            monkeypatch.setattr(RedisSessionStore, "create", create_beside_others)
            await session.login("ada")

        assert (await browser.on(cluster, work)).status_code == 200
        kept = {"new": ["theirs"]} if mine is None else {"both": mine, "new": mine}
        assert await browser.truth(cluster) == {"old": 1, **kept}
