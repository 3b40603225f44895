"""What a session is to an app, the same on memory and on Redis."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from asgi_cluster import Cluster, SessionConfig
from tests.sessions.app import Gate, client_for, eventually_shows, make_app, nodes
from tests.support.waiting import eventually

pytestmark = pytest.mark.quick


async def test_session_is_saved_and_read_on_another_node(cluster_url: str, prefix: str) -> None:
    """What one node stores, the other reads, under the same public handle."""
    async with (
        nodes(cluster_url, prefix=prefix) as (first, second),
        client_for(first) as a,
        client_for(second) as b,
    ):
        stored = (await a.post("/put", json={"color": "blue"})).json()
        b.cookies = a.cookies
        seen = (await b.get("/show")).json()
    assert seen["data"] == {"color": "blue"}
    assert seen["handle"] is not None
    assert stored["data"] == seen["data"]


async def test_write_on_one_node_is_seen_on_the_other(cluster_url: str, prefix: str) -> None:
    """A cached entry does not survive a write elsewhere: within the lease after the write's response the
    other node reads the new value.
    """
    async with (
        nodes(cluster_url, prefix=prefix) as (first, second),
        client_for(first) as a,
        client_for(second) as b,
    ):
        await a.post("/put", json={"n": 0})
        b.cookies = a.cookies
        for n in range(1, 20):
            await b.get("/show")
            await a.post("/put", json={"n": n})
            await eventually_shows(b, data={"n": n})


async def test_visit_without_changes_sets_no_cookie(cluster_url: str, prefix: str) -> None:
    """An empty session is not stored: no cookie, no record, and a response that does not vary unless it was
    looked at.
    """
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        looked = await client.get("/show")
        untouched = await client.get("/nothing")
    assert "set-cookie" not in looked.headers
    assert looked.headers["vary"] == "Cookie"
    assert "vary" not in untouched.headers
    assert looked.json()["handle"] is None


async def test_cookie_is_set_once_and_has_safe_attributes(cluster_url: str, prefix: str) -> None:
    """Only the request that creates the session sets the cookie: HttpOnly, Secure, SameSite, __Host-."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        first = await client.post("/put", json={"a": 1})
        second = await client.post("/put", json={"a": 2})
    cookie = first.headers["set-cookie"]
    assert cookie.startswith("__Host-session=")
    assert {"HttpOnly", "Secure", "SameSite=Lax", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    assert "set-cookie" not in second.headers


async def test_nested_change_is_saved(cluster_url: str, prefix: str) -> None:
    """A list inside the session that is appended to counts as a change."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/put", json={"list": []})
        await client.post("/append")
        await client.post("/append")
        assert (await client.get("/show")).json()["data"] == {"list": [1, 1]}


async def test_read_only_request_writes_nothing(cluster_url: str, prefix: str) -> None:
    """Looking at a session does not change its version."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/put", json={"a": 1})
        versions = [(await client.get("/show")).json()["version"] for _ in range(3)]
    assert versions == [1, 1, 1]


async def test_parallel_requests_merge_key_by_key(cluster_url: str, prefix: str) -> None:
    """Two requests that read the same state and change different keys both win."""
    gate = Gate()
    async with (
        nodes(cluster_url, prefix=prefix) as (first, second),
        client_for(first, make_app(gate)) as a,
        client_for(second) as b,
    ):
        await a.post("/put", json={"base": 0})
        b.cookies = a.cookies
        slow = asyncio.create_task(a.post("/put_late", json={"slow": 1}))
        await gate.reached.wait()
        await b.post("/put", json={"fast": 1})
        gate.open.set()
        await slow
        assert (await b.get("/show")).json()["data"] == {"base": 0, "slow": 1, "fast": 1}


