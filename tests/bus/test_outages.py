"""What a node does when its Redis stalls, dies, comes back empty, or cuts it off."""

from __future__ import annotations

import asyncio
import collections
import time
from typing import Any

import pytest
import redis

from asgi_cluster.backends.redis.single import OnePrimary
from asgi_cluster.bus.messages import Changed, encode
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from tests.bus.fake import FakeServer, push
from tests.bus.nodes import Node, beats, opened
from tests.support.proxy import Proxy
from tests.support.servers import Server, start_valkey
from tests.support.waiting import eventually

KNOWN_WITHIN = 2.0
TRUSTED_WITHIN = 1.0


def gaps(node: Node) -> list[tuple[Any, ...]]:
    return [gap for gap in node.receiver.of("gap") if gap[1] != "subscribed again"]


async def hears(node: Node) -> None:
    """A session message and a room message get through."""
    before = len(node.receiver.of("session"))
    await node.session_bus.publish(3, encode(Changed("03.x", "me")), timeout=1)
    await node.room_bus.publish("r", b"\nagain", timeout=1)
    await eventually(
        lambda: len(node.receiver.of("session")) > before and b"again" in node.receiver.heard("r")
    )


async def test_no_lease_before_every_subscription_is_acknowledged(prefix: str) -> None:
    """No heartbeat is sent before the last ack, and no lease is granted before the heartbeat's reply."""
    held: list[list[bytes]] = []

    def hold(command: list[bytes]) -> bytes:
        held.append(command)
        return b""

    async with FakeServer({b"SUBSCRIBE": hold, b"PING": hold}) as server:
        opening = asyncio.ensure_future(opened(server.url, prefix).__aenter__())
        await eventually(lambda: held)
        await asyncio.sleep(0.05)
        assert not [command for command in server.commands if command[0] == b"PEXPIRE"]
        assert not opening.done()
        opening.cancel()
        await asyncio.wait([opening])


async def test_an_echo_that_is_refused_renews_nothing(prefix: str) -> None:
    """The server answers every beat, with an error: the lease lapses, and the node is not ready."""
    refusing: list[bool] = []

    def beat(command: list[bytes]) -> bytes:
        return b"-MISCONF Errors writing to disk\r\n" if refusing else b":1\r\n"

    async with FakeServer({b"PEXPIRE": beat}) as server, opened(server.url, prefix) as node:
        assert node.live
        assert node.backend.ready
        refusing.append(True)
        await eventually(lambda: not node.live, timeout=3)
        assert not node.backend.ready
        refusing.clear()
        await eventually(lambda: node.live, timeout=2)
        assert gaps(node) == []


async def test_a_stopped_server_is_noticed_and_trusted_again(prefix: str) -> None:
    """SIGSTOP: known within 2 s, the lease over before the gap is reported; SIGCONT: trusted again within 1
    s.
    """
    with start_valkey() as server:
        async with opened(server.url, prefix) as node:
            await node.room_bus.subscribe("r")
            stopped_at = time.monotonic()
            server.pause()
            await eventually(lambda: gaps(node))
            _, reason, buckets, told_at, leased = gaps(node)[0]
            assert told_at - stopped_at <= KNOWN_WITHIN
            assert (reason, buckets, leased) == ("no reply to a heartbeat for 1 s", None, False)
            assert not node.live

            async def spared() -> bool:
                asked_at = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await node.session_bus.nodes(timeout=1)
                return time.monotonic() - asked_at < 0.2

            await eventually(spared, message="the breaker does not spare callers the wait")
            server.resume()
            resumed_at = time.monotonic()
            await eventually(lambda: node.live)
            assert time.monotonic() - resumed_at <= TRUSTED_WITHIN
            assert len(gaps(node)) == 1
            await hears(node)


