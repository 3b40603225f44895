"""Channels, their listeners, and what these make of them; without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asgi_cluster.backends.redis.bus import RedisRoomBus, RedisSessionBus
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.subscriber import Subscriber
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.bus.session_bus import SUBSCRIBED_AGAIN
from asgi_cluster.ids import NodeId
from tests.bus.nodes import Receiver


class Servers:
    """Two primaries. A channel is at the one whose number it ends with."""

    def __init__(self, *, sharded: bool = True) -> None:
        self.sharded = sharded
        self.both: list[Any] = [Primary(_no_dial, lambda: "zero"), Primary(_no_dial, lambda: "one")]

    def primaries(self) -> Sequence[Primary]:
        return self.both

    def home(self, key: str) -> Primary:
        home: Primary = self.both[key.endswith("1")]
        return home

    def heartbeat(self, primary: Primary) -> Any:
        raise NotImplementedError

    def watch(self, changed: object) -> None:
        pass

    def refresh_soon(self) -> None:
        pass

    def reconnect_now(self, primary: Primary) -> None:
        pass

    async def call(self, key: str, *args: object, timeout: float) -> int:
        return 0


async def _no_dial(on_push: object) -> Any:
    raise NotImplementedError


class Listener:
    """Keeps its events, in a list that it may share with others."""

    def __init__(self, name: str, events: list[tuple[str, str, Any]]) -> None:
        self.name = name
        self.events = events

    def message(self, channel: str, payload: bytes) -> None:
        self.events.append((self.name, channel, payload))

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        self.events.append((self.name, reason, set(channels)))

    def restored(self, channels: frozenset[str]) -> None:
        self.events.append((self.name, "restored", set(channels)))


@asynccontextmanager
async def receiving(
    monkeypatch: pytest.MonkeyPatch, servers: Any, *listeners: tuple[Listener, Sequence[str]]
) -> AsyncIterator[tuple[SubscriberSet, list[Subscriber]]]:
    """A set whose subscribers connect to nothing: their events are made by the test."""
    made: list[Subscriber] = []

    async def run(self: Subscriber, started: asyncio.Future[None]) -> None:
        made.append(self)
        started.set_result(None)
        await asyncio.Event().wait()

    monkeypatch.setattr(Subscriber, "run", run)
    found = SubscriberSet(servers, lease_duration=2.0)
    async with found.opened(servers, listeners):
        yield found, made


async def test_each_listener_gets_its_own_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they were given; a channel that was left, or is of none, goes to none."""
    events: list[tuple[str, str, Any]] = []
    first, second = Listener("first", events), Listener("second", events)
    async with receiving(monkeypatch, Servers(), (first, ["a0", "b1"]), (second, [])) as (found, made):
        await found.subscribe("room0", second)
        for channel in ("room0", "a0", "b1", "unknown"):
            found.message(channel, b"m")
        assert events == [("second", "room0", b"m"), ("first", "a0", b"m"), ("first", "b1", b"m")]
        events.clear()
        found.acknowledged(made[0], frozenset({"a0", "room0"}))  # joined while the connection was down
        found.gap(made[0], "cut", frozenset({"a0", "room0"}))
        assert events[-2:] == [("first", "cut", {"a0"}), ("second", "cut", {"room0"})]
        found.unsubscribe("room0")
        found.message("room0", b"late")
        events.clear()
        found.acknowledged(made[0], frozenset({"a0"}))
        assert events == [("first", "restored", {"a0"}), ("second", "restored", set())]


