"""Whatever a client sends: no crash, no error in the log, no leak, a documented code."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import websockets
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from asgi_cluster import RoomRule
from asgi_cluster.centrifuge.messages import Command
from asgi_cluster.centrifuge.protocol import BadFrame, decode_commands
from asgi_cluster.codes import CloseCode
from tests.realtime.site import Node, Site
from tests.support.waiting import eventually

DOCUMENTED = {int(code) for code in (*CloseCode, *CloseCode)} | {1000, 1007}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=5,
)
names = st.sampled_from(list(Command.__struct_fields__)) | st.text(max_size=8)
commands = st.dictionaries(names, json_values | st.dictionaries(st.text(max_size=8), json_values), max_size=4)


@given(
    st.binary(max_size=200)
    | st.lists(commands.map(json.dumps), max_size=3).map(lambda lines: "\n".join(lines).encode())
)
@example(b"null")
@settings(max_examples=100, deadline=None)
def test_decoder(frame: bytes) -> None:
    """Commands, or ``BadFrame``; nothing else, ever."""
    try:
        decoded = decode_commands(frame)
    except BadFrame:
        return
    assert decoded
    assert all(isinstance(command, Command) for command in decoded)


def test_decoder_mutated() -> None:
    """The same for commands that are almost right, many of them."""
    source = random.Random(7)
    refused = 0
    for _ in range(20_000):
        try:
            decode_commands(mutated(source).encode(errors="surrogatepass"))
        except BadFrame:
            refused += 1
    assert 2_000 < refused < 18_000


LONGEST = 65_500
"""Bytes of a frame just below ``max_message_bytes``."""


def nested(depth: int) -> bytes:
    """A command with null for a field, and an unknown field of so many levels."""
    head = b'{"id":7,"rpc":{"method":null,"x":' + b'{"a":' * depth + b'{"z":null,"p":"'
    tail = b'"}' + b"}" * depth + b"}}"
    return head + b"x" * (LONGEST - len(head) - len(tail)) + tail


def filled(head: bytes, item: bytes, tail: bytes) -> bytes:
    """A frame as long as is allowed, with one item as often as it fits; ``#`` in it becomes its number."""
    items = [item.replace(b"#", b"%d" % number) for number in range(LONGEST // len(item))]
    while len(b",".join(items)) > LONGEST - len(head) - len(tail):
        del items[-len(items) // 20 :]
    return head + b",".join(items) + tail


COSTLY: dict[str, bytes] = {
    "deep": nested(470),
    "unknown objects": filled(b'{"id":7,"rpc":{"method":null,', b'"k#":{"a":1}', b"}}"),
    "unknown objects outside": filled(b'{"id":7,"connect":null,"rpc":{},', b'"k#":{"a":1}', b"}"),
    "recoveries": filled(b'{"id":1,"connect":{"token":null,"subs":{', b'"k#":{}', b"}}}"),
    "recoveries with null": filled(
        b'{"id":1,"connect":{"token":null,"subs":{', b'"k#":{"offset":null}', b"}}}"
    ),
    "headers": filled(b'{"id":1,"connect":{"token":null,"headers":{', b'"k#":""', b"}}}"),
    "escapes": b'{"id":7,"rpc":{"method":null,"data":"' + rb"\n" * 32_000 + b'"}}',
    "half pairs": b'{"id":7,"rpc":{"method":null,"data":"' + rb"\ud83d\n" * 8_000 + b'"}}',
}
"""Frames that the decoder has to look at a second time."""


def cpu(work: Callable[[], object]) -> float:
    """Seconds of CPU time that ``work`` takes, the best of several runs."""
    best = float("inf")
    for _ in range(7):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best


def test_decoder_cost_of_depth() -> None:
    """A frame with null for a field costs as much with 470 levels as with 10."""
    assert cpu(lambda: decode_commands(nested(470))) < 10 * cpu(lambda: decode_commands(nested(10)))


@pytest.mark.parametrize("name", COSTLY)
def test_decoder_cost_of_width(name: str) -> None:
    """A frame with null for a field, or with half of a surrogate pair, costs at most a few times what
    Python's own JSON decoder takes for 60 kB of small objects, whatever the frame holds.
    """
    usual = json.dumps([{"k": {"a": 1}}] * 3_500).encode()
    assert len(decode_commands(COSTLY[name])) == 1
    assert cpu(lambda: decode_commands(COSTLY[name])) < 6 * cpu(lambda: json.loads(usual))


VALID: list[Any] = [
    {"id": 2, "subscribe": {"channel": "kept:a", "recover": True, "offset": 3, "epoch": "x"}},
    {"id": 3, "publish": {"channel": "kept:a", "data": {"x": [1, "ä"]}}},
    {"id": 4, "history": {"channel": "kept:a", "limit": 3, "since": {"offset": 1, "epoch": "e"}}},
    {"id": 5, "presence": {"channel": "kept:a"}},
    {"id": 6, "presence_stats": {"channel": "kept:a"}},
    {"id": 7, "rpc": {"method": "echo", "data": {"a": 1}}},
    {"id": 8, "unsubscribe": {"channel": "kept:a"}},
    {"id": 9, "refresh": {"token": "t"}},
    {"id": 10, "sub_refresh": {"channel": "kept:a", "token": "t"}},
    {"send": {"data": 1}},
    {"id": 11, "ping": {}},
    {},
]
SPARE: list[Any] = [None, 0, -1, 1e308, 2**64, "", "\ud800", "kept:b", [], {}, True, "x" * 300]


def mutated(source: random.Random) -> str:
    command = json.loads(json.dumps(source.choice(VALID)))
    if source.random() < 0.5 and command:
        key = source.choice(list(command))
        target = command[key] if isinstance(command[key], dict) and command[key] else command
        target[source.choice(list(target))] = source.choice(SPARE)
    text = json.dumps(command)
    if source.random() < 0.2:
        position = source.randrange(len(text) + 1)
        text = text[:position] + chr(source.randrange(32, 0x2FF)) + text[position + source.randrange(3) :]
    return text


async def hammer(site: Site, frames: int, seed: int, caplog: pytest.LogCaptureFixture) -> int:
    rule = RoomRule("kept:{name}", subscribe=True, publish=True, history=5, presence=True, join_leave=True)
    node = await site.node(
        rules=[rule],
        rpc={"echo": lambda connection, data: data},
        on_message=lambda connection, data: None,
        max_commands_per_second=1e9,
    )
    source = random.Random(seed)
    sent = closed = 0
    while sent < frames:
        async with node.raw() as client:
            await client.send({"id": 1, "connect": {}})
            try:
                while sent < frames:
                    sent += 1
                    await client.ws.send("\n".join(mutated(source) for _ in range(source.randrange(1, 4))))
                    if source.random() < 0.02:
                        await client.ws.send(source.choice(list(COSTLY.values())), text=True)
                    if sent % 5 == 0:
                        await client.ws.send('{"id":999,"ping":{}}')
                        await client.reply(999)
            except websockets.ConnectionClosed:
                closed += 1
                assert client.ws.close_code in DOCUMENTED, client.ws.close_code
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    await eventually(lambda: node.cluster.stats().realtime.connections == 0)
    assert node.cluster.stats().realtime.rooms == 0
    assert not await node.cluster.room("kept:a").presence()
    return closed


async def test_endpoint(lone_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Mutated commands on real connections."""
    assert await hammer(lone_site, 500, 1, caplog) > 10


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZ_SEEDS", "1"))))
async def test_endpoint_at_length(lone_site: Site, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    """25 000 frames for each seed; ``FUZZ_SEEDS=4`` makes it 100 000, and some minutes."""
    assert await hammer(lone_site, 25_000, seed, caplog) > 100


INSIDE: list[Any] = [
    {"id": 2, "subscribe": {"channel": "kept:@", "data": {"@": "@"}, "token": "@", "epoch": "@"}},
    {"id": 2, "publish": {"channel": "kept:@", "data": {"@": ["@"]}}},
    {"id": 2, "publish": {"channel": "kept:a", "data": "@"}},
    {"id": 2, "unsubscribe": {"channel": "kept:@"}},
    {"id": 2, "history": {"channel": "kept:@", "limit": 1, "since": {"offset": 1, "epoch": "@"}}},
    {"id": 2, "presence": {"channel": "kept:@"}},
    {"id": 2, "presence_stats": {"channel": "kept:@"}},
    {"id": 2, "rpc": {"method": "@", "data": {"@": "@"}}},
    {"id": 2, "rpc": {"method": "echo", "data": "@"}},
    {"id": 2, "refresh": {"token": "@"}},
    {"id": 2, "sub_refresh": {"channel": "kept:@", "token": "@"}},
    {"send": {"data": {"@": "@"}}},
    {"id": 2, "@": {"@": "@"}},
]
"""Every command; a ``@`` is where bytes are put."""

INTRODUCTION = {
    "id": 1,
    "connect": {"token": "@", "data": {"@": "@"}, "name": "@", "headers": {"@": "@"}, "subs": {"kept:@": {}}},
}

NOT_TEXT = [b"\xff\xfe", b"\xed\xa0\xbd"]
"""No UTF-8: stray bytes, and an encoded surrogate."""
NOT_PRINTED = [b"\x1f", b"\\u001f", b"\\"]
CUT = [b"\\ud83d", b"\\uDE00\\ud83d"]
"""Halves of surrogate pairs as JSON escapes: legal JSON text (RFC 8259 section 8.2), and no characters."""


def with_bytes(template: Any, inside: bytes) -> list[bytes]:
    """The command once for each place, with ``inside`` there."""
    parts = json.dumps(template).encode().split(b"@")
    return [
        b"a".join(parts[: place + 1]) + inside + b"a".join(parts[place + 1 :])
        for place in range(len(parts) - 1)
    ]


@pytest.mark.parametrize("server", ["websockets-sansio", "websockets", "wsproto"])
@pytest.mark.parametrize("text", [True, False], ids=["text", "binary"])
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*websockets", "ignore::DeprecationWarning")
async def test_bytes_inside_commands(
    lone_site: Site, caplog: pytest.LogCaptureFixture, server: str, text: bool
) -> None:
    """Whatever bytes a client puts into a valid command, in a text or a binary frame: it alone suffers. The
    members of its room get the next message, whoever comes later recovers, the room's history can be read.
    """

    async def member(websocket: WebSocket) -> None:
        async with node.cluster.accept(websocket) as connection:
            await connection.join("kept:a")
            await connection.send("joined")
            async for _ in connection:
                pass

    rule = RoomRule("kept:{name}", subscribe=permit, publish=permit, history=10, presence=True)
    node = await lone_site.node(
        rules=[rule],
        rpc={"echo": lambda connection, data: data},
        on_message=lambda connection, data: None,
        connect=lambda request: None,
        max_commands_per_second=1e9,
        server={"ws": server},
        routes=[WebSocketRoute("/ws", member)],
    )
    number = 0
    async with node.client() as victim, node.raw(path="/ws") as own:
        assert await own.ws.recv() == "joined"
        await victim.call("subscribe", {"channel": "kept:a"})
        for template in (INTRODUCTION, *INSIDE):
            frames = [
                frame for inside in (*NOT_TEXT, *NOT_PRINTED, *CUT) for frame in with_bytes(template, inside)
            ]
            while frames:
                await offend(node, frames, text=text, connects=template is not INTRODUCTION)
            number += 1
            await node.cluster.room("kept:a").broadcast({"number": number})
            while await victim.pub() != {"number": number}:
                pass
            while await asyncio.wait_for(own.ws.recv(), 5) != f'{{"number":{number}}}':
                pass
            newest = await node.cluster.room("kept:a").history(limit=1, reverse=True)
            assert newest.publications[0].data == {"number": number}
            assert await node.cluster.room("kept:a").history()
        async with node.client() as late:
            since = {"recover": True, "offset": newest.offset - 3, "epoch": newest.epoch}
            missed = (await late.call("subscribe", {"channel": "kept:a", **since}))["subscribe"]
            assert missed["recovered"]
            assert missed["publications"][-1]["data"] == {"number": number}
    assert not [
        record
        for record in caplog.records
        if record.levelname in ("ERROR", "CRITICAL") and record.name.startswith("asgi_cluster")
    ]


def permit(request: Any) -> bool:
    return request.room is not request.data


async def offend(node: Node, frames: list[bytes], *, text: bool, connects: bool) -> None:
    """Send frames as long as the connection holds: each is answered, or closes it with a documented code."""
    async with node.raw() as client:
        if connects:
            await client.call("connect", {})
        try:
            while frames:
                frame = frames.pop()
                await client.ws.send(frame, text=text)
                if connects:
                    await client.ws.send('{"id":999,"ping":{}}')
                    await client.reply(999)
                else:
                    await client.reply(1)
                    break
        except websockets.ConnectionClosed:
            # Text that is no UTF-8 does not get as far as us: 1007, and from wsproto no close frame at all.
            expected = (CloseCode.BAD_REQUEST, 1007, 1006) if text else (CloseCode.BAD_REQUEST,)
            assert client.ws.close_code in expected, (client.ws.close_code, frame)
        assert 100 not in [reply.get("error", {}).get("code") for reply in client.replies.values()], frame


@pytest.mark.parametrize("text", [True, False], ids=["text", "binary"])
async def test_half_a_surrogate_pair(site: Site, caplog: pytest.LogCaptureFixture, text: bool) -> None:
    """A lone surrogate, which a text cut in the middle of an emoji ends with, is replaced by U+FFFD wherever
    data may stand; a name with one is error 107. No command closes the connection because of it.
    """
    seen: list[Any] = []

    def note(request: Any) -> bool:
        seen.append(request.data)
        return True

    rule = RoomRule("kept:{name}", subscribe=note, publish=note, history=10)
    node = await site.node(
        rules=[rule],
        connect=lambda request: seen.append(request.data),
        rpc={"echo": lambda connection, data: data},
        on_message=lambda connection, data: seen.append(data),
    )
    async with node.raw() as client:

        async def call(command_id: int, name: str, request: bytes) -> Any:
            frame = b'{"id":%d,"%s":%s}' % (command_id, name.encode(), request)
            await client.ws.send(frame, text=text)
            return await client.reply(command_id)

        node_connect = await call(1, "connect", rb'{"data":"\ud83d"}')
        assert "connect" in node_connect, node_connect
        reply = await call(2, "subscribe", rb'{"channel":"kept:a","data":{"\ude00":["\\\ud83dx"]}}')
        assert "subscribe" in reply
        assert "publish" in await call(3, "publish", rb'{"channel":"kept:a","data":"a\\ud83d\ud83d"}')
        assert await client.pub() == "a\\ud83d\ufffd"
        assert "publish" in await call(
            4, "publish", rb'{"channel":"kept:a","data":{"a":"\ud83d\ude00\ud83d"}}'
        )
        assert await client.pub() == {"a": "\U0001f600\ufffd"}
        history = await node.cluster.room("kept:a").history()
        assert [found.data for found in history.publications] == ["a\\ud83d\ufffd", {"a": "\U0001f600\ufffd"}]
        reply = await call(5, "rpc", rb'{"method":"echo","data":["\ude00"]}')
        assert reply["rpc"]["data"] == ["\ufffd"]
        for number, name in enumerate(
            ("subscribe", "unsubscribe", "publish", "presence", "presence_stats", "history", "sub_refresh"), 6
        ):
            reply = await call(number, name, rb'{"channel":"kept:\ud83d","data":1}')
            assert reply["error"]["code"] == 107, (name, reply)
        await client.ws.send(rb'{"send":{"data":"\ud83d"}}', text=text)
        assert "ping" in await call(99, "ping", b"{}")
    assert seen == [
        "\ufffd",
        {"\ufffd": ["\\\ufffdx"]},
        "a\\ud83d\ufffd",
        {"a": "\U0001f600\ufffd"},
        "\ufffd",
    ]
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


@pytest.mark.parametrize(
    "data",
    [b"1e999", b"-1e999", b"1" * 5000, b"[" * 900 + b"]" * 900],
    ids=["1e999", "-1e999", "long", "deep"],
)
async def test_json_that_python_cannot_read(
    lone_site: Site, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    """Numbers out of range and hundreds of levels are error 107 in every command, and in no room."""
    rule = RoomRule("kept:{name}", subscribe=permit, publish=True, history=10)
    node = await lone_site.node(
        rules=[rule], rpc={"echo": lambda connection, data: None}, on_message=lambda connection, data: None
    )
    async with node.client() as client, node.client() as victim, node.raw() as stranger:
        await victim.call("subscribe", {"channel": "kept:a"})
        for number, (name, request) in enumerate(
            [
                ("subscribe", b'{"channel":"kept:a","data":%s}'),
                ("publish", b'{"channel":"kept:a","data":%s}'),
                ("rpc", b'{"method":"echo","data":%s}'),
            ],
            20,
        ):
            await client.ws.send(b'{"id":%d,"%s":%s}' % (number, name.encode(), request % data), text=True)
            assert (await client.reply(number))["error"]["code"] == 107, name
        await client.ws.send(b'{"send":{"data":%s}}' % data, text=True)
        assert (await client.closed())[0] == 3501
        await stranger.ws.send(b'{"id":1,"connect":{"data":%s}}' % data, text=True)
        reply = await stranger.reply(1)
        assert "connect" in reply  # no hook is given the data
        await node.cluster.room("kept:a").broadcast(1)
        assert await victim.pub() == 1
        assert [found.data for found in (await node.cluster.room("kept:a").history()).publications] == [1]
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


@pytest.mark.parametrize("data", ["cut \ud83d", {"a": ["\ude00"]}, {"\ud83d": 1}, msgspec.Raw(b'"\xff"')])
async def test_broadcast_of_what_is_no_text(lone_site: Site, data: Any) -> None:
    """The app gets a ValueError that says what is wrong, and nobody gets anything."""
    node = await lone_site.node(rules=[RoomRule("room", subscribe=True, history=5)])
    async with node.client() as client:
        await client.call("subscribe", {"channel": "room"})
        with pytest.raises(ValueError, match="not Unicode text"):
            await node.cluster.room("room").broadcast(data)
        (connection,) = node.connections
        with pytest.raises(ValueError, match="not Unicode text"):
            await connection.send(data)
        await node.cluster.room("room").broadcast("next")
        assert await client.pub() == "next"


async def test_message_tampered_with_in_redis(redis_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """What is no text in Redis, live or remembered, is left out and logged, and closes no socket."""
    rules = [RoomRule("kept", subscribe=True, history=10), RoomRule("live", subscribe=True)]
    node = await redis_site.node(rules=rules)
    async with node.client() as client:
        for room in ("kept", "live"):
            await client.call("subscribe", {"channel": room})
        before = await node.cluster.room("kept").broadcast({"a": "before"})
        assert before is not None
        assert await client.pub() == {"a": "before"}
        for room in ("kept", "live"):
            # As version 0.1 did with what a client sent in a binary frame.
            await node.cluster._parts.rooms.publish(room, "j", b'{"a":"\xff"}')
        for room in ("kept", "live"):
            await node.cluster.room(room).broadcast("after")
        assert sorted([await client.pub(), await client.pub()]) == ["after", "after"]
        history = await node.cluster.room("kept").history()
        assert [found.data for found in history.publications] == [{"a": "before"}, "after"]
        async with node.client() as late:
            position = {"recover": True, "offset": before.offset, "epoch": history.epoch}
            missed = (await late.call("subscribe", {"channel": "kept", **position}))["subscribe"]
            assert [found["data"] for found in missed["publications"]] == ["after"]
    assert "could not be decoded" in caplog.text
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
