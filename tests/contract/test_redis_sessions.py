"""What the session store does to a Redis: keys, round trips, and records that are not as we left them."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.single import single_server
from asgi_cluster.backends.redis.store import RedisSessionStore
from asgi_cluster.backends.redis.urls import parse_target
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import UserId, bucket_of, new_handle
from asgi_cluster.sessions.store import LOGOUT_KEPT
from tests.contract.drafts import alive, create, end, end_all, rotate, write
from tests.contract.sites import TIMEOUT, Member, Site
from tests.support.servers import start_valkey
from tests.support.waiting import eventually


@pytest.fixture
def server(server_site: Site) -> Iterator[redis.Redis]:
    """A look behind the store's back."""
    with redis.Redis.from_url(server_site.url) as client:
        yield client


def keys(server: redis.Redis, site: Site) -> Counter[str]:
    """How many keys there are of each kind: s, e, i, l."""
    return Counter(
        key.decode().split(":")[2]
        for key in set(server.scan_iter(f"{site.prefix}:*", count=1000))  # SCAN may give one twice
        if b"{nodes}" not in key
    )


def key_of(site: Site, handle: str) -> str:
    return f"{site.prefix}:{{{handle[:2]}}}:s:{handle[3:]}"


async def test_keys_after_five_thousand_logins(server_site: Site, server: redis.Redis) -> None:
    """Logins that end and that expire leave nothing, those that are logged out everywhere the user's epoch
    for a day; what lives has one record each.
    """
    store = (await server_site.node()).backend.store
    living = [await create(store, f"user-{n}", idle=90) for n in range(50)]
    for n in range(4950):
        made = await create(store, f"user-{n % 100}", idle=0.05 if n % 3 == 0 else 60, absolute=60)
        if n % 3 == 1:
            await end(store, made.handle)
    for n in range(50, 100):
        await end_all(store, f"user-{n}")
    for n in range(50):
        await end_all(store, f"user-{n}", keep=living[n].handle)

    await eventually(lambda: keys(server, server_site) == {"s": 50, "e": 100, "i": 50})
    for n in range(50):
        bucket = f"{bucket_of(f'user-{n}'):02x}"
        assert server.zcard(f"{server_site.prefix}:{{{bucket}}}:i:user-{n}") == 1
    everything = set(server.scan_iter(f"{server_site.prefix}:{{??}}:*"))
    assert len(everything) == 200
    assert all(0 < server.pttl(key) <= LOGOUT_KEPT * 1000 for key in everything)


async def test_index_of_a_user_whose_sessions_expire(server_site: Site, server: redis.Redis) -> None:
    """One who only ever lets sessions run out does not collect them in the index: the next login prunes
    it.
    """
    store = (await server_site.node()).backend.store
    index = f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:i:ann"
    for _ in range(100):
        await create(store, "ann", idle=0.02)

    async def pruned() -> bool:
        await create(store, "ann", idle=0.02)
        return int(server.zcard(index)) < 20

    await eventually(pruned)


async def test_index_follows_the_idle_time(server_site: Site, server: redis.Redis) -> None:
    """Touching and writing move a session's place in the index, so that a living one is never pruned."""
    store = (await server_site.node()).backend.store
    index = f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:i:ann"
    made = await create(store, "ann", idle=50)
    token = made.handle[3:]

    for change in (lambda: store.touch(made.handle, timeout=TIMEOUT), lambda: write(store, made.handle)):
        server.zadd(index, {token: 1})
        await change()
        seconds, micros = server.time()
        assert server.zscore(index, token) == pytest.approx((seconds + micros / 1e6 + 50) * 1000, abs=3000)


async def test_epoch_outlives_the_longest_session(server_site: Site, server: redis.Redis) -> None:
    """A short session made after a long one does not shorten the life of the nonce that both need."""
    store = (await server_site.node()).backend.store
    long = await create(store, "ann", idle=900, absolute=100_000)
    await create(store, "ann", idle=1, absolute=2)
    epoch = f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:e:ann"
    assert server.pttl(epoch) > 99_990_000
    await end_all(store, "ann", keep=long.handle)
    assert 99_990_000 < server.pttl(epoch) <= 100_000_000


