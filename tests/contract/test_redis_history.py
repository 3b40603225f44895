"""What the history store does to a Redis, and what becomes of it when that Redis loses its last writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
import redis

from asgi_cluster.exceptions import BusUnavailable
from asgi_cluster.rooms.history import JUMP, Position, open_envelope
from tests.contract.sites import TIMEOUT, Site
from tests.contract.test_history import payloads, publish, read
from tests.support.servers import start_valkey
from tests.support.waiting import eventually

AT_ONCE = ("--repl-diskless-sync-delay", "0")

USUAL = """
local epoch = redis.call('HGET', KEYS[2], 'e')
if not epoch then
  epoch = ARGV[2]
  redis.call('HSET', KEYS[2], 'e', epoch)
end
local offset = redis.call('HINCRBY', KEYS[2], 's', 1)
redis.call('XADD', KEYS[1], 'MAXLEN', '=', 100, offset, 'd', ARGV[1])
return {offset, epoch}
"""
"""What others do: count, append. A position is recovered when its epoch is the stream's and it is not too
old.
"""


@pytest.fixture
def server(server_site: Site) -> Iterator[redis.Redis]:
    """A look behind the store's back."""
    with redis.Redis.from_url(server_site.url) as client:
        yield client


def usual_publish(server: redis.Redis, payload: bytes) -> tuple[int, bytes]:
    offset, epoch = server.eval(USUAL, 2, "u:{u}:log", "u:{u}:meta", payload, "E")
    return offset, epoch


def usual_recover(server: redis.Redis, offset: int, epoch: bytes) -> tuple[bool, list[bytes]]:
    now, top = server.hmget("u:{u}:meta", "e", "s")
    entries = server.xrange("u:{u}:log", offset + 1, "+")
    oldest = int(entries[0][0].split(b"-")[0]) if entries else int(top) + 1
    recovered = now == epoch and offset <= int(top) and oldest == offset + 1
    return recovered, [values[b"d"] for _, values in entries]


async def test_offsets_after_a_failover(stack: AsyncExitStack) -> None:
    """A replica that missed the last messages takes over: a reader that has them gets an incomplete history.
    The usual script would say that nothing is missing, and return other messages under their numbers.
    """
    first = stack.enter_context(start_valkey(*AT_ONCE))
    second = stack.enter_context(start_valkey(*AT_ONCE))
    one = stack.enter_context(redis.Redis.from_url(first.url))
    two = stack.enter_context(redis.Redis.from_url(second.url))
    old = (await Site("valkey", first.url, "p", stack).node()).backend.history
    shared = [await publish(old, b"%d" % n, size=100) for n in range(1, 4)]
    for n in range(1, 4):
        usual_publish(one, b"%d" % n)

    two.replicaof("127.0.0.1", first.port)
    await eventually(lambda: two.info("replication")["master_link_status"] == "up", timeout=15)
    await eventually(
        lambda: two.info("replication")["slave_repl_offset"] == one.info("replication")["master_repl_offset"]
    )
    two.replicaof("NO", "ONE")

    lost = [await publish(old, b"lost %d" % n, size=100) for n in range(4, 7)]
    usual_lost = [usual_publish(one, b"lost %d" % n) for n in range(4, 7)]
    member = await Site("valkey", second.url, "p", stack).node()
    new = member.backend.history
    await member.backend.room_bus.subscribe("r")

    # Before anything is published there: the top is what was replicated, and no position may be beyond it.
    assert (await read(new, shared[-1])).complete
    assert not (await read(new, lost[-1])).complete

    fresh = [await publish(new, b"new %d" % n, size=100) for n in range(4, 9)]
    for n in range(4, 9):
        usual_publish(two, b"new %d" % n)

    assert usual_recover(two, *usual_lost[-1]) == (True, [b"new 7", b"new 8"])  # and where are 4, 5 and 6?
    for position in lost:
        assert not (await read(new, position)).complete
    assert [position.offset - fresh[0].offset for position in fresh] == [0, 1, 2, 3, 4]
    assert fresh[0].offset >= shared[-1].offset + JUMP
    assert {position.epoch for position in fresh} == {shared[0].epoch}

    # Who had seen no more than the replica goes on across the jump, live and by recovery.
    page = await read(new, shared[1])
    assert page.complete
    assert payloads(page) == [b"3", b"new 4", b"new 5", b"new 6", b"new 7", b"new 8"]
    await eventually(lambda: len(member.heard.rooms) == 5)
    chain = [open_envelope(envelope) for _, envelope in member.heard.rooms]
    assert [previous for _, previous, _ in chain] == [
        position.offset for position in (shared[-1], *fresh[:-1])
    ]