async def test_parallel_request_conflicts_when_asked_to(cluster_url: str, prefix: str) -> None:
    """With conflict="error" the later of two parallel writers gets 409 and changes nothing."""
    gate = Gate()
    options = SessionConfig(conflict="error")
    async with (
        nodes(cluster_url, prefix=prefix, sessions=options) as (first, second),
        client_for(first, make_app(gate)) as a,
        client_for(second) as b,
    ):
        await a.post("/put", json={"base": 0})
        b.cookies = a.cookies
        slow = asyncio.create_task(a.post("/put_late", json={"slow": 1}))
        await gate.reached.wait()
        await b.post("/put", json={"fast": 1})
        gate.open.set()
        assert (await slow).status_code == 409
        assert (await b.get("/show")).json()["data"] == {"base": 0, "fast": 1}


@pytest.mark.parametrize("where", ["same node", "another node"])
async def test_request_in_flight_cannot_undo_a_logout(cluster_url: str, prefix: str, where: str) -> None:
    """A request that read the session before the logout and writes after it creates nothing and sets no
    cookie.
    """
    gate = Gate()
    async with (
        nodes(cluster_url, prefix=prefix) as (first, second),
        client_for(first, make_app(gate)) as a,
        client_for(first if where == "same node" else second) as b,
    ):
        await a.post("/login?user=ada")
        b.cookies = httpx.Cookies(a.cookies)
        slow = asyncio.create_task(a.post("/put_late", json={"slow": 1}))
        await gate.reached.wait()
        assert (await b.post("/logout")).json() == {"sessions": 1, "complete": True, "acked": 2}
        gate.open.set()
        response = await slow
        assert response.status_code == 200
        assert "set-cookie" not in response.headers
        assert (await a.get("/show")).json()["user"] is None


async def test_login_makes_the_old_secret_worthless(cluster_url: str, prefix: str) -> None:
    """Session fixation: a cookie planted before the login shows nothing of what comes after it, and within
    the lease no session at all. The data moves along.
    """
    async with (
        nodes(cluster_url, prefix=prefix) as (first, second),
        client_for(first) as victim,
        client_for(second) as thief,
    ):
        await victim.post("/put", json={"cart": [1]})
        thief.cookies = httpx.Cookies(victim.cookies)
        await thief.get("/show")
        logged_in = (await victim.post("/login?user=ada")).json()
        assert logged_in["user"] == "ada"
        assert logged_in["data"] == {"cart": [1]}
        await victim.post("/put", json={"cart": [1, 2]})
        # The end of an anonymous session is not waited for: the other node may serve it as it was.
        seen = (await thief.get("/show")).json()
        assert seen["user"] is None
        assert seen["handle"] != logged_in["handle"]
        assert seen["data"] in ({"cart": [1]}, {})
        await eventually_shows(thief, data={}, user=None, handle=None, new=True, version=0)
        assert (await victim.get("/show")).json()["user"] == "ada"


async def test_login_as_another_user_drops_the_data(cluster_url: str, prefix: str) -> None:
    """What belonged to the one is not shown to the other."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        await client.post("/put", json={"secret": 1})
        assert (await client.post("/login?user=bob")).json()["data"] == {}


async def test_rotate_keeps_parallel_requests_signed_in_for_the_grace(cluster_url: str, prefix: str) -> None:
    """The old secret is good during the grace and dead after it; the new one goes on."""
    options = SessionConfig(rotate_grace=0.3)
    async with (
        nodes(cluster_url, prefix=prefix, sessions=options) as (first, second),
        client_for(first) as a,
        client_for(second) as old,
    ):
        await a.post("/login?user=ada")
        old.cookies = httpx.Cookies(a.cookies)
        await a.post("/rotate")
        assert (await old.get("/show")).json()["user"] == "ada"
        assert (await a.get("/show")).json()["user"] == "ada"

        async def over() -> bool:
            return (await old.get("/show")).json()["user"] is None

        await eventually(over)
        assert (await a.get("/show")).json()["user"] == "ada"


async def test_write_after_logout_starts_a_new_anonymous_session(cluster_url: str, prefix: str) -> None:
    """Same response: the old cookie is replaced by that of a new session that knows no user."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        old = (await client.post("/login?user=ada")).json()["handle"]
        await client.post("/logout_then_write")
        seen = (await client.get("/show")).json()
    assert seen["user"] is None
    assert seen["data"] == {"fresh": True}
    assert seen["handle"] != old


