"""Whatever a node sends to one socket arrives in the order in which it was sent, from however many sides."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.protocol import State

from asgi_cluster.centrifuge.wire import JSON
from asgi_cluster.rooms.local_room import LocalRoom
from asgi_cluster.sockets import batches as flushing
from asgi_cluster.sockets.batches import Flusher
from asgi_cluster.sockets.closes import Closes
from asgi_cluster.sockets.outbox import Outbox
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.sockets.socket import Socket
from asgi_cluster.sockets.stats import Counters
from asgi_cluster.sockets.wire import Wire

pytestmark = pytest.mark.quick

_SOCKETS = 50
_ROOMS = 3
_OPERATIONS = 400


class Transport:
    """Takes frames, and is slow when the test says so."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.writable = asyncio.Event()
        self.writable.set()

    def write(self, data: bytes) -> None:
        while data:  # short text frames: two bytes, and the payload
            size = data[1]
            self.frames.append(data[2 : 2 + size])
            data = data[2 + size :]

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0 if self.writable.is_set() else 100_000


def always(text: bytes) -> Callable[[Wire], PreparedMessage]:
    """The same in every form."""
    packet = PreparedMessage(text)
    return lambda _: packet


class Member:
    """A member of rooms, on a transport of the test's, and what it should get."""

    def __init__(self, number: int, flusher: Flusher, tasks: asyncio.TaskGroup, *, direct: bool) -> None:
        self.number = number
        self.expected: list[bytes] = []
        self.closed = False
        self.transport = Transport()
        server = SimpleNamespace(
            transport=self.transport,
            writable=self.transport.writable,
            handshake_complete=True,
            close_sent=False,
            disconnected=False,
            conn=SimpleNamespace(state=State.OPEN),
        )

        async def send(message: Any) -> None:
            if message["type"] == "websocket.send":
                await self.transport.writable.wait()
                self.transport.frames += message["text"].encode().split(b"\n")

        self.socket = Socket({}, send, tasks=tasks, crosses_loops=False, close_timeout=1, closes=Closes())
        self.socket.state = "open"
        if direct:
            self.socket.server, self.socket.why_not_direct = server, ""
        self.outbox = self.socket.outbox = Outbox(self.socket, flusher, Counters(), limit=1 << 20, wire=JSON)


@pytest.mark.parametrize("seed", range(25))
async def test_what_is_sent_in_any_order_arrives_in_that(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Broadcasts to rooms with members in common, with and without ``exclude``, personal messages, joins,
    leaves, slow clients, closes, and ends of ticks and of slices at any moment.
    """
    if seed % 2:
        monkeypatch.setattr(flushing, "_SLICE", 0.0)  # the loop is given back after 32 sockets
    choose = random.Random(seed)
    flusher = Flusher(asyncio.get_running_loop())
    async with asyncio.TaskGroup() as tasks:
        members = [
            Member(number, flusher, tasks, direct=bool(seed % 5 == 0 and number % 7) or seed % 5 > 0)
            for number in range(_SOCKETS)
        ]
        rooms = [LocalRoom(f"r{number}", flusher) for number in range(_ROOMS)]
        inside: list[set[Member]] = [set(), set(), set()]
        for room, people in zip(rooms, inside, strict=True):
            for member in choose.sample(members, 40):
                room.attach(member.socket.id, member.outbox)
                people.add(member)
        # Mostly one room, as in life: or there would hardly be a shared batch.
        weights = (20, 2, 1)
        for number in range(_OPERATIONS):
            (index,) = choose.choices(range(_ROOMS), weights)
            room, people, member = rooms[index], inside[index], choose.choice(members)
            text = b"%d" % number
            match choose.choices(
                ("broadcast", "exclude", "personal", "join", "leave", "slow", "fast", "close", "tick"),
                (40, 2, 4, 3, 3, 1, 2, 1, 12),
            )[0]:
                case "broadcast":
                    room.deliver(always(text))
                    for each in people:
                        each.expected.append(text)
                case "exclude":
                    room.deliver(always(text), exclude=member.socket.id)
                    for each in people - {member}:
                        each.expected.append(text)
                case "personal" if not member.closed:
                    member.outbox.push(PreparedMessage(text))
                    member.expected.append(text)
                case "join" if not member.closed and member not in people:
                    room.attach(member.socket.id, member.outbox)
                    people.add(member)
                case "leave" if member in people:
                    room.detach(member.socket.id, member.outbox)
                    people.discard(member)
                case "slow":
                    member.transport.writable.clear()
                case "fast":
                    member.transport.writable.set()
                case "close" if not member.closed and member.transport.writable.is_set():
                    if member.outbox.blocked:
                        continue  # a slow client's last messages may be lost with it
                    member.socket.close(1000, "")
                    member.closed = True
                    for others in inside:
                        others.discard(member)
                    for each_room in rooms:
                        each_room.detach(member.socket.id, member.outbox)
                case "tick":
                    await asyncio.sleep(0)
        for member in members:
            member.transport.writable.set()
        for _ in range(50):
            await asyncio.sleep(0)
    for member in members:
        assert member.transport.frames == member.expected, f"socket {member.number}, closed: {member.closed}"


async def test_shared_batch_reaches_the_members_of_its_time() -> None:
    """And no others: a member that joins in a tick gets what comes after, one that leaves has what came
    before.
    """
    flusher = Flusher(asyncio.get_running_loop())
    async with asyncio.TaskGroup() as tasks:
        members = [Member(number, flusher, tasks, direct=True) for number in range(20)]
        room = LocalRoom("r", flusher)
        for member in members[:-1]:
            room.attach(member.socket.id, member.outbox)
        room.deliver(always(b"1"))
        room.deliver(always(b"2"))
        assert flusher.batch is not None
        room.detach(members[0].socket.id, members[0].outbox)
        room.attach(members[-1].socket.id, members[-1].outbox)
        room.deliver(always(b"3"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert members[0].transport.frames == [b"1", b"2"]
    assert members[-1].transport.frames == [b"3"]
    assert all(member.transport.frames == [b"1", b"2", b"3"] for member in members[1:-1])
