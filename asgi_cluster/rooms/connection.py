"""One connection of the cluster's own: a WebSocket of the app accepted with ``cluster.accept``, or a client
of the endpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

from asgi_cluster.ids import ConnectionId
from asgi_cluster.rooms.names import check_room
from asgi_cluster.rooms.payload import encode_payload
from asgi_cluster.sockets.outbox import Outbox
from asgi_cluster.sockets.socket import Socket

if TYPE_CHECKING:
    from asgi_cluster.rooms.input import Input
    from asgi_cluster.rooms.local_room import LocalRoom
    from asgi_cluster.sessions.session import Session

__all__ = ["Connection", "Membership"]


class Membership(Protocol):
    """How a connection enters and leaves rooms, and what its client gets of that: nothing (``Memberships``,
    for an app's own socket), or pushes of the client protocol (``centrifuge.client``).
    """

    async def join(self, connection: Connection, room: str) -> None:
        """As ``Connection.join``."""
        ...

    async def leave(self, connection: Connection, room: str) -> object:
        """As ``Connection.leave``."""
        ...

    def lost(self, connection: Connection, room: str) -> None:
        """Publications of ``room`` are lost: end the membership, so that the client comes back for what there
        is.
        """
        ...

    def detach_all(self, connection: Connection) -> None:
        """The socket is over: end every membership here. Presence follows later."""
        ...


class Connection:
    """A WebSocket that can be in rooms. Get one from ``cluster.accept``; rules and hooks are given those of
    clients.

    ``async for message in connection`` gives what the client sends, ``str`` or ``bytes``, and ends when it is
    gone. Input is always drained: when the app does not iterate for a second it is read into a small queue,
    so that a disconnect is noticed; what does not fit is thrown away as long as the app has never iterated,
    and left with the server afterwards.
    """

    __slots__ = (
        "__weakref__",
        "_input",
        "_present",
        "cluster",
        "info",
        "membership",
        "outbox",
        "rooms",
        "session",
        "socket",
    )

    membership: Membership
    """Set by who makes the connection, before anything uses it."""

    def __init__(self, socket: Socket, session: Session, outbox: Outbox, cluster: Any) -> None:
        self.socket = socket
        self.session = session
        self.outbox = outbox
        self.cluster = cluster
        """The ``Cluster`` that it belongs to. Of no type here: rooms do not import the cluster."""
        self.rooms: dict[str, LocalRoom] = {}
        self.info: Any = None
        """What others see of it besides its user (``Connected.info``)."""
        # An ordered set, as a dict: an empty set takes 216 bytes, and most stay empty.
        self._present: dict[str, None] = {}
        self._input: Input | None = None

    @property
    def id(self) -> ConnectionId:
        """Unique in the cluster."""
        return self.socket.id

    @property
    def user_id(self) -> str | None:
        """The user that it belongs to; ``None``: no user was named."""
        return self.socket.user

    @property
    def _over(self) -> bool:
        """Whether it can be in no room any more: the client is gone, or the app is done with it."""
        return self.outbox.closed or (self._input is not None and self._input.over)

    async def join(self, room: str) -> None:
        """Enter a room; returns when its messages arrive. No rule is applied: the app itself does this.
        Idempotent. A client of the endpoint gets a server-side subscription.

        Raises:
            ValueError: no valid room name.
            OSError: the connection is closed, or was closed meanwhile.
            BusUnavailable: the room cannot be subscribed to, or its history not be read.
        """
        await self.membership.join(self, check_room(room))

    async def leave(self, room: str) -> None:
        """Leave a room. Harmless when it is not in it. Raises ``ValueError`` for no valid room name."""
        await self.membership.leave(self, check_room(room))

    async def send(self, data: Any) -> None:
        """Send to this connection: ``str`` and JSON values as text, ``bytes`` as binary; to a client of the
        endpoint as a ``message`` push. Waits while the client is slow.

        Raises:
            OSError: the connection is closed.
        """
        self._check_open()
        await self.outbox.drained()
        self._check_open()
        kind, payload = encode_payload(data)
        self.outbox.push(self.outbox.wire.message(kind, payload))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the WebSocket. Harmless when it is closed."""
        self.socket.close(code, reason)

    def gone(self) -> None:
        """The socket is over: the connection is in no room any more."""
        self.membership.detach_all(self)

    def _check_open(self) -> None:
        if self.socket.state != "open" or self._over:
            raise OSError("the connection is closed")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str | bytes:
        if self._input is None:
            raise RuntimeError(
                "clients of the endpoint are read by it: use RealtimeConfig(on_message=…) or rpc"
            )
        return await self._input.next()

    def __repr__(self) -> str:
        return f"<Connection {self.id} in {len(self.rooms)} rooms>"
