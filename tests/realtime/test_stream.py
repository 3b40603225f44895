"""A room's order on one node: what arrives out of turn, twice, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from asgi_cluster.bus.lease import Lease
from asgi_cluster.exceptions import BusUnavailable
from asgi_cluster.rooms.history import Entry, HistoryStore, Page, Position
from asgi_cluster.rooms.stream import RoomStream
from tests.support.waiting import eventually

pytestmark = pytest.mark.quick


class Log:
    """A history whose answers the test decides: entries, epoch, failures, and when a read returns."""

    def __init__(self, entries: list[Entry] | None = None, epoch: str = "e") -> None:
        self.entries = entries or []
        self.epoch = epoch
        self.reads = 0
        self.failing = False
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def top(self) -> Position:
        return Position(self.entries[-1].offset if self.entries else 0, self.epoch)

    def add(self, count: int = 1) -> Entry:
        for _ in range(count):
            last = self.top.offset
            self.entries.append(entry(last + 1))
        return self.entries[-1]

    async def read(self, room: str, *, since: Position | None, limit: int | None, **_: Any) -> Page:
        self.reads += 1
        entries, top = list(self.entries), self.top
        await self.gate.wait()
        if self.failing:
            raise BusUnavailable("no answer")
        if since is None:
            return Page(entries[:limit], top, True)
        if since.epoch != top.epoch:
            return Page([], top, False)
        complete = since == top or any(found.previous == since.offset for found in entries)
        return Page([found for found in entries if found.offset > since.offset], top, complete)

    async def publish(self, *args: Any, **options: Any) -> Position:
        raise NotImplementedError


def entry(offset: int, previous: int | None = None) -> Entry:
    return Entry(offset, offset - 1 if previous is None else previous, b"%d" % offset)


class Bench:
    """A sequence with everything around it."""

    def __init__(self, log: Log, tasks: asyncio.TaskGroup, lease: Lease) -> None:
        self.log = log
        self.delivered: list[int] = []
        self.lost = 0

        def lose() -> None:
            self.lost += 1

        def spawn(work: Coroutine[Any, Any, None]) -> None:
            tasks.create_task(work)

        self.stream = RoomStream(
            "room",
            history=cast("HistoryStore", log),
            size=100,
            ttl=60,
            timeout=1,
            epoch=lambda: "e",
            lease=lambda: lease,
            deliver=lambda found: self.delivered.append(found.offset),
            lost=lose,
            spawn=spawn,
        )

    def arrive(self, *offsets: int, epoch: str = "e", previous: int | None = None) -> None:
        for offset in offsets:
            before = offset - 1 if previous is None else previous
            self.stream.receive(Position(offset, epoch), before, b"%d" % offset)


class Alive(Lease):
    def __init__(self) -> None:
        super().__init__(2.0, clock=lambda: 0.0)
        self.until = 1.0


@pytest.fixture
def log() -> Log:
    return Log()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_in_order(log: Log) -> None:
    """What comes next is delivered at once, what came before is dropped."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        bench.arrive(1, 2, 2, 1, 3)
        assert bench.delivered == [1, 2, 3]
        assert log.reads == 1
        bench.stream.close()


async def test_missing_is_repaired(log: Log) -> None:
    """A gap is filled from history before anything later is delivered."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        log.add(5)
        bench.arrive(1, 4)
        assert bench.delivered == [1]
        bench.arrive(5)
        await settle()
        assert bench.delivered == [1, 2, 3, 4, 5]
        assert bench.lost == 0


async def test_missing_is_told(log: Log) -> None:
    """What history does not have either is told, and the room goes on after it."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        bench.arrive(1)
        log.add(9)
        del log.entries[:5]
        bench.arrive(9)
        await settle()
        assert bench.lost == 1
        log.add(1)
        bench.arrive(10)
        assert bench.delivered == [1, 10]


async def test_lost_numbering_is_told(log: Log) -> None:
    """The room's numbering was lost, and another one of the same epoch began with a lower number: the members
    are told instead of missing what comes until it has caught up.
    """
    log.entries = [entry(900, 0)]
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        log.entries = [entry(500, 0)]
        bench.arrive(500, previous=0)
        await settle()
        assert (bench.delivered, bench.lost) == ([], 1)
        log.entries.append(entry(501))
        bench.arrive(501)
        assert bench.delivered == [501]
        bench.stream.close()


async def test_late_copy_of_the_first(log: Log) -> None:
    """It loses nothing, also where the first publication was not seen when it was new."""
    log.entries = [entry(500, 0), entry(501), entry(502)]
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        bench.arrive(500, previous=0)
        log.add(1)
        bench.arrive(503)
        await settle()
        assert (bench.delivered, bench.lost) == ([503], 0)
        bench.stream.close()


