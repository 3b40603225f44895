"""What the nodes of one ``memory://`` cluster share: the state of its stores, and which nodes there are.

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

from asgi_cluster.bus.lease import Clock, boot_clock
from asgi_cluster.bus.room_bus import RoomReceiver
from asgi_cluster.bus.session_bus import SessionReceiver
from asgi_cluster.ids import NodeId, new_token
from asgi_cluster.node import Node

__all__ = ["Attachment", "MemoryBroker"]

logger = logging.getLogger("asgi_cluster.memory")


class Attachment:
    """A backend's place in a broker: its node, its receivers, and the rooms that it is subscribed to.

    A publisher (``listens=False``) is no node, and receives only what is posted to it.
    """

    def __init__(self) -> None:
        self.rooms: set[str] = set()
        self.node: NodeId | None = None
        self.listens = False
        self.incarnation = ""
        """Of a node; ``""`` for a publisher, and while it is not attached."""
        self.session_receiver: Callable[[], SessionReceiver | None] = lambda: None
        self.room_receiver: Callable[[], RoomReceiver | None] = lambda: None
        """``None``: the cluster object is gone."""
        self.started_at = 0.0
        self.received = 0


class MemoryBroker:
    """The shared state. ``clock`` is the store's own clock, in seconds, and never goes back."""

    _named: ClassVar[weakref.WeakValueDictionary[str, MemoryBroker]] = weakref.WeakValueDictionary()
    _naming = threading.Lock()

    def __init__(self, clock: Clock = boot_clock) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self._unix = time.time() - clock()
        self._attachments: dict[NodeId, Attachment] = {}
        self._queue: deque[tuple[bytes, str | None, str | None]] = deque()
        self._delivering = False
        self._shared: dict[type, Any] = {}
        self.on_detach: list[Callable[[Attachment], None]] = []
        """Called under the lock for every node that leaves."""

    @classmethod
    def named(cls, name: str | None, clock: Clock = boot_clock) -> MemoryBroker:
        """The broker that clusters of this process with this ``name`` share; a private one for ``None``."""
        if name is None:
            return cls(clock)
        with cls._naming:
            broker = cls._named.get(name)
            if broker is None:
                broker = cls._named[name] = cls(clock)
            return broker

    def part(self, kind: type[Any]) -> Any:
        """The one ``kind(broker)`` of this broker: the state of a store."""
        with self.lock:
            if kind not in self._shared:
                self._shared[kind] = kind(self)
            return self._shared[kind]

    def unix(self) -> float:
        """Now, as Unix time."""
        return self._unix + self.clock()

    def nodes(self) -> dict[NodeId, Attachment]:
        """The nodes that are there. A node that was attached and whose cluster object is gone has left."""
        return {node: each for node, each in self._attached().items() if each.listens}

    def _attached(self) -> dict[NodeId, Attachment]:
        with self.lock:
            for gone in [each for each in self._attachments.values() if each.session_receiver() is None]:
                self.detach(gone)
            return dict(self._attachments)

    def attach(
        self,
        attachment: Attachment,
        node: Node,
        session_receiver: Callable[[], SessionReceiver | None],
        room_receiver: Callable[[], RoomReceiver | None],
    ) -> None:
        """A node arrives. The one that had this attachment before leaves."""
        with self.lock:
            self.detach(attachment)
            attachment.node, attachment.listens = node.id, node.listens
            attachment.incarnation = new_token() if node.listens else ""
            attachment.session_receiver, attachment.room_receiver = session_receiver, room_receiver
            attachment.started_at, attachment.received = time.time(), 0
            self._attachments[node.id] = attachment

    def detach(self, attachment: Attachment) -> None:
        """A node leaves."""
        with self.lock:
            if attachment.node is None:
                return
            if self._attachments.get(attachment.node) is attachment:
                del self._attachments[attachment.node]
                for callback in self.on_detach:
                    callback(attachment)
            attachment.node, attachment.listens, attachment.incarnation = None, False, ""

    def publish(self, payload: bytes, *, node: str | None = None, room: str | None = None) -> None:
        """To every node; with ``node`` to that node or publisher, if it is there; with ``room`` to those
        that are subscribed to it.
        """
        with self.lock:
            self._queue.append((payload, node, room))
            if self._delivering:
                # A receiver publishes while a message is being delivered: in a second round, or the nodes
                # would see two orders.
                return
            self._delivering = True
            try:
                while self._queue:
                    self._deliver(*self._queue.popleft())
            finally:
                self._delivering = False

    def _deliver(self, payload: bytes, node: str | None, room: str | None) -> None:
        for name, each in self._attached().items():
            if name != node if node is not None else not each.listens:
                continue
            if room is not None and room not in each.rooms:
                continue
            each.received += 1
            try:
                if room is None:
                    if (receiver := each.session_receiver()) is not None:
                        receiver.session_message(payload)
                elif (members := each.room_receiver()) is not None:
                    members.room_message(room, payload)
            except Exception:
                # The publisher is another node's request: its write must not fail because of a receiver's
                # error.
                logger.exception("node %s failed to receive a message", name)
