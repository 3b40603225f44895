"""Whatever bytes Redis hands over, a decoder gives its value or its own error: random ones, and valid ones in
which something was changed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_cluster import Cluster, RealtimeConfig, RoomRule
from asgi_cluster.backends.redis.records import decode_record
from asgi_cluster.bus import messages
from asgi_cluster.bus.messages import MalformedMessage, decode, encode
from asgi_cluster.centrifuge.wire import pub_of
from asgi_cluster.ids import Handle
from asgi_cluster.rooms.history import Entry, Position, open_envelope, seal_envelope
from asgi_cluster.rooms.presence import count_people, read_info
from asgi_cluster.rooms.retention import Retention
from asgi_cluster.sessions.codec import Decoded
from tests.support.servers import Server
from tests.support.waiting import eventually

DEEP = b"\x91" * 100_000
"""A list in a list in a list, in msgpack."""
DEEP_JSON = b'{"user":' + b"[" * 100_000
NO_TEXT = b"\xa2\xff\xfe"
DEEP_INSIDE = b"\x97" + encode(messages.Ended("03.x", 4501, "x", "n", "r"))[1:] + DEEP
"""A message with one field more than this version has, as those of a later version have."""

VALID: list[bytes] = [
    encode(messages.Changed("03.x", "n")),
    encode(messages.Ended("03.x", 4501, "session ended", "n", "r")),
    encode(messages.UserEnded("ada", None, 4501, "x", "n", "r", ("a", "b"))),
    encode(messages.Ack("r", "n", 3)),
    encode(messages.Published("t", b"text", "id", "n", info=b'{"user":"ada"}')),
    encode(messages.Published("j", b'{"a":1}', "id", "n", "c", "k", "c")),
    encode(messages.Joined("c", b'{"user":"ada"}')),
    encode(messages.PersonalMessage("ada", None, "j", b"1", "id", "n")),
    encode(messages.Disconnect("ada", None, None, 4501, "x", "n")),
    encode(messages.NodeDied("n", "i", "m")),
    msgspec.msgpack.encode([["a:{b}", 3, 60.0]]),
    msgspec.msgpack.encode({"a": [1, "x", b"y"], "b": None}),
    b'{"user":"ada","conn_info":{"a":[1]}}',
    seal_envelope(Position(3, "e"), 2, b"payload"),
]


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A valid one, with some bytes replaced, inserted or cut out."""
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 3))] = draw(
            st.binary(max_size=4) | st.sampled_from([b"\xff", NO_TEXT, b"\x91" * 5000])
        )
    return bytes(data)


hostile = st.binary(max_size=100) | changed() | st.sampled_from([DEEP, DEEP_INSIDE, DEEP_JSON, NO_TEXT, b""])


class _Silent(Retention):
    def __init__(self) -> None:  # what it decodes needs nothing of the rest
        pass


@given(hostile)
@settings(max_examples=500, deadline=None)
def test_decoders(data: bytes) -> None:
    """Nothing but a value, or the error that the decoder's callers expect."""
    try:
        message = decode(data)
    except MalformedMessage:
        pass
    else:
        assert isinstance(message, messages.Message)
    pub_of("r", Entry(1, 0, data))
    read_info(data)
    assert count_people({"c": data, "d": data})[0] == 2
    assert all(isinstance(rule, RoomRule) for rule in _Silent()._decode("node", data))
    try:
        position, previous, _ = open_envelope(data)
    except ValueError:
        pass
    else:
        assert position is None or (isinstance(position.offset, int) and isinstance(previous, int))
    values: dict[str, Any] = {}
    try:
        Decoded({"a": data}).into(values)
    except msgspec.DecodeError:
        pass
    else:
        assert "a" in values


@given(
    st.dictionaries(
        st.sampled_from(
            [b"@secret", b"@ver", b"@write", b"@created", b"@abs", b"@idle", b"@user", b"@prev_until"]
        )
        | st.binary(max_size=4),
        st.integers().map(lambda number: b"%d" % number) | st.binary(max_size=20),
        max_size=12,
    ),
    st.integers(),
    st.integers(),
)
@settings(max_examples=500, deadline=None)
def test_record_decoder(fields: dict[bytes, bytes], now: int, ttl: int) -> None:
    """A record, or one of the two errors that count as corrupt."""
    flat = [part for pair in fields.items() for part in pair]
    lengths = b" ".join(b"%d" % len(part) for part in flat)
    with contextlib.suppress(KeyError, ValueError):
        decode_record(Handle("00.x"), now, ttl, lengths, b"".join(flat))


def test_message_that_names_very_many_sessions() -> None:
    """No more than its sender may name: each would be looked at while the loop waits."""
    tokens = [f"{n:022}" for n in range(500_000)]
    empty = encode(messages.UserEnded("ada", None, 4501, "x", "n", "r"))
    with pytest.raises(MalformedMessage):
        decode(empty[:-1] + msgspec.msgpack.encode(tokens))
    told = decode(messages.name_ended(empty, tokens))
    assert isinstance(told, messages.UserEnded)
    assert told.ended == tuple(tokens[-messages.MOST_ENDED :])