async def test_offsets_after_a_failover_and_back(stack: AsyncExitStack) -> None:
    """The old primary, never restarted, is resynchronised and takes over again: it does not reuse the numbers
    that it had given out in its first term. The run id is still the same, and would not show it.
    """
    first = stack.enter_context(start_valkey(*AT_ONCE))
    second = stack.enter_context(start_valkey(*AT_ONCE))
    one = stack.enter_context(redis.Redis.from_url(first.url))
    two = stack.enter_context(redis.Redis.from_url(second.url))
    history = (await Site("valkey", first.url, "p", stack).node()).backend.history
    shared = await publish(history, b"1")
    two.replicaof("127.0.0.1", first.port)
    await eventually(lambda: two.info("replication")["master_link_status"] == "up", timeout=15)
    await eventually(lambda: two.exists("p:{room:r}:meta"))
    two.replicaof("NO", "ONE")
    lost = await publish(history, b"lost")
    run_id = one.info("server")["run_id"]
    one.replicaof("127.0.0.1", second.port)
    await eventually(lambda: one.info("replication")["master_link_status"] == "up", timeout=15)
    one.replicaof("NO", "ONE")
    assert one.info("server")["run_id"] == run_id

    again = (await Site("valkey", first.url, "p", stack).node()).backend.history
    fresh = await publish(again, b"other")
    assert fresh.epoch == lost.epoch == shared.epoch
    assert fresh.offset >= shared.offset + JUMP
    assert not (await read(again, lost)).complete
    assert payloads(await read(again, shared)) == [b"other"]


async def test_positions_across_two_failovers(server_site: Site, server: redis.Redis) -> None:
    """A position that the first lost primary gave out is not taken for an old one after the second failover
    either.
    """
    history = (await server_site.node()).backend.history
    meta = f"{server_site.prefix}:{{room:r}}:meta"
    start = await publish(history, b"1")
    server.hset(meta, "run", "another")
    await publish(history, b"2")
    server.hset(meta, "run", "yet another")
    await publish(history, b"3")
    phantom = Position(start.offset + 3, start.epoch)
    assert not (await read(history, phantom)).complete
    page = await read(history, start)
    assert (payloads(page), page.complete) == ([b"2", b"3"], True)
    assert page.top.offset >= start.offset + 2 + 2 * JUMP


async def test_numbers_that_run_out(server_site: Site, server: redis.Redis) -> None:
    """Before offsets stop being exact in a browser the room gets a new epoch, and reads from old positions
    are not complete.
    """
    history = (await server_site.node()).backend.history
    meta = f"{server_site.prefix}:{{room:r}}:meta"
    start = await publish(history, b"1")
    server.hset(meta, mapping={"run": "another", "offset": 2**52})
    assert await publish(history, b"2", epoch="fresh") == Position(1, "fresh")
    assert payloads(await read(history)) == [b"2"]
    assert not (await read(history, start)).complete


async def test_offsets_after_a_restart_with_an_older_snapshot(stack: AsyncExitStack) -> None:
    """A server that comes back without its last second of writes does not hand out their numbers again."""
    server = stack.enter_context(start_valkey())
    client = stack.enter_context(redis.Redis.from_url(server.url))
    history = (await Site("valkey", server.url, "p", stack).node()).backend.history
    kept = await publish(history, b"kept")
    client.save()
    lost = await publish(history, b"lost")
    client.close()
    server.kill()
    server.restart(data=True)
    again = (await Site("valkey", server.url, "p", stack).node()).backend.history
    fresh = await publish(again, b"other")
    assert fresh.epoch == kept.epoch
    assert fresh.offset >= kept.offset + JUMP
    assert not (await read(again, lost)).complete
    assert (await read(again, kept)).complete


async def test_log_without_its_numbering(server_site: Site, server: redis.Redis) -> None:
    """Evicted meta: the log is worth nothing, a new epoch begins, and reads from positions of the old
    one are not complete.
    """
    history = (await server_site.node()).backend.history
    before = await publish(history, b"1")
    server.delete(f"{server_site.prefix}:{{room:r}}:meta")
    page = await read(history)
    assert (page.entries, page.top.offset) == ([], 0)
    assert page.top.epoch != before.epoch
    server.delete(f"{server_site.prefix}:{{room:r}}:meta")
    after = await publish(history, b"2")
    assert payloads(await read(history)) == [b"2"]
    assert not (await read(history, before)).complete
    assert after.epoch != before.epoch


