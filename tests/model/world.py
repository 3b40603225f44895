"""A cluster on a virtual clock: a server, links that drop, stall and delay, and nodes with the real cache and
the real lease.

The links are FIFO in each direction, as TCP connections are. The server executes one thing at a time and
pushes before it replies, as Redis does. Everything else may happen in any order, which is what the explorer
and the random runs decide.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from asgi_cluster.bus.lease import Heartbeats, Lease
from asgi_cluster.ids import Handle
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.entry import PendingRead
from asgi_cluster.sessions.store import Record

LEASE = 2.0
HANDLE = Handle("00." + "a" * 22)


class StaleRead(AssertionError):
    """A cached read broke the bound, or a node read something older than a write that it had received."""


def record(value: int) -> Record:
    return Record(
        handle=HANDLE,
        secret=b"",
        previous=None,
        previous_for=0.0,
        user=None,
        version=value,
        write_id=str(value),
        created_at=0.0,
        expires_in=1e9,
        absolute_in=1e9,
        idle=1e9,
        persistent=False,
        fields={},
    )


class Server:
    """The truth, and when each value was superseded."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.value = 0
        self.superseded: dict[int, float] = {}
        self.links: list[Node] = []

    def write(self) -> int:
        for node in self.links:
            node.push("changed")
        self.superseded[self.value] = self.world.now
        self.value += 1
        return self.value


@dataclass
class Write:
    """A write of a node's own: dropped before it is sent, dropped again when its outcome is known."""

    committed: int | None = None


@dataclass
class Read:
    """One request that waits for the store."""

    flight: PendingRead
    floor: int
    answer: int | None = None
    joined: list[int] = field(default_factory=list)


class Node:
    """One node: the cache, the lease, and a subscriber connection that may be up, down, stalled or without
    its subscriptions.
    """

    def __init__(self, world: World, cache: type[SessionCache], echo: type[Heartbeats]) -> None:
        self.world = world
        self.lease = Lease(LEASE, clock=lambda: world.now)
        self.echo = echo(self.lease)
        self.cache = cache(lambda bucket: self.lease, ttl=1e9, max_entries=100)
        self.connected = False
        self.subscribed_at_server = False
        self.to_server: deque[str] = deque()
        self.from_server: deque[str] = deque()
        self.reads: list[Read] = []
        self.writes: list[Write] = []
        self.acknowledged = 0
        self.drops_before_write = True
        self.drops_after_write = True

    # The subscriber connection

    def connect(self) -> None:
        """TCP is up; SUBSCRIBE is on its way, and an eager beat of no worth behind it."""
        self.connected = True
        self.to_server.append("subscribe")

    def beat(self) -> None:
        self.echo.beat()
        self.to_server.append("beat")

    def disconnect(self) -> None:
        """The connection breaks, and the node notices."""
        self.connected = False
        self.subscribed_at_server = False
        self.to_server.clear()
        self.from_server.clear()
        if self in self.world.server.links:
            self.world.server.links.remove(self)
        self.echo.gap()
        self.cache.flush()

    def server_takes(self) -> None:
        """The server executes the next command of this connection."""
        command = self.to_server.popleft()
        if command == "subscribe":
            self.world.server.links.append(self)
            self.from_server.append("subscribed")
        else:
            self.from_server.append("echo")

    def push(self, message: str) -> None:
        if not self.world.lossy:
            self.from_server.append(message)

    def receive(self) -> None:
        """The node takes the next thing from the connection."""
        match self.from_server.popleft():
            case "changed":
                self.cache.drop(HANDLE)
            case "subscribed":
                self.echo.subscribed()
            case "echo":
                self.echo.reply(True)
            case "redirect":
                self.echo.reply(False)

    # Requests

    def get(self) -> None:
        """A request reads the session: a hit is checked at once, a miss departs, or joins a flight."""
        entry = self.cache.get(HANDLE)
        if entry is not None:
            assert entry.record is not None
            self.check(entry.record.version, self.acknowledged)
            return
        flight = self.cache.pending(HANDLE)
        if flight is not None:
            for read in self.reads:
                if read.flight is flight:
                    read.joined.append(self.acknowledged)
                    return
        self.reads.append(Read(self.cache.begin(HANDLE), self.acknowledged))

    def store_answers(self, read: Read) -> None:
        read.answer = self.world.server.value

    def land(self, read: Read) -> None:
        self.reads.remove(read)
        assert read.answer is not None
        self.cache.finish(read.flight, record(read.answer))
        for floor in (read.floor, *read.joined):
            if read.answer < floor:
                raise StaleRead(f"a request got {read.answer} after its node had received {floor}")

    def begin_write(self) -> None:
        if self.drops_before_write:
            self.cache.drop(HANDLE)
        self.writes.append(Write())

    def commit_write(self, write: Write) -> None:
        write.committed = self.world.server.write()

    def end_write(self, write: Write) -> None:
        self.writes.remove(write)
        if self.drops_after_write:
            self.cache.drop(HANDLE)
        assert write.committed is not None
        self.acknowledged = max(self.acknowledged, write.committed)

    def check(self, value: int, floor: int) -> None:
        if value < floor:
            raise StaleRead(f"a hit gave {value} after this node had received {floor}")
        superseded = self.world.server.superseded.get(value)
        if superseded is not None and self.world.now - superseded > LEASE + 1e-9:
            raise StaleRead(
                f"a hit gave {value}, which was superseded {self.world.now - superseded:.3f} s ago"
            )


class World:
    """A server and its nodes on one virtual clock. ``lossy``: links between servers lose pushes while all TCP
    stays up.
    """

    def __init__(
        self, nodes: int = 1, cache: type[SessionCache] = SessionCache, echo: type[Heartbeats] = Heartbeats
    ) -> None:
        self.now = 100.0
        self.lossy = False
        self.server = Server(self)
        self.nodes = [Node(self, cache, echo) for _ in range(nodes)]

    def actions(self, node: Node) -> list[tuple[str, object]]:
        """What may happen next at ``node``: name and argument."""
        found: list[tuple[str, object]] = [("get", None)]
        if node.connected:
            found += [("disconnect", None), ("beat", None)]
        else:
            found.append(("connect", None))
        if node.to_server:
            found.append(("server_takes", None))
        if node.from_server:
            found.append(("receive", None))
        for index, read in enumerate(node.reads):
            found.append(("land" if read.answer is not None else "store_answers", index))
        for index, write in enumerate(node.writes):
            found.append(("end_write" if write.committed is not None else "commit_write", index))
        if len(node.writes) < 1:
            found.append(("begin_write", None))
        return found

    def do(self, node: Node, name: str, argument: object) -> None:
        if name in ("land", "store_answers"):
            getattr(node, name)(node.reads[argument])  # type: ignore[call-overload]
        elif name in ("commit_write", "end_write"):
            getattr(node, name)(node.writes[argument])  # type: ignore[call-overload]
        else:
            getattr(node, name)()
