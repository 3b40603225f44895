"""Where the outboxes of a node come from, and what they share."""

from __future__ import annotations

import asyncio
import weakref

from asgi_cluster.sockets.batches import Flusher
from asgi_cluster.sockets.outbox import Outbox
from asgi_cluster.sockets.socket import Socket
from asgi_cluster.sockets.stats import Counters
from asgi_cluster.sockets.wire import Wire

__all__ = ["Outboxes"]


class Outboxes:
    """Makes the outboxes of a node's sockets. ``limit`` is the number of bytes that may wait for each."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self.counters = Counters()
        self._flushers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Flusher] = (
            weakref.WeakKeyDictionary()
        )

    def open(self, socket: Socket, wire: Wire) -> Outbox:
        """The outbox of a socket; ``wire`` is the form of its messages."""
        if socket.outbox is None:
            flusher = self.flusher(socket.loop)
            socket.outbox = Outbox(socket, flusher, self.counters, limit=self._limit, wire=wire)
        return socket.outbox

    def flusher(self, loop: asyncio.AbstractEventLoop) -> Flusher:
        """What writes, at the end of a tick of ``loop``, what its sockets got in it."""
        flusher = self._flushers.get(loop)
        if flusher is None:
            flusher = self._flushers[loop] = Flusher(loop)
        return flusher
