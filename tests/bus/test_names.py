"""No two things have one key or one channel, whatever rooms, users and prefixes are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asgi_cluster import Cluster
from asgi_cluster.backends.redis.names import Names
from tests.support.servers import Server
from tests.support.waiting import eventually

# Short words made of what the names themselves are made of meet more often than random text does.
parts = st.sampled_from(
    ["a", "0", "5", ":", "}", "{", "room", "room:", "node", "once", "key", "log", "meta", "live", "%7D", "%"]
)
texts = st.lists(parts, min_size=1, max_size=5).map("".join)
prefixes = st.lists(
    st.sampled_from(["a", "b", "0", ":", "room", "node", "sessions", "-"]), min_size=1, max_size=4
).map("".join)
KEYS: dict[str, Callable[[Names, str, str], str]] = {
    "session": lambda names, one, two: names.session(f"0a.{one}"),
    "lock": lambda names, one, two: names.lock(f"0a.{one}"),
    "epoch": lambda names, one, two: names.epoch("0a", one),
    "index": lambda names, one, two: names.index("0a", one),
    "nodes": lambda names, one, two: names.nodes(),
    "beat": lambda names, one, two: names.beat(one),
    "side beat": lambda names, one, two: names.beat(one, "beat7"),
    "rules": lambda names, one, two: names.room_rules(),
    "views": lambda names, one, two: names.room_views(),
    "rooms' epoch": lambda names, one, two: names.room_epoch(),
    "log": lambda names, one, two: names.room_log(one),
    "meta": lambda names, one, two: names.room_meta(one),
    "in": lambda names, one, two: names.room_in(one),
    "once": lambda names, one, two: names.room_once(one, two),
}
CHANNELS: dict[str, Callable[[Names, str, str], str]] = {
    "sessions": lambda names, one, two: names.sessions_channel("0a"),
    "node": lambda names, one, two: names.node_channel(one),
    "room": lambda names, one, two: names.room_channel(one),
}
APART = ("nodes", "beat", "side beat", "node")
"""What a node has once more where the rooms are, with ``rooms_url``; that may be the same server."""
NAMELESS = ("nodes", "rules", "views", "rooms' epoch", "sessions")

places = st.tuples(prefixes, st.sampled_from([0, 1, 5]), texts, texts)


def meaning(kind: str, place: tuple[str, int, str, str], *, db: bool) -> tuple[object, ...]:
    prefix, number, one, two = place
    what = () if kind in NAMELESS else (one, two) if kind == "once" else (one,)
    return (prefix, number if db else 0, kind, *what)


@pytest.mark.parametrize("sharded", [False, True])
@given(places, places)
@settings(max_examples=400, deadline=None)
@example(("a", 0, "5:sessions", "a"), ("a:0:room", 5, "a", "a"))
@example(("a", 0, "0:room:b", "a"), ("a:0:room", 0, "b", "a"))
@example(("a", 0, "a}:once:b", "a"), ("a", 0, "a", "b}:log"))
@example(("a", 0, "a", "x}"), ("a", 0, "a", "x%7D:once"))
def test_names_are_disjoint(
    sharded: bool, first: tuple[str, int, str, str], second: tuple[str, int, str, str]
) -> None:
    """Two keys, or two channels, are equal only if everything that they stand for is. (Keys of two databases
    are in two databases; a Cluster has one.)
    """

    def all_of(
        kinds: dict[str, Callable[[Names, str, str], str]], place: tuple[str, int, str, str], *, db: bool
    ) -> Iterator[tuple[str, tuple[object, ...]]]:
        prefix, number, one, two = place
        for apart in (False, True):
            names = Names(prefix, db=0 if sharded else number, sharded=sharded, apart=apart)
            for kind, make in kinds.items():
                if not apart or kind in APART:
                    yield make(names, one, two), (apart, *meaning(kind, place, db=db and not sharded))

    for kinds, db in ((KEYS, False), (CHANNELS, True)):
        known: dict[str, tuple[object, ...]] = {}
        for place in (first, second):
            for name, means in all_of(kinds, place, db=db):
                assert known.setdefault(name, means) == means, name


@pytest.mark.quick
@given(places)
@settings(max_examples=200, deadline=None)
def test_room_of_a_channel(place: tuple[str, int, str, str]) -> None:
    """A room's channel leads back to the room, and no other channel to any."""
    prefix, number, one, _ = place
    for names in (Names(prefix, db=number), Names(prefix, sharded=True)):
        assert names.room_of_channel(names.room_channel(one)) == one
        assert names.room_of_channel(names.node_channel("n-1")) is None
        assert names.room_of_channel(names.sessions_channel("0a")) is None


async def test_cluster_whose_prefix_extends_anothers(valkey: Server, prefix: str) -> None:
    """A broadcast in one cluster is no session message of another, however room and prefix are called."""
    longer = Cluster(valkey.url, prefix=f"{prefix}:0:room")
    async with Cluster(valkey.url, prefix=prefix) as shorter, longer:
        await shorter.room("0:sessions").broadcast("x")
        await longer.room("sentinel").broadcast("y")
        await longer.user("nobody").logout()
        await eventually(lambda: longer.stats().bus.received)
        assert longer.stats().bus.malformed == 0