async def test_clear_is_a_logout(cluster_url: str, prefix: str) -> None:
    """The cookie goes, and the session is gone for whoever still has it."""
    async with (
        nodes(cluster_url, prefix=prefix) as (first, second),
        client_for(first) as a,
        client_for(second) as b,
    ):
        await a.post("/login?user=ada")
        b.cookies = httpx.Cookies(a.cookies)
        await b.get("/show")
        response = await a.post("/clear")
        assert "Max-Age=0" in response.headers["set-cookie"]
        assert (await b.get("/show")).json()["user"] is None


async def test_removing_the_last_key_of_an_anonymous_session_ends_it(cluster_url: str, prefix: str) -> None:
    """Empty means no data and no user: nothing is stored any more, and the cookie goes."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/put", json={"a": 1})
        response = await client.post("/remove?key=a")
        assert "Max-Age=0" in response.headers["set-cookie"]
        assert (await client.get("/show")).json()["handle"] is None


async def test_plain_dict_in_the_scope_replaces_the_contents(cluster_url: str, prefix: str) -> None:
    """Litestar's set_session puts a dict there: those are the contents at save time."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/put", json={"a": 1, "b": 2})
        await client.post("/replace", json={"b": 3})
        assert (await client.get("/show")).json()["data"] == {"b": 3}


async def test_unstorable_value_names_its_key(cluster_url: str, prefix: str) -> None:
    """An object that msgpack cannot bring back equal is refused where it is assigned."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        with pytest.raises(TypeError, match=r"session\['thing'\] cannot be stored"):
            await client.post("/unstorable")


@pytest.mark.parametrize("path", ["/late", "/background"])
async def test_change_after_the_response_started_is_an_error(
    cluster_url: str, prefix: str, path: str
) -> None:
    """It could not be saved, so it is not accepted in silence."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        with pytest.raises(RuntimeError, match="after the response started"):
            await client.post(path)


async def test_lock_lets_one_request_in_at_a_time(cluster_url: str, prefix: str) -> None:
    """Twenty parallel increments on two nodes under the session's lock lose none."""
    async with (
        nodes(cluster_url, prefix=prefix) as (first, second),
        client_for(first) as a,
        client_for(second) as b,
    ):
        await a.post("/put", json={"count": 0})
        b.cookies = httpx.Cookies(a.cookies)
        await asyncio.gather(*[client.post("/lock") for client in (a, b) for _ in range(10)])
        assert (await a.get("/show")).json()["data"] == {"count": 20}


async def test_vary_is_appended_to_what_the_app_says(cluster_url: str, prefix: str) -> None:
    """A session that was created makes the response vary, besides whatever it varied on before."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        response = await client.get("/hop")
        assert response.headers["vary"] == "Accept-Encoding"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "null",
        "a.b.c",
        "zz.aaaaaaaaaaaaaaaaaaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
        "00." + "a" * 5000,
        "00.aaaaaaaaaaaaaaaaaaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
        "00.aaaaaaaaaaaaaaaaaaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
        "%00%ff",
        '"quoted"',
        "x=y=z",
    ],
)
async def test_malformed_or_unknown_cookie_is_no_session(cluster_url: str, prefix: str, value: str) -> None:
    """It is as if there were no cookie: nothing is adopted, nothing fails, and the response does not touch
    the cookie.
    """
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        response = await client.get("/show", headers={"cookie": f"__Host-session={value}"})
        assert response.json()["handle"] is None
        assert "set-cookie" not in response.headers


async def test_wrong_secret_is_an_unknown_session(cluster_url: str, prefix: str) -> None:
    """Knowing the public handle, which is safe to show, opens nothing."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        (value,) = client.cookies.values()
        bucket, token, secret = value.split(".")
        wrong = ("A" if secret[0] != "A" else "B") + secret[1:]
        client.cookies.clear()
        response = await client.get("/show", headers={"cookie": f"__Host-session={bucket}.{token}.{wrong}"})
        assert response.json()["user"] is None