async def test_a_killed_server_is_survived(prefix: str) -> None:
    """Kill -9 and an empty restart: subscribed and registered again, under a new incarnation."""
    with start_valkey() as server:
        async with opened(server.url, prefix) as node:
            await node.room_bus.subscribe("r")
            before = node.incarnation
            server.kill()
            await eventually(lambda: gaps(node), timeout=KNOWN_WITHIN)
            with pytest.raises(BusUnavailable):
                await node.room_bus.publish("r", b"\nlost", timeout=0.2)
            server.restart()
            restarted_at = time.monotonic()
            await eventually(lambda: node.live)
            assert time.monotonic() - restarted_at <= TRUSTED_WITHIN
            await hears(node)
            assert set(await node.session_bus.nodes(timeout=1)) == {node.id}
            assert node.incarnation != before
            stats = node.backend.stats()
            assert (stats.gaps, stats.reconnects, stats.connected) == (1, 1, True)


async def test_a_killed_client_keeps_its_incarnation(valkey: Server, prefix: str) -> None:
    """CLIENT KILL: a gap, and the same node as before: a mere reconnect must not cost presence."""
    async with opened(valkey.url, prefix) as node:
        await node.room_bus.subscribe("r")
        before = node.incarnation
        valkey.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: gaps(node))
        await eventually(lambda: node.live)
        await hears(node)
        assert node.incarnation == before
        assert [event[1] for event in node.receiver.of("rooms restored")] == [frozenset({"r"})]


async def test_flights_of_an_outage_are_detached_at_the_subscribe_ack(valkey: Server, prefix: str) -> None:
    """A read sent while no message arrived must not be kept once the lease is back: a second gap says so,
    before the lease.
    """
    async with opened(valkey.url, prefix) as node:
        valkey.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: node.receiver.of("gap")[1:])
        _, reason, buckets, _, leased = node.receiver.of("gap")[1]
        assert (reason, buckets, leased) == ("subscribed again", None, False)


async def test_a_black_hole_is_noticed(valkey: Server, prefix: str) -> None:
    """No RST, no FIN, no bytes: the missing reply shows it within 2 s."""
    async with Proxy(valkey.url) as proxy, opened(proxy.url, prefix) as node:
        holed_at = time.monotonic()
        proxy.blackhole()
        await eventually(lambda: gaps(node))
        assert time.monotonic() - holed_at <= KNOWN_WITHIN
        proxy.heal()
        healed_at = time.monotonic()
        await eventually(lambda: node.live)
        assert time.monotonic() - healed_at <= TRUSTED_WITHIN


async def test_only_the_subscriber_is_cut_off(valkey: Server, prefix: str) -> None:
    """The store answers and the heartbeat does not: the node is not ready, until it is answered again."""
    async with Proxy(valkey.url) as proxy, opened(proxy.url, prefix) as node:
        proxy.blackhole(only=b"SUBSCRIBE")
        await eventually(lambda: not node.backend.ready, timeout=3)
        await node.session_bus.nodes(timeout=1)
        proxy.heal()
        await eventually(lambda: node.backend.ready and node.live)


async def test_a_reader_that_is_too_slow_is_cut_off_and_comes_back(prefix: str) -> None:
    """The server cuts a subscriber whose output buffer is full: a gap like any other."""
    with start_valkey("--client-output-buffer-limit", "pubsub 64kb 32kb 1") as server:
        async with Proxy(server.url) as proxy, opened(proxy.url, prefix) as node:
            await node.room_bus.subscribe("r")
            proxy.stall("down", only=b"SUBSCRIBE")
            other = server.client()
            for _ in range(400):
                other.publish(f"{prefix}:0:room:r", b"\n" + bytes(50_000))
            proxy.heal()
            await eventually(lambda: gaps(node))
            await eventually(lambda: node.live)
            await hears(node)


