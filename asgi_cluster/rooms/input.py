"""What the client of an app's own socket sends, read for the app."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from asgi_cluster.sockets.receiving import Message, Receive
from asgi_cluster.sockets.socket import Socket
from asgi_cluster.tasks import spawn

if TYPE_CHECKING:
    from asgi_cluster.sockets.hub import Hub

__all__ = ["Input"]

_IDLE = 1.0  # seconds without a reader, after which the input is read here
_QUEUE = 64


class Input:
    """The messages of one client, for one reader at a time.

    Input is always drained: when the app does not read for a second it is read into a small queue, so that a
    disconnect is noticed; what does not fit is thrown away as long as the app has never read, and left with
    the server afterwards.
    """

    __slots__ = (
        "_hub",
        "_idle_timer",
        "_iterated",
        "_pumping",
        "_queue",
        "_reading",
        "_receive",
        "_socket",
        "_waiter",
        "over",
    )

    def __init__(self, receive: Receive, socket: Socket, hub: Hub) -> None:
        self._receive = receive
        self._socket = socket
        self._hub = hub
        self._queue: deque[str | bytes] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._reading = False
        self._pumping = False
        self._iterated = False
        self.over = False
        """Whether nothing comes any more: the client is gone, or the app is done with it."""
        self._watch()

    async def next(self) -> str | bytes:
        """The next message. Raises ``StopAsyncIteration`` when the client is gone."""
        self._iterated = True
        if self._pumping or self._queue:
            return await self._from_queue()
        if self.over:
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
            self.over = True
            self._hub.unregister(self._socket)
            raise StopAsyncIteration
        text = message.get("text")
        received: str | bytes = message["bytes"] if text is None else text
        return received

    def _watch(self) -> None:
        # One timer at a time, and none while a reader waits for input: the usual socket has none.
        if self._idle_timer is None and not self.over:
            self._idle_timer = self._socket.loop.call_later(_IDLE, self._read_idle)

    def _read_idle(self) -> None:
        self._idle_timer = None
        if self._reading or self._pumping or self.over:
            return
        self._pumping = True
        self._queue = deque()
        spawn(self._socket.tasks, self._pump(), name="asgi-cluster input")

    async def _pump(self) -> None:
        assert self._queue is not None
        try:
            while not self.over:
                message = await self._receive()
                try:
                    received = self._take(message)
                except StopAsyncIteration:
                    return
                while len(self._queue) >= _QUEUE and self._iterated and not self.over:
                    self._waiter = self._socket.loop.create_future()
                    await self._waiter
                if len(self._queue) >= _QUEUE:
                    self._queue.popleft()
                self._queue.append(received)
                self._wake()
        finally:
            self._pumping = False
            self.over = True
            self._wake()

    async def _from_queue(self) -> str | bytes:
        assert self._queue is not None
        while not self._queue:
            if self.over:
                raise StopAsyncIteration
            self._waiter = self._socket.loop.create_future()
            await self._waiter
        if len(self._queue) >= _QUEUE:
            self._wake()
        return self._queue.popleft()

    def _wake(self) -> None:
        # One waiter at a time: the pump waits for a full queue, the reader for an empty one.
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def stop(self) -> None:
        """The app is done with this connection."""
        self.over = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._wake()
