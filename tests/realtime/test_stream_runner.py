"""The reads of a room's history: shared, failing, cancelled, repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from asgi_cluster.bus.lease import Lease
from asgi_cluster.exceptions import BusUnavailable
from asgi_cluster.rooms.history import Entry, HistoryStore, Page, Position
from asgi_cluster.rooms.stream_runner import StreamRunner
from tests.support.waiting import eventually


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
    """A stream with everything around it."""

    def __init__(self, log: Log, tasks: asyncio.TaskGroup, lease: Lease) -> None:
        self.log = log
        self.delivered: list[int] = []
        self.lost = 0

        def lose() -> None:
            self.lost += 1

        self.refuses = False
        self.fails_at = 0
        self.repairs: list[asyncio.Task[None]] = []

        def spawn(work: Coroutine[Any, Any, None]) -> None:
            if self.refuses:
                work.close()
            else:
                self.repairs.append(tasks.create_task(work))

        def deliver(found: Entry) -> None:
            if found.offset == self.fails_at:
                raise ValueError("refused")
            self.delivered.append(found.offset)

        self.stream = StreamRunner(
            "room",
            history=cast(HistoryStore, log),
            size=100,
            ttl=60,
            timeout=1,
            epoch=lambda: "e",
            lease=lambda: lease,
            deliver=deliver,
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


async def test_repair_that_cannot_run(log: Log) -> None:
    """Where nothing takes the repair (no member is there) the next arrival begins another."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        log.add(3)
        bench.refuses = True
        bench.arrive(2)
        bench.refuses = False
        bench.arrive(3)
        await settle()
        assert (bench.delivered, bench.lost) == ([1, 2, 3], 0)


async def test_cancelled_repair(log: Log) -> None:
    """After a repair that was cancelled a member that enters reads history."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        log.add(3)
        log.gate.clear()
        bench.arrive(3)
        await settle()
        bench.repairs.pop().cancel()
        await settle()
        log.gate.set()
        assert await bench.stream.recover(None) == (None, Position(3, "e"))
        assert (bench.delivered, bench.lost) == ([1, 2, 3], 0)


async def test_delivery_that_fails(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    """One message that cannot be delivered is logged, and those after it are delivered."""
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(log, tasks, Alive())
        await bench.stream.recover(None)
        log.add(3)
        bench.fails_at = 2
        bench.arrive(3)
        await settle()
        assert bench.delivered == [1, 3]
    assert "could not be delivered" in caplog.text


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


async def _fails(stream: StreamRunner) -> None:
    with pytest.raises(BusUnavailable):
        await stream.recover(Position(1, "e"))


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