async def test_a_full_server_still_beats(prefix: str) -> None:
    """maxmemory reached: PEXPIRE passes, so the lease stays, while writes are refused by name."""
    with start_valkey("--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:
        async with opened(server.url, prefix) as node:
            client = server.client()
            for size in (100_000, 100):  # what a refused command itself took is free again afterwards
                with pytest.raises(redis.OutOfMemoryError):
                    collections.deque(client.set(f"{size}:{n}", bytes(size)) for n in range(10_000))
            before = beats(client)
            await eventually(lambda: beats(client) >= before + 3)
            assert node.live
            assert gaps(node) == []
            with pytest.raises(StoreUnavailable, match="OOM"):
                await node.backend._topology.call("k", "SET", "k", bytes(100_000), timeout=1)


async def test_a_command_whose_reply_is_lost_is_not_repeated(valkey: Server, prefix: str) -> None:
    """It ran once, and the error says that the outcome is unknown."""
    async with Proxy(valkey.url) as proxy, opened(proxy.url, prefix) as node:
        proxy.swallow(b"INCR")
        with pytest.raises(StoreUnavailable) as error:
            await node.backend._topology.call("k", "INCR", f"{prefix}:k", timeout=1)
        assert error.value.outcome_unknown
        assert valkey.client().get(f"{prefix}:k") == b"1"


async def test_a_command_waits_for_the_reconnect(valkey: Server, prefix: str) -> None:
    """A cut that heals at once is not an error for whoever comes after it."""
    async with Proxy(valkey.url) as proxy, opened(proxy.url, prefix) as node:
        assert isinstance(node.backend._topology, OnePrimary)
        commands = node.backend._topology._commands
        assert commands is not None
        broken = commands._connection
        assert broken is not None
        assert proxy.cut(refuse=False) >= 2
        # Not "until nothing answers": with luck the next link stands before anybody looks.
        await eventually(lambda: commands._connection is not broken)
        assert await node.backend._topology.call("k", "ECHO", "x", timeout=1) == b"x"


async def test_a_command_that_comes_at_once_waits_too(valkey: Server, prefix: str) -> None:
    """A caller that gets the error of a broken connection may call again at once."""
    async with Proxy(valkey.url) as proxy, opened(proxy.url, prefix) as node:
        proxy.lose(b"ECHO")
        with pytest.raises(StoreUnavailable):
            await node.backend._topology.call("k", "ECHO", "x", timeout=1)
        assert await node.backend._topology.call("k", "ECHO", "x", timeout=1) == b"x"


async def test_a_script_that_the_server_forgot_is_sent_again(valkey: Server, prefix: str) -> None:
    """NOSCRIPT proves that nothing ran."""
    async with opened(valkey.url, prefix) as node:
        valkey.client().script_flush()
        assert set(await node.session_bus.nodes(timeout=1)) == {node.id}


async def test_a_server_that_is_loading_is_waited_for(prefix: str) -> None:
    """LOADING is tried again while there is time, then it is the reason."""
    answers: list[bytes] = [b"-LOADING Redis is loading the dataset in memory\r\n"] * 3

    def get(command: list[bytes]) -> bytes | None:
        return answers.pop() if answers else b"$1\r\nx\r\n"

    async with FakeServer({b"GET": get}) as server, opened(server.url, prefix, listen=False) as node:
        assert await node.backend._topology.call("k", "GET", "k", timeout=1) == b"x"
        answers.extend([b"-LOADING Redis is loading the dataset in memory\r\n"] * 1000)
        with pytest.raises(StoreUnavailable, match="loading") as error:
            await node.backend._topology.call("k", "GET", "k", timeout=0.1)
        assert not error.value.outcome_unknown


async def test_an_unasked_unsubscribe_is_a_gap(prefix: str) -> None:
    """Whatever took the sessions channel away, the node does not trust its cache over it."""
    async with FakeServer() as server, opened(server.url, prefix) as node:
        channel = f"{prefix}:0:sessions".encode()
        for writer in server.writers:
            writer.write(push(b"unsubscribe", channel, 1))
        await eventually(lambda: gaps(node))
        assert gaps(node)[0][4] is False, "the lease is over when the gap is reported"


async def test_a_receiver_that_fails_is_a_gap(
    valkey: Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What it failed on may have been an invalidation."""
    async with opened(valkey.url, prefix) as node:

        def fail(payload: bytes) -> None:
            raise RuntimeError("a bug")

        node.receiver.session_message = fail  # type: ignore[method-assign]
        await node.session_bus.publish(3, encode(Changed("03.x", "me")), timeout=1)
        await eventually(lambda: gaps(node))
        assert "a bug" in caplog.text
        del node.receiver.session_message
        await eventually(lambda: node.live)
        await node.room_bus.subscribe("r")
        await hears(node)
