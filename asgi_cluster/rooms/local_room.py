"""The members of one room on this node."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING

from asgi_cluster.sockets.outbox import Outbox, SlowPolicy
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.sockets.wire import Wire

if TYPE_CHECKING:
    from asgi_cluster.rooms.stream import RoomStream

__all__ = ["LocalRoom"]

_BATCH_FROM = 8  # members from which on it pays to write to them in one pass


class LocalRoom:
    """The members of one room on this node.

    ``holds`` counts members and those who are about to become one; at zero the room is unsubscribed. Attached
    members get what arrives.
    """

    __slots__ = ("_members", "crosses", "holds", "name", "slow", "stream", "subscribed")

    def __init__(self, name: str) -> None:
        self.name = name
        self.holds = 0
        self.subscribed = False
        self.crosses = False
        self.slow: SlowPolicy = "disconnect"
        self.stream: RoomStream | None = None
        # By form, because each form is encoded once.
        self._members: dict[Wire, dict[str, Outbox]] = {}

    def attach(self, outbox: Outbox) -> None:
        """From now on the socket of ``outbox`` gets what arrives."""
        if outbox.closed:
            return
        outbox.scatter()
        self._members.setdefault(outbox.wire, {})[outbox.socket.id] = outbox
        self.crosses = self.crosses or outbox.socket.crosses_loops

    def detach(self, outbox: Outbox) -> None:
        """It gets nothing any more."""
        outbox.scatter()
        members = self._members.get(outbox.wire)
        if members is not None and members.pop(outbox.socket.id, None) is not None and not members:
            del self._members[outbox.wire]

    def outboxes(self) -> tuple[Outbox, ...]:
        """Those of the attached members."""
        return tuple(
            outbox for members in tuple(self._members.values()) for outbox in tuple(members.values())
        )

    def clear(self) -> None:
        """No member gets anything any more."""
        for outbox in self.outboxes():
            outbox.scatter()
            break
        self._members.clear()

    def deliver(
        self,
        prepare: Callable[[Wire], PreparedMessage | None],
        *,
        key: Hashable = None,
        exclude: str | None = None,
    ) -> None:
        """Hand a message to every member here but ``exclude``. ``prepare`` gives it in the form that is asked
        for; ``None``: not said in this form.
        """
        slow = self.slow
        if slow == "latest":
            key = (self.name, key)
        if self.crosses:
            self._deliver_across(prepare, key, exclude)
            return
        parts = [
            (members, packet)
            for wire, members in self._members.items()
            if (packet := prepare(wire)) is not None
        ]
        if exclude is None and len(parts) == 1 and len(parts[0][0]) >= _BATCH_FROM:
            members, packet = parts[0]
            next(iter(members.values())).broadcast(members, packet, slow, key)
            return
        for members, packet in parts:
            if exclude is None:
                for outbox in members.values():
                    outbox.push(packet, slow, key)
            else:
                for member, outbox in members.items():
                    if member != exclude:
                        outbox.push(packet, slow, key)

    def _deliver_across(
        self, prepare: Callable[[Wire], PreparedMessage | None], key: Hashable, exclude: str | None
    ) -> None:
        # memory:// calls on the publisher's thread. Even on the right one it takes the queue, or one could
        # overtake another.
        for members, packet in self._prepared(prepare):
            for member, outbox in members:
                if member != exclude:
                    outbox.push_threadsafe(packet, self.slow, key)

    def _prepared(
        self, prepare: Callable[[Wire], PreparedMessage | None]
    ) -> Iterator[tuple[tuple[tuple[str, Outbox], ...], PreparedMessage]]:
        for wire, members in tuple(self._members.items()):
            packet = prepare(wire)
            if packet is not None:
                yield tuple(members.items()), packet
