"""One connection, multiplexed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import ResponseError

from asgi_cluster.backends.redis.address import Address
from asgi_cluster.backends.redis.connection import MultiplexedConnection, OnPush
from asgi_cluster.backends.redis.errors import ConnectionBroken, first_word
from tests.bus.fake import FakeServer, bulk, push
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("parser")


@asynccontextmanager
async def linked(url: str, on_push: OnPush | None = None) -> AsyncIterator[MultiplexedConnection]:
    link = await Address(url).dial(on_push)
    running = asyncio.ensure_future(link.run())
    try:
        yield link
    finally:
        running.cancel()
        await asyncio.wait([running])
        await link.close()
        if not running.cancelled():
            running.exception()


async def test_commands_of_one_tick_go_out_in_one_write() -> None:
    """A hundred commands issued at once are one write, and each gets its own reply."""
    async with FakeServer() as server, linked(server.url) as link:
        before = server.reads
        replies = await asyncio.gather(*[link.send("PING", f"{n}") for n in range(100)])
        assert replies == [b"%d" % n for n in range(100)]
        assert server.reads == before + 1


async def test_a_caller_that_gives_up_leaves_the_link_usable(valkey: Server) -> None:
    """Its late reply is dropped, and the next command gets its own."""
    async with Proxy(valkey.url) as proxy, linked(proxy.url) as link:
        proxy.stall("down")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await link.send("ECHO", "late")
        next_one = link.send("ECHO", "next")
        proxy.heal()
        assert await next_one == b"next"


async def test_a_broken_link_fails_what_waits_as_unknown(valkey: Server) -> None:
    """Whoever waits learns that the outcome is unknown; whoever comes later, that nothing was sent."""
    async with Proxy(valkey.url) as proxy, linked(proxy.url) as link:
        proxy.stall("down")
        waiting = link.send("INCR", "x")
        await asyncio.sleep(0)
        proxy.cut()
        with pytest.raises(ConnectionBroken) as unknown:
            await waiting
        assert unknown.value.sent
        with pytest.raises(ConnectionBroken) as refused:
            link.send("INCR", "x")
        assert not refused.value.sent


async def test_pushes_come_before_the_reply_that_follows_them(valkey: Server, prefix: str) -> None:
    """What was published before a command ran has been handed over when its reply is: the echo's ground."""
    seen: list[bytes] = []
    async with (
        linked(valkey.url, lambda kind, channel, payload: seen.append(payload)) as link,
        linked(valkey.url) as other,
    ):
        await link.subscribe("SUBSCRIBE", [[prefix]])
        for n in range(300):
            published = other.send("PUBLISH", prefix, n)
            link.post("PING")
            await published
            await link.send("PING")
            assert seen[-1] == b"%d" % n
    assert len(seen) == 300


async def test_error_replies_belong_to_their_command(valkey: Server, prefix: str) -> None:
    """An error is one reply, also the ones that redis-py calls connection errors."""
    async with linked(valkey.url) as link:
        wrong, right = link.send("INCRBY", prefix, "x"), link.send("ECHO", "right")
        with pytest.raises(ResponseError):
            await wrong
        assert await right == b"right"
    loading_reply = b"-LOADING Redis is loading the dataset in memory\r\n"
    async with FakeServer({b"GET": loading_reply}) as server, linked(server.url) as link:
        loading, right = link.send("GET", "x"), link.send("PING", "right")
        with pytest.raises(Exception, match="loading") as error:
            await loading
        assert first_word(error.value) == "LOADING"
        assert await right == b"right"


async def test_a_refused_subscription_names_its_channels() -> None:
    """Each command of a batch has an outcome of its own."""

    def answer(command: list[bytes]) -> bytes | None:
        return b"-MOVED 1 127.0.0.1:1\r\n" if command[1] == b"b" else None

    async with FakeServer({b"SSUBSCRIBE": answer}) as server, linked(server.url) as link:
        refused = await link.subscribe("SSUBSCRIBE", [["a"], ["b"], ["c"]])
        assert {channel: first_word(error) for channel, error in refused.items()} == {"b": "MOVED"}
        assert await link.send("PING", "x") == b"x"


async def test_a_channel_that_moves_while_it_is_left_does_not_shift_the_replies() -> None:
    """An unasked ``sunsubscribe`` and the answer to our own leave every later reply in its place."""

    def moved_meanwhile(command: list[bytes]) -> bytes:
        return push(b"sunsubscribe", command[1], 0) + b"-MOVED 1 127.0.0.1:1\r\n"

    def acked_twice(command: list[bytes]) -> bytes:
        return push(b"sunsubscribe", command[1], 0) * 2

    for answer in (moved_meanwhile, acked_twice):
        async with FakeServer({b"SUNSUBSCRIBE": answer}) as server, linked(server.url) as link:
            await link.subscribe("SSUBSCRIBE", [["a"]])
            link.subscribe("SUNSUBSCRIBE", [["a"]])
            assert [*await asyncio.gather(link.send("PING", "1"), link.send("PING", "2"))] == [b"1", b"2"]


async def test_an_unasked_unsubscribe_is_told() -> None:
    """The channel has moved away: the push handler gets that."""
    told: list[tuple[Any, ...]] = []
    async with FakeServer() as server, linked(server.url, lambda *event: told.append(event)) as link:
        await link.subscribe("SSUBSCRIBE", [["a"], ["b"]])
        server.say(push(b"sunsubscribe", b"a", 1))
        await eventually(lambda: told)
        assert told == [(b"sunsubscribe", b"a", None)]


async def test_a_reply_that_nobody_asked_for_breaks_the_link() -> None:
    """Out of step, nothing can be trusted any more: better a gap than an echo that proves nothing."""
    async with FakeServer() as server, linked(server.url) as link:
        server.say(bulk(b"surprise"))
        await eventually(lambda: not link.up)
        with pytest.raises(ConnectionBroken, match="a reply to no command"):
            link.send("PING")


async def test_the_number_of_waiting_commands_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer gets no more than so many, and the next caller gets an error that says
    that nothing was sent.
    """
    monkeypatch.setattr("asgi_cluster.backends.redis.connection._MAX_PENDING", 10)
    async with FakeServer({b"GET": b""}) as server, linked(server.url) as link:
        for _ in range(10):
            link.post("GET", "x")
        with pytest.raises(ConnectionBroken, match="waiting") as error:
            link.post("GET", "x")
        assert not error.value.sent


async def test_replies_pushes_and_errors(valkey: Server, prefix: str, parser: str) -> None:
    """The same with each of redis-py's parsers: replies in order, a push before the reply that follows it."""
    seen: list[bytes] = []
    async with linked(valkey.url, lambda kind, channel, payload: seen.append(payload)) as link:
        assert parser in type(link._connection._parser).__name__
        await link.subscribe("SUBSCRIBE", [[prefix]])
        link.post("PUBLISH", prefix, "m")
        assert await link.send("ECHO", "after") == b"after"
        assert seen == [b"m"]
        with pytest.raises(ResponseError):
            await link.send("INCRBY", prefix, "x")
