"""A room's order on one node, without I/O: what arrives out of turn, twice, or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_cluster.rooms.history import Entry, Page, Position
from asgi_cluster.rooms.stream import Action, Actions, Read, Recovered, RoomStream

pytestmark = pytest.mark.quick


def entry(offset: int, previous: int | None = None) -> Entry:
    return Entry(offset, offset - 1 if previous is None else previous, b"%d" % offset)


class Log:
    """A room's history as the store has it."""

    def __init__(self, entries: list[Entry] | None = None, epoch: str = "e") -> None:
        self.entries = entries or []
        self.epoch = epoch

    @property
    def top(self) -> Position:
        return Position(self.entries[-1].offset if self.entries else 0, self.epoch)

    def add(self, count: int = 1) -> Entry:
        for _ in range(count):
            self.entries.append(entry(self.top.offset + 1))
        return self.entries[-1]

    def page(self, read: Read) -> Page:
        since, top = read.since, self.top
        if since is None:
            return Page(self.entries[: read.limit], top, True)
        if since.epoch != top.epoch:
            return Page([], top, False)
        complete = since == top or any(found.previous == since.offset for found in self.entries)
        return Page([found for found in self.entries if found.offset > since.offset], top, complete)


class Bench:
    """A stream, a log, and what the stream asks for, done when the test says so."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.stream = RoomStream(size=100)
        self.delivered: list[int] = []
        self.lost = 0
        self.reads = 0

    def perform(self, actions: Actions) -> None:
        for action in actions:
            if isinstance(action, Entry):
                self.delivered.append(action.offset)
            elif action is Action.LOST:
                self.lost += 1

    def read(self, *, full: bool) -> None:
        self.reads += 1
        read = self.stream.begin_read(full=full)
        self.perform(self.stream.end_read(read, self.log.page(read)))

    def recover(self, since: Position | None, *, live: bool = True) -> Recovered:
        steps = self.stream.recover(since, live=live)
        while True:
            try:
                full = next(steps)
            except StopIteration as end:
                recovered: Recovered = end.value
                return recovered
            self.read(full=full)

    def arrive(self, *offsets: int, epoch: str = "e", previous: int | None = None) -> None:
        """Pushes come in, and repairs that begin end at once."""
        for offset in offsets:
            before = offset - 1 if previous is None else previous
            self.perform(self.stream.receive(Position(offset, epoch), before, b"%d" % offset))
        self.repair()

    def repair(self) -> None:
        while self.stream.repairing:
            self.stream.begin_try()
            self.read(full=False)
            self.perform(self.stream.end_try())


def entered(log: Log) -> Bench:
    """A bench whose stream has its position."""
    bench = Bench(log)
    bench.recover(None)
    return bench


def test_in_order() -> None:
    """What comes next is delivered at once, what came before is dropped."""
    bench = entered(Log())
    bench.arrive(1, 2, 2, 1, 3)
    assert bench.delivered == [1, 2, 3]
    assert bench.reads == 1


def test_missing_is_repaired() -> None:
    """A gap is filled from history before anything later is delivered."""
    log = Log()
    bench = entered(log)
    log.add(5)
    receive = bench.stream.receive
    assert receive(Position(1, "e"), 0, b"1") == [entry(1)]
    assert receive(Position(4, "e"), 3, b"4") == [Action.REPAIR]
    assert receive(Position(5, "e"), 4, b"5") == []
    bench.repair()
    assert (bench.delivered, bench.lost) == ([2, 3, 4, 5], 0)


def test_missing_is_reported() -> None:
    """What history does not have either is lost, once, and the room goes on after it."""
    log = Log()
    bench = entered(log)
    bench.arrive(1)
    log.add(9)
    del log.entries[:5]
    bench.arrive(9)
    assert bench.lost == 1
    log.add(1)
    bench.arrive(10)
    assert bench.delivered == [1, 10]


def test_missing_and_not_in_history_yet() -> None:
    """The history lags behind the pushes: after two reads the room goes on from the last push."""
    bench = entered(Log())
    bench.arrive(3, 4)
    assert (bench.delivered, bench.lost, bench.reads) == ([], 1, 3)
    assert bench.stream.last == Position(4, "e")


def test_lost_numbering_is_reported() -> None:
    """The room's numbering was lost, and another one of the same epoch began with a lower number: the members
    are unsubscribed instead of missing what comes until it has caught up.
    """
    log = Log([entry(900, 0)])
    bench = entered(log)
    log.entries = [entry(500, 0)]
    bench.arrive(500, previous=0)
    assert (bench.delivered, bench.lost) == ([], 1)
    log.entries.append(entry(501))
    bench.arrive(501)
    assert bench.delivered == [501]


def test_late_copy_of_the_first() -> None:
    """It loses nothing, also where the first publication was not seen when it was new."""
    log = Log([entry(500, 0), entry(501), entry(502)])
    bench = entered(log)
    bench.arrive(500, previous=0)
    log.add(1)
    bench.arrive(503)
    assert (bench.delivered, bench.lost) == ([503], 0)


def test_new_epoch_is_reported() -> None:
    """Another numbering: nothing can be compared, every member is unsubscribed."""
    log = Log()
    bench = entered(log)
    log.add(3)
    bench.arrive(1, 2, 3)
    log.entries, log.epoch = [entry(1)], "f"
    bench.arrive(1, epoch="f")
    assert bench.lost == 1
    assert bench.stream.last == Position(1, "f")


def test_jump_after_a_failover() -> None:
    """The store lost 3 and jumped: a room that stands at 3 has lost something, one at 2 goes on across the
    jump.
    """
    jump = 2 + (1 << 20)
    for seen, lost in ((3, 1), (2, 0)):
        log = Log()
        bench = entered(log)
        bench.arrive(*range(1, seen + 1))
        log.entries = [entry(1), entry(2), entry(jump, previous=2)]
        bench.arrive(jump, previous=2)
        assert bench.lost == lost
        assert bench.stream.last == Position(jump, "e")
        if not lost:
            assert bench.delivered == [1, 2, jump]
            assert bench.recover(Position(2, "e")) == ([log.entries[-1]], Position(jump, "e"))
        assert bench.recover(Position(3, "e")).missed is None


def test_lost_last_message() -> None:
    """After a gap the position is checked, so that a lost *last* message is found without a next one."""
    log = Log()
    bench = entered(log)
    bench.arrive(1)
    log.add(3)
    bench.stream.gap()
    bench.perform(bench.stream.restored())
    bench.repair()
    assert bench.delivered == [1, 2, 3]


def test_recover() -> None:
    """``recover`` gives all that was missed, or ``None``; never a part."""
    log = Log()
    log.add(10)
    del log.entries[:4]  # the room keeps 5 to 10
    bench = Bench(log)
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
        missed, top = bench.recover(since)
        assert (None if missed is None else [found.offset for found in missed]) == expected, since
        assert top == Position(10, "e")
    assert bench.delivered == []
    assert bench.reads == 2, "the first read, and one for the position that is ahead"


def test_arrivals_during_a_read() -> None:
    """What arrives while history is read is delivered after it, once."""
    log = Log()
    log.add(3)
    bench = Bench(log)
    read = bench.stream.begin_read(full=True)
    page = log.page(read)
    bench.arrive(3, 4, 5)
    assert bench.delivered == []
    bench.perform(bench.stream.end_read(read, page))
    assert bench.delivered == [4, 5]
    missed, top = bench.recover(Position(1, "e"))
    assert missed is not None
    assert [found.offset for found in missed] == [2, 3, 4, 5]
    assert top.offset == 5


def test_dead_lease_reads_history() -> None:
    """Under a lapsed lease the node's own state is not enough: history is read first."""
    log = Log()
    bench = entered(log)
    log.add(2)
    missed, top = bench.recover(Position(0, "e"), live=False)
    assert missed is not None
    assert [found.offset for found in missed] == [1, 2]
    assert top == Position(2, "e")
    assert bench.delivered == [1, 2]