async def test_log_without_its_numbering_in_the_same_epoch(server_site: Site, server: redis.Redis) -> None:
    """All rooms begin in one epoch. A position of the lost numbering is no position of the next, however far
    that has come.
    """
    history = (await server_site.node()).backend.history
    before = [await publish(history, b"old %d" % n, epoch="e") for n in range(5)]
    server.delete(f"{server_site.prefix}:{{room:r}}:meta")
    for n in range(10):
        assert (await publish(history, b"new %d" % n, epoch="e")).epoch == "e"
    for position in before:
        assert not (await read(history, position)).complete


async def test_reading_rooms_stores_nothing(server_site: Site, server: redis.Redis) -> None:
    """Whoever may subscribe can name rooms without end: a room in which nothing was published has no key."""
    history = (await server_site.node()).backend.history
    before = set(server.scan_iter(f"{server_site.prefix}:*"))
    for n in range(50):
        page = await read(history, room=f"r{n}", epoch="e")
        await read(history, page.top, room=f"r{n}", epoch="e")
    assert set(server.scan_iter(f"{server_site.prefix}:*")) <= before


@pytest.mark.parametrize("key", ["log", "meta"])
async def test_room_keys_that_are_something_else(server_site: Site, server: redis.Redis, key: str) -> None:
    """A foreign value in the place of a room's key does not break the room for ever."""
    history = (await server_site.node()).backend.history
    await publish(history, b"1")
    name = f"{server_site.prefix}:{{room:r}}:{key}"
    server.delete(name)
    server.set(name, "x")
    await publish(history, b"2")
    assert payloads(await read(history)) == [b"2"]


async def test_log_that_is_ahead_of_its_numbering(server_site: Site, server: redis.Redis) -> None:
    """Meta of an older time than the log: the log is dropped rather than the publication."""
    history = (await server_site.node()).backend.history
    first = await publish(history, b"1")
    server.xadd(f"{server_site.prefix}:{{room:r}}:log", {"p": "8", "d": "ahead"}, id=f"{first.offset + 8}-0")
    assert (await publish(history, b"2")).offset == first.offset + 1
    page = await read(history)
    assert payloads(page) == [b"2"]
    assert (await read(history, first)).complete


async def test_keys_of_a_room_expire(server_site: Site, server: redis.Redis) -> None:
    """Nothing of a room stays for ever: log, numbering, results of idempotency keys."""
    node = await server_site.node()
    await publish(node.backend.history, b"1", idempotency_key="k", ttl=100)
    await read(node.backend.history, room="only read")
    lives = {
        key.decode().split("}:")[1]: server.pttl(key)
        for key in server.scan_iter(f"{server_site.prefix}:{{room:*")
    }
    assert set(lives) == {"log", "meta", "once:k"}
    assert lives["log"] == pytest.approx(100_000, abs=2000)
    assert lives["once:k"] == pytest.approx(300_000, abs=2000)
    assert lives["meta"] == pytest.approx(100_000 + 86_400_000, abs=2000)
    server.pexpire(f"{server_site.prefix}:{{room:r}}:meta", 5000)
    await read(node.backend.history, limit=0)
    assert server.pttl(f"{server_site.prefix}:{{room:r}}:meta") > 86_400_000


async def test_publication_that_is_refused(server_site: Site, server: redis.Redis) -> None:
    """Without the right to the channel nothing is remembered either, and no number is lost."""
    history = (await server_site.node()).backend.history
    first = await publish(history, b"1")
    server.execute_command("ACL", "SETUSER", "default", "resetchannels")
    try:
        with pytest.raises(BusUnavailable) as failed:
            await publish(history, b"no")
        assert not failed.value.outcome_unknown
    finally:
        server.execute_command("ACL", "SETUSER", "default", "allchannels")
    assert await publish(history, b"2") == Position(first.offset + 1, first.epoch)
    assert payloads(await read(history)) == [b"1", b"2"]


async def test_publication_when_memory_is_full(stack: AsyncExitStack) -> None:
    """Neither published nor remembered; afterwards the chain goes on without a hole."""
    full = stack.enter_context(start_valkey())
    server = stack.enter_context(redis.Redis.from_url(full.url))
    node = await Site("valkey", full.url, "full", stack).node()
    await node.backend.room_bus.subscribe("r")
    await publish(node.backend.history, b"1")
    server.config_set("maxmemory", "1")
    with pytest.raises(BusUnavailable, match="OOM"):
        await publish(node.backend.history, b"no")
    server.config_set("maxmemory", "0")
    await publish(node.backend.history, b"2")
    await eventually(lambda: len(node.heard.rooms) == 2)
    assert [open_envelope(envelope)[2] for _, envelope in node.heard.rooms] == [b"1", b"2"]
    assert payloads(
        await node.backend.history.read("r", since=None, limit=None, epoch="e", ttl=100, timeout=TIMEOUT)
    ) == [b"1", b"2"]
