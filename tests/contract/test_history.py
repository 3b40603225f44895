"""What every history store does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asgi_cluster.ids import new_token
from asgi_cluster.rooms.history import JUMP, HistoryStore, Page, Position, open_envelope
from tests.contract.sites import TIMEOUT, Site
from tests.support.waiting import eventually


async def publish(history: HistoryStore, payload: bytes, room: str = "r", **changes: Any) -> Position:
    """Into a room that remembers ten."""
    values: dict[str, Any] = {
        "size": 10,
        "ttl": 100.0,
        "idempotency_key": None,
        "epoch": new_token(),
        "timeout": TIMEOUT,
    }
    return await history.publish(room, payload, **(values | changes))


async def read(history: HistoryStore, since: Position | None = None, room: str = "r", **changes: Any) -> Page:
    """All that there is after ``since``."""
    values: dict[str, Any] = {"limit": None, "epoch": new_token(), "ttl": 100.0, "timeout": TIMEOUT}
    return await history.read(room, since=since, **(values | changes))


def payloads(page: Page) -> list[bytes]:
    return [entry.payload for entry in page.entries]


async def fill(history: HistoryStore, count: int, **changes: Any) -> Position:
    """The messages 1, 2, 3…; the last one's position."""
    for n in range(1, count):
        await publish(history, b"%d" % n, **changes)
    return await publish(history, b"%d" % count, **changes)


async def test_publish_reaches_members_and_history(site: Site) -> None:
    """Every node that is subscribed to the room gets position, previous offset and message; a read gives the
    same in the same order.
    """
    a, b, c = await site.node(), await site.node(), await site.node()
    for node in (a, b):
        await node.backend.room_bus.subscribe("r")
    await c.backend.room_bus.subscribe("r2")
    messages = [b"one", b"\x00\xff\n binary", b""]
    positions = [await publish(a.backend.history, message) for message in messages]
    start = positions[0].offset
    assert [position.offset - start for position in positions] == [0, 1, 2]
    assert len({position.epoch for position in positions}) == 1
    expected = list(zip(positions, (0, start, start + 1), messages, strict=True))
    for node in (a, b):
        await eventually(lambda node=node: len(node.heard.rooms) == 3)
        assert [open_envelope(envelope) for _, envelope in node.heard.rooms] == expected
    page = await read(b.backend.history)
    assert [(Position(e.offset, page.top.epoch), e.previous, e.payload) for e in page.entries] == expected
    assert page.top == positions[-1]
    assert page.complete
    await publish(a.backend.history, b"sentinel", room="r2")
    await eventually(lambda: c.heard.rooms)
    assert [room for room, _ in c.heard.rooms] == ["r2"]


async def test_rooms_have_numberings_of_their_own(site: Site) -> None:
    """Offsets and epochs of one room are not another's."""
    history = (await site.node()).backend.history
    first, second = await publish(history, b"1", "r1"), await publish(history, b"1", "r2")
    assert first.epoch != second.epoch
    assert (await publish(history, b"2", "r1")).offset == first.offset + 1
    assert (await publish(history, b"2", "r2")).offset == second.offset + 1


async def test_read_of_a_room_without_history(site: Site) -> None:
    """The position of an empty room means something: what is published later is after it, in the same
    epoch.
    """
    history = (await site.node()).backend.history
    epoch = (await history.declare("", b"", node="n", view=0.1, timeout=TIMEOUT)).epoch
    page = await read(history, epoch=epoch)
    assert (page.entries, page.top, page.complete) == ([], Position(0, epoch), True)
    again = (await history.declare("", b"", node="m", view=0.1, timeout=TIMEOUT)).epoch
    assert (await read(history, epoch=again)).top == page.top
    assert (await publish(history, b"1", epoch=again)).epoch == epoch
    later = await read(history, page.top)
    assert (payloads(later), later.complete) == ([b"1"], True)
    assert not (await read(history, Position(0, "lost"))).complete


async def test_numbering_begins_with_a_random_offset(site: Site) -> None:
    """All rooms begin in one epoch: one that begins once more, after a loss, must give no number twice."""
    history = (await site.node()).backend.history
    starts = [await publish(history, b"1", f"r{n}", epoch="e") for n in range(20)]
    assert len({position.offset for position in starts}) == 20
    assert all(position.offset > JUMP for position in starts)


async def test_read_since_limit_and_reverse(site: Site) -> None:
    """After a position, at most so many; backwards the newest first, before a position."""
    history = (await site.node()).backend.history
    top = await fill(history, 5)

    async def got(since: int | None, **how: Any) -> list[bytes]:
        position = None if since is None else Position(top.offset - 5 + since, top.epoch)
        return payloads(await read(history, position, **how))

    assert await got(None) == [b"1", b"2", b"3", b"4", b"5"]
    assert await got(2) == [b"3", b"4", b"5"]
    assert await got(2, limit=2) == [b"3", b"4"]
    assert await got(None, limit=2) == [b"1", b"2"]
    assert await got(None, limit=0) == []
    assert await got(5) == []
    assert await got(None, reverse=True) == [b"5", b"4", b"3", b"2", b"1"]
    assert await got(None, reverse=True, limit=2) == [b"5", b"4"]
    assert await got(3, reverse=True) == [b"2", b"1"]
    assert await got(3, reverse=True, limit=1) == [b"2"]
    assert await got(1, reverse=True) == []
    assert await got(0, reverse=True) == []