def test_gap_during_a_read_that_fails() -> None:
    """A failed read proves nothing: the next recovery reads again; one that succeeded proves it."""
    log = Log()
    bench = entered(log)
    bench.stream.gap()
    read = bench.stream.begin_read(full=False)
    assert bench.stream.end_read(read, None) == []
    reads = bench.reads
    bench.recover(None)
    assert bench.reads == reads + 1
    bench.recover(None)
    assert bench.reads == reads + 1


def test_tail_is_dropped() -> None:
    """Without the tail the next recovery reads history."""
    log = Log()
    log.add(3)
    bench = entered(log)
    bench.recover(Position(1, "e"))
    assert bench.stream.has_tail
    reads = bench.reads
    bench.recover(Position(2, "e"))
    assert bench.reads == reads
    bench.stream.drop_tail()
    bench.recover(Position(2, "e"))
    assert bench.reads == reads + 1


# Random faults


class Faulty(Bench):
    """A bench whose pushes and pages are under way until the test hands them over.

    ``seen`` is what a member at the start of the run has got, and ``LOST`` ends its membership: another one
    enters at that place.
    """

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.pushes: list[Entry] = []
        self.under_way: list[tuple[Read, Page | None]] = []
        self.memberships: list[list[int]] = [[]]
        self.starts: list[int] = []

    def perform(self, actions: Actions) -> None:
        for action in actions:
            if isinstance(action, Entry):
                self.memberships[-1].append(action.offset)
            elif action is Action.LOST:
                self.lost += 1
                self.memberships.append([])

    def begin(self, *, full: bool) -> None:
        if self.stream.repairing:
            self.stream.begin_try()
        read = self.stream.begin_read(full=full)
        self.under_way.append((read, self.log.page(read)))

    def end(self, index: int, *, fails: bool) -> None:
        read, page = self.under_way.pop(index % len(self.under_way))
        self.perform(self.stream.end_read(read, None if fails else page))
        if self.stream.repairing and not fails:
            self.perform(self.stream.end_try())

    def hand_over(self, index: int, *, again: bool) -> None:
        found = self.pushes[index % len(self.pushes)]
        if not again:
            self.pushes.remove(found)
        position = Position(found.offset, self.log.epoch)
        self.perform(self.stream.receive(position, found.previous, found.payload))


_steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["publish"] * 4
            + ["push"] * 4
            + ["push again", "lose", "gap", "restored", "begin", "begin full", "end", "end", "fail", "forget"]
        ),
        st.integers(0, 20),
    ),
    min_size=20,  # or most would have five steps
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(_steps)
def test_every_publication_once_in_order_or_lost(steps: list[tuple[str, int]]) -> None:
    """Pushes that are lost, doubled and out of turn, pages that are old when they come, reads that fail, and
    a history that forgets: a membership gets each publication once and in order, without a hole; a hole ends
    it. In the end everything published is delivered, or was reported as lost.
    """
    log = Log()
    bench = Faulty(log)
    bench.recover(None)
    for step, index in steps:
        match step:
            case "publish":
                bench.pushes.append(log.add())
            case "push" | "push again" if bench.pushes:
                bench.hand_over(index if step == "push again" or index > 15 else 0, again=step != "push")
            case "lose" if bench.pushes:
                bench.pushes.pop(index % len(bench.pushes))
            case "gap":
                bench.stream.gap()
            case "restored":
                bench.perform(bench.stream.restored())
            case "begin" | "begin full" if not bench.under_way:
                bench.begin(full=step == "begin full")
            case "end" | "fail" if bench.under_way:
                bench.end(index, fails=step == "fail")
            case "forget":
                del log.entries[: max(0, len(log.entries) - 1 - index % 4)]
    # In the end the bus works again, and history answers.
    while bench.pushes:
        bench.hand_over(0, again=False)
    while bench.under_way:
        bench.end(0, fails=False)
    bench.stream.gap()
    bench.perform(bench.stream.restored())
    bench.repair()
    assert bench.stream.last == log.top
    for seen in bench.memberships:
        assert seen == list(range(seen[0], seen[0] + len(seen))) if seen else True
    delivered = [offset for seen in bench.memberships for offset in seen]
    assert delivered == sorted(set(delivered)), "nothing twice"
    if not bench.lost:
        assert delivered == list(range(1, log.top.offset + 1)), "nothing left out"
    missed = bench.recover(log.top)
    assert missed == ([], log.top)
