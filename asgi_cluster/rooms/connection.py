"""One connection of the cluster's own: a WebSocket of the app accepted with ``cluster.accept``, or a client
of the endpoint.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol, Self

from asgi_cluster.codes import CloseCode
from asgi_cluster.ids import ConnectionId
from asgi_cluster.rooms.names import check_room
from asgi_cluster.rooms.payload import encode_payload
from asgi_cluster.sockets.outbox import Outbox
from asgi_cluster.sockets.receiving import Message, Receive
from asgi_cluster.sockets.socket import Socket
from asgi_cluster.tasks import spawn

if TYPE_CHECKING:
    from asgi_cluster.rooms.local_room import LocalRoom
    from asgi_cluster.sessions.session import Session
    from asgi_cluster.sockets.hub import Hub

__all__ = ["Connection"]

_IDLE = 1.0  # seconds without a reader, after which the connection reads its input itself
_QUEUE = 64


class Memberships(Protocol):
    """What a connection asks of the rooms."""

    async def enter(self, connection: Connection, room: str) -> object:
        """Returns when the room's messages arrive."""
        ...

    async def leave(self, connection: Connection, room: str) -> bool:
        """End a membership; False when there was none."""
        ...

    def drop(self, connection: Connection, room: str) -> bool:
        """End a membership here and now; who is present is settled later."""
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
        "_announced",
        "_gone",
        "_hub",
        "_idle_timer",
        "_info",
        "_iterated",
        "_present",
        "_pumping",
        "_queue",
        "_reading",
        "_receive",
        "_waiter",
        "cluster",
        "outbox",
        "rooms",
        "service",
        "session",
        "socket",
    )

    def __init__(
        self, socket: Socket, service: Memberships, hub: Hub, cluster: Any, session: Session, outbox: Outbox
    ) -> None:
        self.socket = socket
        self.service = service
        self._hub = hub
        self.cluster = cluster
        """The ``Cluster`` that it belongs to."""
        self.session = session
        self.outbox = outbox
        self.rooms: dict[str, LocalRoom] = {}
        # Ordered sets, as dicts: an empty set takes 216 bytes, and most stay empty.
        self._present: dict[str, None] = {}
        self._announced: dict[str, None] = {}
        self._info: Any = None
        self._receive: Receive | None = None
        self._queue: deque[str | bytes] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._reading = False
        self._pumping = False
        self._iterated = False
        self._gone = False

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
        return self._gone or self.outbox.closed

    async def join(self, room: str) -> None:
        """Enter a room; returns when its messages arrive. No rule is asked: the app itself does this.
        Idempotent.

        Raises:
            ValueError: no valid room name.
            OSError: the connection is closed, or was closed meanwhile.
            BusUnavailable: the room cannot be subscribed to, or its history not be read.
        """
        check_room(room)
        self._check_open()
        await self.service.enter(self, room)
        self._check_open()

    async def leave(self, room: str) -> None:
        """Leave a room. Harmless when it is not in it. Raises ``ValueError`` for no valid room name."""
        await self.service.leave(self, check_room(room))

    async def send(self, data: Any) -> None:
        """Send to this connection: ``str`` and JSON values as text, ``bytes`` as binary. Waits while the
        client is slow.

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
        """The socket is over: the connection is in no room any more. Who is present is settled later."""
        for name in list(self.rooms):
            self.service.drop(self, name)

    def _lost(self, room: str) -> None:
        """Publications of ``room`` are lost: without a protocol there is only one sign for that, the close
        code 3010.
        """
        self.socket.close(CloseCode.INSUFFICIENT_STATE, CloseCode.INSUFFICIENT_STATE.text)

    def _expelled(self, room: str, code: int, reason: str) -> None:
        """``Room.disconnect`` takes it out of ``room``."""
        self._leave_later(room)

    def _leave_later(self, room: str) -> None:
        spawn(self.socket.tasks, self.leave(room), name="asgi-cluster leave")

    def _check_open(self) -> None:
        if self.socket.state != "open" or self._over:
            raise OSError("the connection is closed")

    # Input

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str | bytes:
        self._iterated = True
        if self._pumping or self._queue:
            return await self._from_queue()
        if self._gone or self._receive is None:
            raise StopAsyncIteration
        if self._reading:
            raise RuntimeError("another task is reading from this connection")
        self._reading = True
        try:
            message = await self._receive()
        finally:
            self._reading = False
            self._watch()
        return self._take(message)

    def _take(self, message: Message) -> str | bytes:
        if message["type"] != "websocket.receive":
            self._gone = True
            self._hub.unregister(self.socket)
            raise StopAsyncIteration
        text = message.get("text")
        received: str | bytes = message["bytes"] if text is None else text
        return received

    def _watch(self) -> None:
        # One timer at a time, and none while a reader waits for input: the usual socket has none.
        if self._idle_timer is None and not self._gone:
            self._idle_timer = self.socket.loop.call_later(_IDLE, self._read_idle)

    def _read_idle(self) -> None:
        self._idle_timer = None
        if self._reading or self._pumping or self._gone or self._receive is None:
            return
        self._pumping = True
        self._queue = deque()
        spawn(self.socket.tasks, self._pump(), name="asgi-cluster input")

    async def _pump(self) -> None:
        assert self._queue is not None
        assert self._receive is not None
        try:
            while not self._gone:
                message = await self._receive()
                try:
                    received = self._take(message)
                except StopAsyncIteration:
                    return
                while len(self._queue) >= _QUEUE and self._iterated and not self._gone:
                    self._waiter = self.socket.loop.create_future()
                    await self._waiter
                if len(self._queue) >= _QUEUE:
                    self._queue.popleft()
                self._queue.append(received)
                self._wake()
        finally:
            self._pumping = False
            self._gone = True
            self._wake()

    async def _from_queue(self) -> str | bytes:
        assert self._queue is not None
        while not self._queue:
            if self._gone:
                raise StopAsyncIteration
            self._waiter = self.socket.loop.create_future()
            await self._waiter
        if len(self._queue) >= _QUEUE:
            self._wake()
        return self._queue.popleft()

    def _wake(self) -> None:
        # One waiter at a time: the pump waits for a full queue, the reader for an empty one.
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _read_with(self, receive: Receive) -> None:
        """Where input comes from."""
        self._receive = receive
        self._watch()

    def _stop_reading(self) -> None:
        """The app is done with this connection."""
        self._gone = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._wake()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} in {len(self.rooms)} rooms>"
