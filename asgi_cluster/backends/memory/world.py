"""What the nodes of one ``memory://`` cluster share: the state of its stores, and who is there.

One lock makes every operation atomic, as a script does in Redis. It is never held across an ``await``;
messages are handed to their receivers while it is held, so that all nodes see one order.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from asgi_cluster.bus.bus import Receiver
from asgi_cluster.bus.lease import Clock, boot_clock
from asgi_cluster.ids import NodeId, new_token

__all__ = ["Attachment", "MemoryBroker"]

logger = logging.getLogger("asgi_cluster.memory")


class Attachment:
    """One node's place: its receiver, and the rooms that it is subscribed to.

    ``listens=False``: of a publisher, which is no node and receives only what is posted to it.
    """

    __slots__ = ("incarnation", "listens", "node", "received", "receiver", "rooms", "started_at")

    def __init__(
        self,
        node: NodeId,
        receiver: Callable[[], Receiver | None],
        rooms: set[str],
        *,
        listens: bool = True,
    ) -> None:
        self.node = node
        self.receiver = receiver
        self.rooms = rooms
        self.listens = listens
        self.incarnation = new_token()
        self.started_at = time.time()
        self.received = 0


class MemoryBroker:
    """The shared state. ``clock`` is the store's own clock, in seconds, and never goes back."""

    _named: ClassVar[weakref.WeakValueDictionary[str, MemoryBroker]] = weakref.WeakValueDictionary()
    _naming = threading.Lock()

    def __init__(self, clock: Clock = boot_clock) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self._unix = time.time() - clock()
        self.seats: dict[NodeId, Attachment] = {}
        self._letters: deque[tuple[str, str, bytes]] = deque()
        self._delivering = False
        self._shared: dict[type, Any] = {}
        self.on_leave: list[Callable[[Attachment], None]] = []
        """Called under the lock for every node that leaves."""

    @classmethod
    def named(cls, name: str | None, clock: Clock = boot_clock) -> MemoryBroker:
        """The world that clusters of this process with this ``name`` share; a private one for ``None``."""
        if name is None:
            return cls(clock)
        with cls._naming:
            world = cls._named.get(name)
            if world is None:
                world = cls._named[name] = cls(clock)
            return world

    def part(self, kind: type[Any]) -> Any:
        """The one ``kind(world)`` of this world: the state of a store."""
        with self.lock:
            if kind not in self._shared:
                self._shared[kind] = kind(self)
            return self._shared[kind]

    def unix(self) -> float:
        """Now, as Unix time."""
        return self._unix + self.clock()

    def living(self) -> list[Attachment]:
        """The nodes that are there. A node that was attached and whose cluster object is gone has left."""
        return [seat for seat in self._seated() if seat.listens]

    def _seated(self) -> list[Attachment]:
        with self.lock:
            for seat in [seat for seat in self.seats.values() if seat.receiver() is None]:
                self.leave(seat)
            return list(self.seats.values())

    def sit(self, seat: Attachment) -> None:
        """A node arrives."""
        with self.lock:
            self.seats[seat.node] = seat

    def leave(self, seat: Attachment) -> None:
        """A node leaves."""
        with self.lock:
            if self.seats.get(seat.node) is seat:
                del self.seats[seat.node]
                for callback in self.on_leave:
                    callback(seat)

    def tell_sessions(self, payload: bytes) -> None:
        """To every node."""
        self._tell("sessions", "", payload)

    def tell_node(self, node: str, payload: bytes) -> None:
        """To one node, if it is there."""
        self._tell("node", node, payload)

    def tell_room(self, room: str, payload: bytes) -> None:
        """To every node that is subscribed to the room."""
        self._tell("room", room, payload)

    def _tell(self, audience: str, name: str, payload: bytes) -> None:
        with self.lock:
            self._letters.append((audience, name, payload))
            if self._delivering:
                # A receiver publishes while a message is being delivered: in a second round, or the nodes
                # would see two orders.
                return
            self._delivering = True
            try:
                while self._letters:
                    self._deliver(*self._letters.popleft())
            finally:
                self._delivering = False

    def _deliver(self, audience: str, name: str, payload: bytes) -> None:
        for seat in self._seated():
            receiver = seat.receiver()
            if (
                receiver is None
                or (audience == "node" and seat.node != name)
                or (audience != "node" and not seat.listens)
                or (audience == "room" and name not in seat.rooms)
            ):
                continue
            seat.received += 1
            try:
                if audience == "room":
                    receiver.room_message(name, payload)
                else:
                    receiver.session_message(payload)
            except Exception:
                # The publisher is another node's request: its write must not fail because of a receiver's
                # error.
                logger.exception("node %s failed to receive a message", seat.node)