@pytest.mark.parametrize(
    "payload",
    [
        DEEP_INSIDE,
        NO_TEXT,
        encode(messages.UserEnded("ada", None, 4501, "x", "n", "r"))[:-1]
        + msgspec.msgpack.encode(["x"] * 500_000),
        msgspec.msgpack.encode(["e", "03.x", 99_999_999, "x", "n", ""]),
        msgspec.msgpack.encode(["e", "no handle", 4501, "x", "n", ""]),
    ],
)
async def test_malformed_session_message_is_a_gap(valkey: Server, prefix: str, payload: bytes) -> None:
    """The cache is dropped, the message counted, and the connection stays."""
    async with Cluster(valkey.url, prefix=prefix) as cluster:
        with valkey.client() as client:
            before = cluster.stats().cache.flushes
            client.publish(f"{prefix}:0:sessions", payload)
            await eventually(lambda: cluster.stats().bus.malformed == 1)
            assert cluster.stats().cache.flushes == before + 1
            assert cluster.stats().bus.reconnects == 0
            assert cluster.stats().bus.connected


@pytest.mark.parametrize(
    "payload",
    [
        b"\n" + DEEP,
        DEEP,
        b"1 0 \xff\xfe\n" + VALID[4],
        b"\n" + encode(messages.Published("t", b"\xff\xfe", "id", "n")),
        b"\n" + encode(messages.Published("j", b'"\xff"', "id", "n")),
        b"\n" + encode(messages.Published("j", b"1", "id", "n", info=b"\xff")),
        b"\n" + encode(messages.Joined("c", b"\xff")),
        b"\n" + encode(messages.Changed("03.x", "n")),
    ],
)
async def test_malformed_room_message_reaches_no_member(valkey: Server, prefix: str, payload: bytes) -> None:
    """It is left out, and the next one is delivered on the same connection."""
    rules = [RoomRule("r", subscribe=True)]
    got: list[Any] = []

    async with Cluster(valkey.url, prefix=prefix, realtime=RealtimeConfig(rules=rules)) as cluster:
        await cluster._parts.rooms._local.acquire("r")
        deliver = cluster._parts.rooms._delivery._deliver_published

        def delivered(audience: Any, message: Any, offset: Any, **how: Any) -> Any:
            got.append(message.data)
            return deliver(audience, message, offset, **how)

        cluster._parts.rooms._delivery._deliver_published = delivered  # type: ignore[assignment, method-assign]
        with valkey.client() as client:
            client.publish(f"{prefix}:0:room:r", payload)
            await cluster.room("r").broadcast("sentinel")
            await eventually(lambda: got)
            assert got == [b"sentinel"]
            assert cluster.stats().bus.reconnects == 0


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("log", {"p": "x", "d": "y"}),
        ("log", {"q": "1"}),
        ("log", {"p": "0", "d": DEEP}),
        ("log", {"p": "0", "d": encode(messages.Published("j", b"{", "id", "n"))}),
        ("log", {"p": "0", "d": encode(messages.Published("t", b"\xff", "id", "n"))}),
        ("meta", {"epoch": b"\xff\xfe"}),
        ("meta", {"epoch": b"a b\nc"}),
        ("meta", {"offset": "inf"}),
        ("meta", {"offset": "-5"}),
        ("meta", {"offset": "1" * 400}),
        ("in", {"c": "no owner"}),
    ],
)
async def test_room_that_was_tampered_with(
    valkey: Server, prefix: str, key: str, damage: dict[str, Any]
) -> None:
    """History and presence are read without it, and the next publication is kept."""
    rule = RoomRule("r", subscribe=True, history=10, presence=True)
    async with Cluster(valkey.url, prefix=prefix, realtime=RealtimeConfig(rules=[rule])) as cluster:
        room = cluster.room("r")
        await room.broadcast(1)
        name = f"{prefix}:{{room:r}}:{key}"
        with valkey.client() as client:
            if key == "log":
                client.xadd(name, damage)
            else:
                client.hset(name, mapping=damage)
            if key == "in":
                incarnation = cluster._parts.backend.room_bus.incarnation
                for number, info in enumerate((b"\xff", b"[]", b"{", DEEP_JSON)):
                    client.hset(name, b"c%d\xff" % number, f"{cluster.node} {incarnation}\n".encode() + info)
        assert await room.presence() == []
        for _ in range(2):
            await room.history()
            await room.history(reverse=True)
            await room.broadcast(2)
        assert [each.data for each in (await room.history()).publications][-2:] == [2, 2]


async def test_registry_that_was_tampered_with(valkey: Server, prefix: str) -> None:
    """Nodes are listed, with what can be read of the others."""
    async with Cluster(valkey.url, prefix=prefix) as cluster:
        with valkey.client() as client:
            client.hset(
                f"{prefix}:{{nodes}}:all", mapping={b"\xff\xfe": DEEP, b"x": b"\x94" + NO_TEXT, b"y": b""}
            )
            assert cluster.node in {node.id for node in await cluster.nodes()}
