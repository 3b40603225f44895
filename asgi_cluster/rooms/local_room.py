"""The members of one room on this node."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from asgi_cluster.ids import ConnectionId
from asgi_cluster.sockets.batches import Flusher, SlowPolicy
from asgi_cluster.sockets.outbox import Outbox
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.sockets.wire import Wire

if TYPE_CHECKING:
    from asgi_cluster.rooms.stream_runner import StreamRunner

__all__ = ["LocalRoom"]

_BATCH_FROM = 8  # members from which on it pays to write to them in one pass


class LocalRoom:
    """The members of one room on this node. Members get what arrives.

    ``users`` counts members and those who are about to become one; at zero the room is unsubscribed.
    ``flusher`` writes to all of them at the end of a loop tick; ``None``: they are on several loops.
    """

    __slots__ = ("_flusher", "_members", "join_leave", "name", "slow", "stream", "subscribed", "users")

    def __init__(self, name: str, flusher: Flusher | None) -> None:
        self.name = name
        self.users = 0
        self.subscribed = False
        self.slow: SlowPolicy = "disconnect"
        self.join_leave = False
        self.stream: StreamRunner | None = None
        self._flusher = flusher
        # By form, because each form is encoded once.
        self._members: dict[Wire, dict[ConnectionId, Outbox]] = {}

    def attach(self, connection: ConnectionId, outbox: Outbox) -> None:
        """From now on the connection gets what arrives, in ``outbox``."""
        if outbox.closed:
            return
        self._scatter()
        self._members.setdefault(outbox.wire, {})[connection] = outbox

    def detach(self, connection: ConnectionId, outbox: Outbox) -> None:
        """It gets nothing any more."""
        self._scatter()
        members = self._members.get(outbox.wire)
        if members is not None and members.pop(connection, None) is not None and not members:
            del self._members[outbox.wire]

    def _scatter(self) -> None:
        # The members may not change while a shared batch is on its way to them.
        if self._flusher is not None:
            self._flusher.scatter()

    def members(self) -> tuple[ConnectionId, ...]:
        """The connections that get what arrives."""
        return tuple(connection for members in tuple(self._members.values()) for connection in tuple(members))

    def clear(self) -> None:
        """No member gets anything any more."""
        self._scatter()
        self._members.clear()

    def deliver(
        self,
        prepare: Callable[[Wire], PreparedMessage | None],
        *,
        key: Hashable = None,
        exclude: str | None = None,
    ) -> None:
        """Hand a message to every member here but ``exclude``. ``prepare`` gives it in the form of a wire;
        ``None``: that form has no such message.
        """
        slow = self.slow
        if slow == "latest":
            key = (self.name, key)
        flusher = self._flusher
        for wire, members in tuple(self._members.items()):
            message = prepare(wire)
            if message is None:
                continue
            if flusher is None:
                # memory:// calls on the publisher's thread. Even on the right one it takes the queue, or one
                # message could overtake another.
                for member, outbox in tuple(members.items()):
                    if member != exclude:
                        outbox.push_threadsafe(message, slow, key)
            elif exclude is None and len(members) >= _BATCH_FROM and len(self._members) == 1:
                flusher.broadcast(members, message, slow, key)
            else:
                for member, outbox in members.items():
                    if member != exclude:
                        outbox.push(message, slow, key)