@pytest.mark.parametrize("keeps", [True, False])
async def test_epoch_outlives_what_a_logout_is_looked_for(
    server_site: Site, server: redis.Redis, keeps: bool
) -> None:
    """However short the session that was kept, and the next one."""
    store = (await server_site.node()).backend.store
    short = await create(store, "ann", idle=5, absolute=10)
    epoch = f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:e:ann"
    await end_all(store, "ann", keep=short.handle if keeps else None)
    await create(store, "ann", idle=1, absolute=2)
    assert 0 <= LOGOUT_KEPT * 1000 - server.pttl(epoch) < 10_000


@pytest.mark.parametrize("how", ["no text", "no number", "too long", "no string", "clock set back"])
async def test_epoch_that_was_tampered_with_is_no_logout(
    server_site: Site, server: redis.Redis, how: str
) -> None:
    """Nor does it hide another user's; the next logout goes as ever."""
    store = (await server_site.node()).backend.store
    await end_all(store, "bob")
    epoch = f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:e:ann"
    match how:
        case "no text":
            server.set(epoch, b"\xff 1 a 1")
        case "no number":
            server.set(epoch, "id now  ")
        case "too long":
            server.set(epoch, f"id {'9' * 400}  ")
        case "no string":
            server.rpush(epoch, "id 1  ")
        case _:
            server.set(epoch, f"id {(time.time() + 100) * 1000:.0f}  ")
    users = [UserId("ann"), UserId("bob")]
    assert set(await store.logouts(users, timeout=TIMEOUT)) == {"bob"}
    await end_all(store, "ann", keep=new_handle(None))
    assert set(await store.logouts(users, timeout=TIMEOUT)) == {"ann", "bob"}


async def test_clock_set_back_between_two_logouts(server_site: Site, server: redis.Redis) -> None:
    """The earlier one seems to lie ahead: it closes no socket of the session that the last one has kept."""
    store = (await server_site.node()).backend.store
    epoch = f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:e:ann"
    now, kept = int(time.time() * 1000), new_handle(None)
    server.set(epoch, f"id {now - 1000} {kept} {now + 100_000}")
    logout = (await store.logouts([UserId("ann")], timeout=TIMEOUT))[UserId("ann")]
    assert (logout.keep, logout.before) == (kept, None)