async def test_read_is_complete_or_says_that_it_is_not(site: Site) -> None:
    """Complete means that nothing between the position and the top is missing; the limit does not count, nor
    does its being 0.
    """
    history = (await site.node()).backend.history
    top = await fill(history, 7, size=3)
    before = top.offset - 7

    async def complete(offset: int, **how: Any) -> bool:
        return (await read(history, Position(before + offset, top.epoch), **how)).complete

    for how in ({}, {"limit": 0}, {"limit": 1}):
        assert [await complete(offset, **how) for offset in range(9)] == [False] * 4 + [True] * 4 + [False]
    other = await read(history, Position(before + 6, "another"))
    assert (other.complete, other.entries, other.top) == (False, [], top)


async def test_history_keeps_exactly_its_size(site: Site) -> None:
    """Neither more nor less, also when the rule becomes smaller."""
    history = (await site.node()).backend.history
    for n in range(250):
        await publish(history, b"%d" % n, size=100)
    assert payloads(await read(history)) == [b"%d" % n for n in range(150, 250)]
    await publish(history, b"last", size=2)
    assert payloads(await read(history)) == [b"249", b"last"]


async def test_history_after_its_time(site: Site) -> None:
    """Entries go when their time is over; the numbering stays, so that a read can go on from the top, and one
    from before is not complete.
    """
    history = (await site.node()).backend.history
    first = await publish(history, b"1", ttl=0.2)
    top = await publish(history, b"2", ttl=0.2)

    async def empty() -> bool:
        return not (await read(history, ttl=0.2)).entries

    await eventually(empty)
    assert (await read(history, top)).complete
    assert not (await read(history, first)).complete
    assert await publish(history, b"3") == Position(top.offset + 1, top.epoch)
    assert (await read(history, top)).complete
    assert payloads(await read(history, top)) == [b"3"]


async def test_idempotency_key(site: Site) -> None:
    """The same key twice is one message and one position, from any node; another key, or another room, is
    another message.
    """
    a, b = await site.node(), await site.node()
    await a.backend.room_bus.subscribe("r")
    first = await publish(a.backend.history, b"1", idempotency_key="k")
    assert await publish(b.backend.history, b"again", idempotency_key="k") == first
    assert (await publish(b.backend.history, b"2", idempotency_key="k2")).offset == first.offset + 1
    assert await publish(b.backend.history, b"other", room="r2", idempotency_key="k") != first
    assert payloads(await read(b.backend.history)) == [b"1", b"2"]
    await eventually(lambda: len(a.heard.rooms) == 2)


async def test_idempotency_key_at_once(site: Site) -> None:
    """Twenty tries at the same time are one message."""
    a, b = await site.node(), await site.node()
    positions = await asyncio.gather(
        *(publish((a, b)[n % 2].backend.history, b"%d" % n, idempotency_key="k") for n in range(20))
    )
    assert len(set(positions)) == 1
    assert len((await read(a.backend.history)).entries) == 1


async def test_publishers_at_once(site: Site) -> None:
    """Two hundred publications from two nodes: one order, the same for both nodes and for the history,
    without a hole.
    """
    a, b = await site.node(), await site.node()
    for node in (a, b):
        await node.backend.room_bus.subscribe("r")
    await asyncio.gather(*(publish((a, b)[n % 2].backend.history, b"%d" % n, size=500) for n in range(200)))
    await eventually(lambda: len(a.heard.rooms) == len(b.heard.rooms) == 200)
    assert a.heard.rooms == b.heard.rooms
    opened = [open_envelope(envelope) for _, envelope in a.heard.rooms]
    offsets = [position.offset for position, _, _ in opened if position]
    assert [offset - offsets[0] for offset in offsets] == list(range(200))
    assert [previous for _, previous, _ in opened] == [0, *offsets[:-1]]
    assert payloads(await read(b.backend.history)) == [payload for _, _, payload in opened]


@pytest.mark.parametrize("room", ["\u00fcn\u00efcode", "with space", "a:b:{c}", "}{", "x" * 255])
async def test_room_names_are_exact(site: Site, room: str) -> None:
    """Any name is a room of its own."""
    node = await site.node()
    await node.backend.room_bus.subscribe(room)
    await publish(node.backend.history, b"1", room)
    await eventually(lambda: node.heard.rooms)
    assert [name for name, _ in node.heard.rooms] == [room]