async def test_a_gap_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the channels are subscribed again, another loss of them is no news; each counts once."""
    events: list[tuple[str, str, Any]] = []
    async with receiving(monkeypatch, Servers(), (Listener("it", events), ["a0", "b0"])) as (found, made):
        found.gap(made[0], "cut", frozenset({"a0"}))
        found.gap(made[0], "cut again", frozenset({"a0", "b0"}))
        found.gap(made[0], "and again", frozenset({"a0", "b0"}))
        assert events == [("it", "cut", {"a0"}), ("it", "cut again", {"b0"})]
        assert found.gaps == 2
        found.acknowledged(made[0], frozenset({"a0", "b0"}))
        found.gap(made[0], "much later", frozenset({"a0"}))
        assert events[2:] == [("it", "restored", {"a0", "b0"}), ("it", "much later", {"a0"})]


async def test_a_connection_without_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its return is reported, because the node may have registered again there. An acknowledgement of
    channels that were not lost is not.
    """
    events: list[tuple[str, str, Any]] = []
    async with receiving(monkeypatch, Servers(), (Listener("it", events), ["a0"])) as (found, made):
        found.acknowledged(made[0], frozenset({"a0"}))
        assert events == []
        found.acknowledged(made[1], frozenset())
        assert events == [("it", "restored", set())]


async def test_primaries_that_need_no_subscriber(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that the source of the heartbeats names have one."""
    servers = Servers()
    servers.primaries = lambda: servers.both[1:]  # type: ignore[method-assign]
    async with receiving(monkeypatch, servers, (Listener("it", []), ["a1", "b0"])) as (found, made):
        assert [each.primary for each in made] == servers.both[1:]
        assert (found.run_id("a1"), found.run_id("b0")) == ("?", "?")
        assert found.lease_of("b0").live is False


@pytest.mark.parametrize("sharded", [False, True])
async def test_channels_of_sessions(sharded: bool) -> None:
    """A gap of a bucket's channel is one of that bucket on a Redis Cluster, and of all elsewhere. One of the
    inbox alone is none. The second gap, when it is subscribed again, says so.
    """
    servers: Any = Servers(sharded=sharded)
    names = Names("p", sharded=sharded)
    none: Any = None
    bus = RedisSessionBus(SubscriberSet(servers, lease_duration=2.0), names, none, none)
    receiver = Receiver()
    listener, channels = await bus.listen(NodeId("me"), receiver)
    bucket, inbox = names.sessions_channel("7f"), names.node_channel("me")
    assert set(channels) == {inbox, *(names.sessions_channel(f"{n:02x}") for n in range(256))}
    assert len(channels) == (257 if sharded else 2)
    listener.gap("moved", frozenset({inbox}))
    assert receiver.events == []
    listener.gap("moved", frozenset({bucket, inbox}))
    listener.restored(frozenset({bucket}))
    listener.restored(frozenset())
    expected = frozenset({0x7F}) if sharded else None
    assert [event[1:3] for event in receiver.of("gap")] == [("moved", expected), (SUBSCRIBED_AGAIN, expected)]


@pytest.mark.parametrize("sharded", [False, True])
async def test_channels_of_rooms(sharded: bool) -> None:
    """Events name the rooms. That a connection is back is reported without rooms, too."""
    servers: Any = Servers(sharded=sharded)
    names = Names("p", sharded=sharded, apart=True)
    none: Any = None
    bus = RedisRoomBus(SubscriberSet(servers, lease_duration=2.0), names, none)
    receiver = Receiver()
    listener, channels = await bus.listen(NodeId("me"), receiver)
    assert channels == [names.node_channel("me")]
    rooms = frozenset({names.room_channel("a}:live"), names.room_channel("b:room:c")})
    listener.message(names.room_channel("a}:live"), b"\nm")
    listener.message(names.node_channel("me"), b"\nm")
    listener.gap("cut", frozenset(channels))
    listener.gap("cut", rooms | frozenset(channels))
    listener.restored(rooms)
    listener.restored(frozenset())
    both = frozenset({"a}:live", "b:room:c"})
    assert receiver.events == [
        ("room", "a}:live", b"m"),
        ("rooms gap", both),
        ("rooms restored", both),
        ("rooms restored", frozenset()),
    ]
