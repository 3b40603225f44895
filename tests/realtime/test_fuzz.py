"""Whatever a client sends: no crash, no error in the log, no leak, a documented code."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest
import websockets
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_cluster import RoomRule
from asgi_cluster.codes import CloseCode
from asgi_cluster.realtime.protocol import BadFrame, Command, DisconnectCode, decode_commands
from tests.realtime.site import Site
from tests.support.waiting import eventually

DOCUMENTED = {int(code) for code in (*DisconnectCode, *CloseCode)} | {1000, 1007}

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
SPARE = [None, 0, -1, 1e308, 2**64, "", "\ud800", "kept:b", [], {}, True, "x" * 300]


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
