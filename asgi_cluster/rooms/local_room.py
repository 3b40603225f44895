"""The members of one room on this node."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from asgi_cluster.rooms.rules import SlowPolicy
from asgi_cluster.sockets.outbox import Outbox
from asgi_cluster.sockets.prepared import Packet

if TYPE_CHECKING:
    from asgi_cluster.rooms.connection import Connection
    from asgi_cluster.rooms.stream import Sequence

__all__ = ["Audience"]

_WAVE = 8  # members from which on it pays to write to them in one pass


class Audience:
    """The members of one room on this node.

    ``holds`` counts members and those who are about to become one; at zero the room is unsubscribed. Attached
    members get what arrives. Two maps, because they get different bytes.
    """

    __slots__ = ("bare", "crosses", "holds", "name", "pushed", "sequence", "slow", "subscribed")

    def __init__(self, name: str) -> None:
        self.name = name
        self.holds = 0
        self.subscribed = False
        self.crosses = False
        self.slow: SlowPolicy = "disconnect"
        self.bare: dict[str, Outbox] = {}
        self.pushed: dict[str, Outbox] = {}
        self.sequence: Sequence | None = None

    def attach(self, connection: Connection) -> None:
        """From now on ``connection`` gets what arrives."""
        if connection.outbox.closed:
            return
        connection.outbox.spill()
        (self.pushed if connection._speaks_protocol else self.bare)[connection.id] = connection.outbox
        self.crosses = self.crosses or connection.socket.crosses_loops

    def detach(self, connection: Connection) -> bool:
        """It gets nothing any more; False when it did not before."""
        connection.outbox.spill()
        members = self.pushed if connection._speaks_protocol else self.bare
        return members.pop(connection.id, None) is not None

    def clear(self) -> None:
        """No member gets anything any more."""
        for outbox in (*self.pushed.values(), *self.bare.values()):
            outbox.spill()
            break
        self.pushed.clear()
        self.bare.clear()

    def deliver(
        self, bare: Packet | None, push: Packet | None, *, key: Hashable = None, exclude: str | None = None
    ) -> None:
        """Hand a message to every member here but ``exclude``: ``bare`` to the app's sockets, ``push`` to
        clients.
        """
        if self.slow == "latest":
            key = (self.name, key)
        if self.crosses:
            self._deliver_across(bare, push, key, exclude)
            return
        slow = self.slow
        if exclude is None and (push is None or bare is None):
            members, packet = (self.bare, bare) if push is None else (self.pushed, push)
            if packet is not None and len(members) >= _WAVE:
                next(iter(members.values())).broadcast(members, packet, slow, key)
                return
        if exclude is None:
            if push is not None:
                for outbox in self.pushed.values():
                    outbox.push(push, slow, key)
            if bare is not None:
                for outbox in self.bare.values():
                    outbox.push(bare, slow, key)
            return
        if push is not None:
            for member, outbox in self.pushed.items():
                if member != exclude:
                    outbox.push(push, slow, key)
        if bare is not None:
            for member, outbox in self.bare.items():
                if member != exclude:
                    outbox.push(bare, slow, key)

    def _deliver_across(
        self, bare: Packet | None, push: Packet | None, key: Hashable, exclude: str | None
    ) -> None:
        # memory:// calls on the publisher's thread. Even on the right one it takes the queue, or one could
        # overtake another.
        for members, packet in ((self.pushed, push), (self.bare, bare)):
            if packet is None:
                continue
            for member, outbox in tuple(members.items()):
                if member != exclude:
                    outbox.push_threadsafe(packet, self.slow, key)