async def test_cookie_of_a_longer_name_is_not_ours(cluster_url: str, prefix: str) -> None:
    """``x__Host-session=…`` does not pass for ``__Host-session=…``, wherever it stands."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/login?user=ada")
        (value,) = client.cookies.values()
        client.cookies.clear()
        decoy = await client.get("/show", headers={"cookie": f"x__Host-session={value}; other=1"})
        real = await client.get(
            "/show", headers={"cookie": f"other=1; x__Host-session=z; __Host-session={value}"}
        )
    assert decoy.json()["user"] is None
    assert real.json()["user"] == "ada"


async def test_second_and_later_reads_come_from_the_cache(cluster_url: str, prefix: str) -> None:
    """A thousand reads of one session cost one read of the store."""
    async with nodes(cluster_url, 1, prefix=prefix) as (cluster,), client_for(cluster) as client:
        await client.post("/put", json={"a": 1})
        # Before the answer to its first heartbeat a node keeps nothing.
        await eventually(lambda: cluster.stats().bus.lease_remaining > 0)
        await client.get("/show")
        before = cluster.stats().cache
        for _ in range(1000):
            await client.get("/show")
            await asyncio.sleep(0)  # nothing in a cached read waits, and the lease needs its heartbeats
        after = cluster.stats().cache
    assert after.hits - before.hits >= 999
    assert after.misses - before.misses <= 1


async def test_users_sessions_are_listed_and_ended(cluster_url: str, prefix: str) -> None:
    """Everything of a user on one page; log out everywhere but here ends the others on all nodes."""
    async with (
        nodes(cluster_url, prefix=prefix) as (first, second),
        client_for(first) as laptop,
        client_for(second) as phone,
    ):
        here = (await laptop.post("/login?user=ada", headers={"user-agent": "laptop"})).json()["handle"]
        await phone.post("/login?user=ada", headers={"user-agent": "phone"})
        listed = await first.user("ada").sessions()
        assert {info.agent for info in listed} == {"laptop", "phone"}
        receipt = await second.user("ada").logout(exclude=here)
        assert receipt.sessions == 1
        assert receipt.complete
        assert (await phone.get("/show")).json()["user"] is None
        assert (await laptop.get("/show")).json()["user"] == "ada"
        assert [info.handle for info in await second.user("ada").sessions()] == [here]
        assert (await second.user("ada").session(here).logout()).sessions == 1
        assert (await laptop.get("/show")).json()["user"] is None


async def test_memory_needs_no_start() -> None:
    """An app under memory:// works without lifespan."""
    async with client_for(Cluster("memory://")) as client:
        await client.post("/put", json={"a": 1})
        assert (await client.get("/show")).json()["data"] == {"a": 1}


@pytest.mark.parametrize(
    ("value", "stored"),
    [((1, (2,)), [1, [2]]), (b"\x00", b"\x00"), (None, None), (2**63, 2**63), ({"a": {1: 2}}, {"a": {1: 2}})],
)
def test_values_that_come_back_equal_are_storable(value: Any, stored: Any) -> None:
    """Tuples come back as lists; everything else as it was."""
    import msgspec

    from asgi_cluster.sessions.codec import encode_value

    assert msgspec.msgpack.decode(encode_value("k", value)) == stored


@pytest.mark.parametrize("value", [{1, 2}, object(), 2**70, float("nan"), {"a": {1}}, Exception()])
def test_values_that_would_change_are_refused(value: Any) -> None:
    """The error names the key."""
    from asgi_cluster.sessions.codec import encode_value

    with pytest.raises(TypeError, match=r"session\['k'\]"):
        encode_value("k", value)