async def test_session_whose_epoch_is_missing(server_site: Site, server: redis.Redis) -> None:
    """An evicted or deleted nonce means revoked, for every operation; a new login does not bring the old ones
    back.
    """
    store = (await server_site.node()).backend.store
    made = await create(store, "ann")
    server.delete(f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:e:ann")
    await create(store, "ann")
    assert not await alive(store, made.handle)
    assert await write(store, made.handle) == "gone"
    assert not await store.touch(made.handle, timeout=TIMEOUT)
    assert await rotate(store, made.handle, made.secret, b"n" * 32) == "gone"
    assert len(await store.devices(UserId("ann"), timeout=TIMEOUT)) == 1
    assert (await end(store, made.handle)).sessions == 0
    assert not server.exists(key_of(server_site, made.handle))


async def test_log_out_everywhere_without_the_index(server_site: Site, server: redis.Redis) -> None:
    """The epoch alone revokes: a lost index leaves no session alive, and the kept one lives."""
    store = (await server_site.node()).backend.store
    mine = [await create(store, "ann") for _ in range(3)]
    server.delete(f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:i:ann")
    await end_all(store, "ann", keep=mine[0].handle)
    assert [await alive(store, made.handle) for made in mine] == [True, False, False]
    assert [d.handle for d in await store.devices(UserId("ann"), timeout=TIMEOUT)] == [mine[0].handle]
    server.delete(f"{server_site.prefix}:{{{bucket_of('ann'):02x}}}:i:ann")
    await end_all(store, "ann")
    assert not await alive(store, mine[0].handle)
    await create(store, "ann")
    assert not await alive(store, mine[0].handle)


DAMAGE: dict[str, Callable[[redis.Redis, str], object]] = {
    "a string": lambda server, key: (server.delete(key), server.set(key, "x", ex=100)),
    "a list": lambda server, key: (server.delete(key), server.rpush(key, "x")),
    "no secret": lambda server, key: server.hdel(key, "@secret"),
    "no version": lambda server, key: server.hdel(key, "@ver"),
    "no absolute timeout": lambda server, key: server.hdel(key, "@abs"),
    "a word for a number": lambda server, key: server.hset(key, "@idle", "soon"),
    "a number that is too long": lambda server, key: server.hset(key, "@created", "9" * 400),
    "a broken creation time": lambda server, key: server.hset(key, "@created", "x"),
    "a write id that is no text": lambda server, key: server.hset(key, "@write", b"\xff\xfe"),
    "a field name that is no text": lambda server, key: server.hset(key, b".\xff\xfe", "x"),
    "foreign fields only": lambda server, key: (server.delete(key), server.hset(key, "a", "b")),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
async def test_corrupt_record(
    server_site: Site, server: redis.Redis, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A record that cannot be understood is logged by its handle, counted, and treated as missing; it can be
    ended.
    """
    member: Member = await server_site.node()
    store: Any = member.backend.store
    made = await create(store, "ann", fields={"name": b"\xa6secret"})
    other = await create(store, "ann")
    key = key_of(server_site, made.handle)
    DAMAGE[damage](server, key)
    with caplog.at_level(logging.ERROR, "asgi_cluster"):
        assert not await alive(store, made.handle)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert made.handle in caplog.text
    assert "secret" not in caplog.text.replace("no secret", "")
    assert store.corrupt == 1
    assert await alive(store, other.handle)
    await store.devices(UserId("ann"), timeout=TIMEOUT)
    if damage in ("a string", "a list", "no secret", "no absolute timeout", "a word for a number"):
        assert await write(store, made.handle) == "gone"
        assert not await store.touch(made.handle, timeout=TIMEOUT)
        assert await rotate(store, made.handle, made.secret, b"n" * 32) == "gone"
        assert store.corrupt == 4
    await end(store, made.handle)
    assert not server.exists(key)
    assert (await end_all(store, "ann")).sessions == 1


async def test_record_without_expiry(server_site: Site, server: redis.Redis) -> None:
    """A PERSIST by hand does not make a session immortal: its own timeouts are in the record."""
    store = (await server_site.node()).backend.store
    made = await create(store, idle=50, absolute=0.3)
    server.persist(key_of(server_site, made.handle))
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is None or record.expires_in <= 0.3

    async def over() -> bool:
        return not await alive(store, made.handle) and await write(store, made.handle) == "gone"

    await eventually(over)


async def test_commands_per_operation(server_site: Site, server: redis.Redis) -> None:
    """One round trip each: one EVALSHA, or one SET for the lock."""
    store = (await server_site.node()).backend.store
    made = await create(store, "ann")
    steps: dict[str, Callable[[], Awaitable[object]]] = {
        "create": lambda: create(store, "ann"),
        "read": lambda: alive(store, made.handle),
        "write": lambda: write(store, made.handle),
        "touch": lambda: store.touch(made.handle, timeout=TIMEOUT),
        "rotate": lambda: rotate(store, made.handle, made.secret, made.secret),
        "devices": lambda: store.devices(UserId("ann"), timeout=TIMEOUT),
        "lock": lambda: store.lock(made.handle, token="t", hold=10, timeout=TIMEOUT),
        "unlock": lambda: store.unlock(made.handle, token="t", timeout=TIMEOUT),
        "end_all": lambda: end_all(store, "ann", keep=made.handle),
        "logouts": lambda: store.logouts([UserId("ann"), UserId("bob")], timeout=TIMEOUT),
        "end": lambda: end(store, made.handle),
    }
    for step in steps.values():
        await step()  # also loads the scripts
    made = await create(store, "ann")
    used: dict[str, list[str]] = {}
    for name, step in steps.items():
        with server.monitor() as watching:
            await step()
            server.echo("over")
            used[name] = _commands(watching, server_site.prefix)
    assert used == {name: ["SET"] if name == "lock" else ["EVALSHA"] for name in steps}


def _commands(watching: redis.client.Monitor, prefix: str) -> list[str]:
    # What came over a connection and is about a bucket: not the heartbeat, and not what scripts call.
    commands: list[str] = []
    for seen in watching.listen():
        if seen["command"] == "ECHO over":
            return commands
        if seen["client_type"] != "lua" and re.search(
            re.escape(prefix) + r":\{[0-9a-f]{2}\}:", seen["command"]
        ):
            commands.append(seen["command"].split()[0].upper())
    raise AssertionError("the connection was closed")


async def test_channel_that_is_refused(server_site: Site, server: redis.Redis) -> None:
    """A user who may not publish changes nothing silently: write, rotate, end and log out everywhere fail as
    a whole.
    """
    member = await server_site.node()
    store = member.backend.store
    made = await create(store, "ann")
    server.execute_command("ACL", "SETUSER", "default", "resetchannels")
    try:
        attempts: list[Callable[[], Awaitable[object]]] = [
            lambda: write(store, made.handle),
            lambda: rotate(store, made.handle, made.secret, b"n" * 32),
            lambda: end(store, made.handle),
            lambda: end_all(store, "ann"),
        ]
        for attempt in attempts:
            with pytest.raises(StoreUnavailable) as failed:
                await attempt()
            assert not failed.value.outcome_unknown
    finally:
        server.execute_command("ACL", "SETUSER", "default", "allchannels")
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert (record.version, record.write_id, dict(record.fields)) == (1, made.write_id, dict(made.fields))


async def test_memory_that_is_full(stack: AsyncExitStack) -> None:
    """A full server refuses new sessions and writes as a whole; it still reads, touches and logs out."""
    full = stack.enter_context(start_valkey())
    server = stack.enter_context(redis.Redis.from_url(full.url))
    store = (await Site("valkey", full.url, "full", stack).node()).backend.store
    made, kept = await create(store, "ann"), await create(store, "ann")
    server.config_set("maxmemory", "1")
    for attempt in (lambda: create(store), lambda: write(store, made.handle, removed=["theme"])):
        with pytest.raises(StoreUnavailable, match="OOM") as failed:
            await attempt()
        assert not failed.value.outcome_unknown
    record = await store.read(made.handle, timeout=TIMEOUT)
    assert record is not None
    assert (record.version, dict(record.fields)) == (1, dict(made.fields))
    assert await store.touch(made.handle, timeout=TIMEOUT)
    assert (await end_all(store, "ann", keep=kept.handle)).sessions == 1
    assert [await alive(store, each.handle) for each in (made, kept)] == [False, True]
    assert (await end_all(store, "ann", keep=kept.handle)).sessions == 0
    assert await alive(store, kept.handle)
    assert (await end(store, kept.handle)).sessions == 1
    assert (await end_all(store, "ann", epoch="last")).sessions == 0
    assert (await store.logouts([UserId("ann")], timeout=TIMEOUT))[UserId("ann")].id == "last"


async def test_replicas_that_confirm_a_logout(stack: AsyncExitStack) -> None:
    """With ``wait_replicas`` the receipt says how many have it; one that does not answer is not counted,
    and holds up nothing for long.
    """
    primary = stack.enter_context(start_valkey("--repl-diskless-sync-delay", "0"))
    replica = stack.enter_context(start_valkey("--replicaof", "127.0.0.1", str(primary.port)))
    topology = single_server(parse_target(primary.url).primary)
    await stack.enter_async_context(topology.opened())
    names = Names("p")
    store = RedisSessionStore(topology, names, wait_replicas=1)
    behind = replica.client()
    await eventually(lambda: behind.info("replication")["master_link_status"] == "up", timeout=15)

    made = await create(store, "ann")
    assert (await end(store, made.handle)).replicas == 1
    assert not behind.exists(names.session(made.handle))
    await create(store, "ann")
    assert (await end_all(store, "ann")).replicas == 1

    made, other = await create(store, "ann"), await create(store, "ann")
    replica.pause()
    try:
        started = time.monotonic()
        assert (await end(store, made.handle)).replicas == 0
        assert time.monotonic() - started < 1
    finally:
        replica.resume()
    assert (await end(RedisSessionStore(topology, names), other.handle)).replicas is None