async def test_new_epoch_is_told(log: Log) -> None:
    """Another numbering: nothing can be compared, everybody is told."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        log.add(3)
        bench.arrive(1, 2, 3)
        log.entries, log.epoch = [entry(1)], "f"
        bench.arrive(1, epoch="f")
        await settle()
        assert bench.lost == 1
        assert bench.stream.last == Position(1, "f")


async def test_jump_after_a_failover(log: Log) -> None:
    """The store lost 3 and jumped: who has 3 is told, who stands at 2 goes on across the jump."""
    jump = 2 + (1 << 20)
    async with asyncio.TaskGroup() as tasks:
        for seen, lost in ((3, 1), (2, 0)):
            own = Log()
            bench = Bench(own, tasks, Alive())
            await bench.stream.recover(None)
            bench.arrive(*range(1, seen + 1))
            own.entries = [entry(1), entry(2), entry(jump, previous=2)]
            bench.arrive(jump, previous=2)
            await settle()
            assert bench.lost == lost
            assert bench.stream.last == Position(jump, "e")
            if not lost:
                assert bench.delivered == [1, 2, jump]
                assert await bench.stream.recover(Position(2, "e")) == (
                    [own.entries[-1]],
                    Position(jump, "e"),
                )
            assert (await bench.stream.recover(Position(3, "e")))[0] is None
            bench.stream.close()


async def test_repair_waits_for_the_store(log: Log) -> None:
    """While history does not answer nothing is delivered and nobody is told; then everything is."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        log.add(4)
        log.failing = True
        bench.arrive(1, 3)
        await settle()
        bench.arrive(4)
        assert bench.delivered == [1]
        log.failing = False
        await eventually(lambda: bench.delivered == [1, 2, 3, 4])
        assert bench.lost == 0


async def test_lost_last_message(log: Log) -> None:
    """After a gap the position is checked, so that a lost *last* message is found without a next one."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        bench.arrive(1)
        log.add(3)
        bench.stream.gap()
        bench.stream.restored()
        await settle()
        assert bench.delivered == [1, 2, 3]


async def test_recover(log: Log) -> None:
    """``recover`` gives all that was missed, or ``None``; never a part."""
    log.add(10)
    del log.entries[:4]  # the room keeps 5 to 10
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        sequence = bench.stream
        for since, expected in (
            (Position(4, "e"), [5, 6, 7, 8, 9, 10]),
            (Position(9, "e"), [10]),
            (Position(10, "e"), []),
            (Position(10, ""), []),
            (Position(3, "e"), None),
            (Position(0, "e"), None),
            (Position(11, "e"), None),
            (Position(9, "other"), None),
        ):
            missed, top = await sequence.recover(since)
            assert (None if missed is None else [found.offset for found in missed]) == expected, since
            assert top == Position(10, "e")
        assert bench.delivered == []
        sequence.close()


async def test_many_recoveries_are_one_read(log: Log) -> None:
    """A thousand clients that come back at once, with positions of their own, cost one read."""
    log.add(50)
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        log.gate.clear()
        waiting = [
            tasks.create_task(bench.stream.recover(Position(number % 51, "e"))) for number in range(1000)
        ]
        await settle()
        log.gate.set()
        answers = await asyncio.gather(*waiting)
        assert log.reads == 1
        for number, (missed, _) in enumerate(answers):
            assert missed is not None
            assert [found.offset for found in missed] == list(range(number % 51 + 1, 51))
        log.add()
        bench.arrive(51)
        missed, _ = await bench.stream.recover(Position(49, "e"))
        assert missed is not None
        assert [found.offset for found in missed] == [50, 51]
        assert log.reads == 1
        bench.stream.close()


async def test_failed_read_is_shared(log: Log) -> None:
    """When history does not answer, everybody who waits is told by one read, not one after the other."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        log.gate.clear()
        log.failing = True
        waiting = [tasks.create_task(_fails(bench.stream)) for _ in range(100)]
        await settle()
        log.gate.set()
        await asyncio.gather(*waiting)
        assert log.reads == 1


async def _fails(sequence: RoomStream) -> None:
    with pytest.raises(BusUnavailable):
        await sequence.recover(Position(1, "e"))


async def test_cancelled_reader_takes_nobody_along(log: Log) -> None:
    """The first of those who read is cancelled: the others read again."""
    log.add(3)
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        log.gate.clear()
        first = asyncio.ensure_future(bench.stream.recover(Position(1, "e")))
        second = tasks.create_task(bench.stream.recover(Position(1, "e")))
        await settle()
        first.cancel()
        await settle()
        log.gate.set()
        missed, _ = await second
        assert missed is not None
        assert [found.offset for found in missed] == [2, 3]
        bench.stream.close()


async def test_arrivals_during_a_read(log: Log) -> None:
    """What arrives while history is read is delivered after it, once."""
    log.add(3)
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        log.gate.clear()
        reading = tasks.create_task(bench.stream.recover(Position(1, "e")))
        await settle()
        bench.arrive(3, 4, 5)
        log.gate.set()
        missed, top = await reading
        # 4 and 5 were delivered before the newcomer was let in, so that it gets them with what it missed.
        assert missed is not None
        assert [found.offset for found in missed] == [2, 3, 4, 5]
        assert top.offset == 5
        assert bench.delivered == [4, 5]
        bench.stream.close()


async def test_dead_lease_asks_the_store(log: Log) -> None:
    """Under a lapsed lease the node's own state answers nobody: history is read first."""
    lease = Alive()
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, lease)
        await bench.stream.recover(None)
        log.add(2)
        lease.revoke()
        missed, top = await bench.stream.recover(Position(0, "e"))
        assert missed is not None
        assert [found.offset for found in missed] == [1, 2]
        assert top == Position(2, "e")
        assert bench.delivered == [1, 2]
        bench.stream.close()
