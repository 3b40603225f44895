"""What waits to be sent to one socket: bounded in bytes, written once per loop tick.

Whatever is pushed in one tick of the loop leaves in one write at the end of it. That costs a lone message
nothing, and under load the batches grow by themselves. The way to the client is *direct* where the server is
uvicorn's websockets-sansio protocol and has what that needs (``compat.uvicorn.DIRECT``): a ready frame to
its transport. Everything else goes through ASGI ``send``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Hashable
from typing import Any, Protocol

from asgi_cluster.codes import CloseCode
from asgi_cluster.compat.uvicorn import can_write, idle_transport, room_to_write
from asgi_cluster.sockets.batches import Flusher, SlowPolicy
from asgi_cluster.sockets.coroutines import discard, drive
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.sockets.receiving import Send
from asgi_cluster.sockets.stats import Counters
from asgi_cluster.sockets.wire import Wire
from asgi_cluster.tasks import spawn

__all__ = ["Outbox"]

_BATCH_BYTES = 1 << 16


class Target(Protocol):
    """The socket that an outbox writes to. A Protocol, because ``Socket``'s module imports this one."""

    loop: asyncio.AbstractEventLoop
    tasks: asyncio.TaskGroup
    send: Send
    server: Any
    why_not_direct: str

    def give_up(self, code: CloseCode, error: Exception | None) -> None: ...


class Outbox:
    """The messages that wait for one socket. To be used on the socket's loop only.

    ``wire`` is the form in which its messages are prepared.
    """

    __slots__ = (
        "_bytes",
        "_counters",
        "_dirty",
        "_drained",
        "_flusher",
        "_held",
        "_latest",
        "_limit",
        "_pending",
        "_server",
        "_socket",
        "blocked",
        "closed",
        "direct",
        "wire",
    )

    def __init__(
        self, socket: Target, flusher: Flusher, counters: Counters, *, limit: int, wire: Wire
    ) -> None:
        self._socket = socket
        self._server = socket.server
        self._flusher = flusher
        self._counters = counters
        self._limit = limit
        self.wire = wire
        # Not a deque: an empty one takes 760 bytes, and most sockets are idle.
        self._pending: list[PreparedMessage] = []
        self._latest: dict[Hashable, PreparedMessage] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._bytes = 0
        self._dirty = False
        self._held = False
        self.blocked = False
        """Whether a writer waits for the client to read, or what is pushed is held."""
        self.closed = False
        self.direct = socket.server is not None and not socket.why_not_direct

    def push(self, message: PreparedMessage, slow: SlowPolicy = "disconnect", key: Hashable = None) -> None:
        """Send ``message`` after what was pushed before; ``slow`` says what happens when too much waits
        already.
        """
        if self._flusher.batch is not None:
            self._flusher.scatter()
        self.put(message, slow, key)

    def put(self, message: PreparedMessage, slow: SlowPolicy = "disconnect", key: Hashable = None) -> None:
        """``push`` where no batch is under way."""
        if self.blocked or self._bytes + message.size > self._limit:
            self._push_slowly(message, slow, key)
            return
        if self.closed:
            return
        self._pending.append(message)
        self._bytes += message.size
        if not self._dirty:
            self._dirty = True
            self._flusher.add(self)

    def push_threadsafe(
        self, message: PreparedMessage, slow: SlowPolicy = "disconnect", key: Hashable = None
    ) -> None:
        """``push`` from any thread."""
        try:
            self._socket.loop.call_soon_threadsafe(self.push, message, slow, key)
        except RuntimeError:
            self.closed = True  # its loop is closed, and so is the socket

    def _push_slowly(self, message: PreparedMessage, slow: SlowPolicy, key: Hashable) -> None:
        if self.closed:
            return
        if not self.blocked:
            # A burst within one tick is not a slow client: hand over what is there before judging.
            self.flush()
            if self.closed:
                return
        if slow == "latest" and self.blocked:
            latest = self._latest
            if latest is None:
                latest = self._latest = {}
            replaced = latest.pop(key, None)
            if replaced is not None:
                self._bytes -= replaced.size
                self._counters.dropped += 1
        if self._bytes + message.size > self._limit and (self.blocked or self._bytes):
            if slow == "disconnect":
                self._counters.slow += 1
                self._socket.give_up(CloseCode.SLOW, None)
            else:
                self._counters.dropped += 1
            return
        self._bytes += message.size
        if slow == "latest" and self.blocked and self._latest is not None:
            self._latest[key] = message
        else:
            self._pending.append(message)
            if not self.blocked and not self._dirty:
                self._dirty = True
                self._flusher.add(self)

    def scatter(self) -> None:
        """Whatever was sent to this socket is here from now on, and not in a shared batch."""
        if self._flusher.batch is not None:
            self._flusher.scatter()

    def write(self, frames: bytes, count: int) -> bool:
        """Write ready frames, of ``count`` messages, if nothing waits and the server takes them at once;
        False when not.
        """
        if self.closed:
            return True
        if self.blocked or self._pending or not self.direct:
            return False
        transport = idle_transport(self._server)
        if transport is None:
            return False
        self._counters.sent += count
        try:
            transport.write(frames)
        except (OSError, RuntimeError):
            self.close()  # as in ``flush``
        return True

    def flush(self) -> None:
        """Write what waits, as far as the client keeps up; a task goes on when it does not. Raises
        nothing.
        """
        self._dirty = False
        pending = self._pending
        if self.closed or self.blocked or not pending:
            return
        rest: Awaitable[None] | None = None
        try:
            if self.direct and self._bytes <= _BATCH_BYTES and self._latest is None:
                # By far the most frequent case, in one piece: this is done for each socket and message.
                transport = idle_transport(self._server)
                if transport is not None:
                    self._counters.sent += len(pending)
                    if len(pending) == 1:
                        transport.write(pending[0].frame)
                    else:
                        transport.write(b"".join([message.frame for message in pending]))
                    pending.clear()
                    self._bytes = 0
                    return
            rest = self._write()
            if rest is not None:
                self.blocked = True
                spawn(self._socket.tasks, self._go_on(rest), name="asgi-cluster writer")
        except (OSError, RuntimeError):
            discard(rest)
            self.close()  # the client is gone, the app has closed it, or the node is stopping
        except Exception as error:
            self.fail(error)

    def _write(self) -> Awaitable[None] | None:
        return self._write_frames() if self.direct else self._send_events()

    def _write_frames(self) -> Awaitable[None] | None:
        server = self._server
        while self._pending:
            if not can_write(server):
                self.close()
                return None
            waiting = room_to_write(server)
            if waiting is not None:
                return waiting
            server.transport.write(b"".join([message.frame for message in self._take()]))
        return None

    def _take(self) -> list[PreparedMessage]:
        """Of what waits, what goes out in one piece."""
        pending = self._pending
        count = size = 0
        while count < len(pending) and size < _BATCH_BYTES:
            size += pending[count].size
            count += 1
        taken = pending[:count]
        del pending[:count]
        self._bytes -= size
        self._counters.sent += count
        return taken

    def _send_events(self) -> Awaitable[None] | None:
        known = self._server is not None
        while self._pending:
            sending = self._socket.send(self._next_event())
            # uvicorn's send finishes without waiting while its buffer has room; another server's may expect a
            # task around it.
            rest = drive(sending) if known else sending
            if rest is not None:
                return rest
        return None

    def _next_event(self) -> dict[str, Any]:
        if not self.wire.joins or len(self._pending) == 1:
            message = self._pending.pop(0)
            self._bytes -= message.size
            self._counters.sent += 1
            return message.event
        text = b"\n".join([message.data for message in self._take()])
        return {"type": "websocket.send", "text": text.decode()}

    async def _go_on(self, rest: Awaitable[None] | None) -> None:
        try:
            while rest is not None:
                await rest
                rest = None if self.closed else self._write()
                if rest is None and self._latest:
                    # What was not replaced while the client was slow goes last.
                    self._pending.extend(self._latest.values())
                    self._latest = None
                    rest = self._write()
        except (OSError, RuntimeError):
            self.close()
        except Exception as error:
            self.blocked = False
            self.fail(error)
        finally:
            self.blocked = False
            self._wake()

    async def hold(self) -> None:
        """Return when nothing pushed before this waits any more. What is pushed from then on is kept, within
        the limit, until ``release``.
        """
        self.flush()
        while self.blocked and not self.closed:
            await self._change()
            self.flush()
        self.blocked = self._held = not self.closed

    def release(self, first: PreparedMessage | None) -> None:
        """Send ``first``, and what was held after it; ``None``: drop what was held. Harmless when nothing
        is held.
        """
        if not self._held:
            return
        self.blocked = self._held = False
        if first is None:
            self._pending.clear()
            self._bytes = 0
        else:
            self._pending[:0] = (first,)
            self._pending.extend((self._latest or {}).values())
            self._bytes += first.size
            self._dirty = True
            self._flusher.add(self)
        self._latest = None
        self._wake()

    async def drained(self) -> None:
        """Return when nothing waits for the client any more, or the outbox is closed."""
        while self.blocked and not self.closed:
            await self._change()

    async def idle(self) -> None:
        """Return when nothing is being sent. A closed outbox may still be in the middle of something."""
        while self.blocked:
            await self._change()

    async def _change(self) -> None:
        await asyncio.shield(self.changed())

    def changed(self) -> asyncio.Future[None]:
        """Done when a blocked writer has finished, or the outbox is closed. Shared: not to be cancelled."""
        if self._drained is None:
            self._drained = self._socket.loop.create_future()
        return self._drained

    def _wake(self) -> None:
        waiting, self._drained = self._drained, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def close(self) -> None:
        """Drop what waits, and take no more."""
        self.release(None)
        self.closed = True
        self._pending.clear()
        self._latest = None
        self._bytes = 0
        self._wake()

    def fail(self, error: Exception) -> None:
        """Writing raised what no server should raise: close the socket, so that the client reconnects. Left
        open, it would get no more messages.
        """
        self.close()
        self._socket.give_up(CloseCode.SERVER_ERROR, error)

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait here; what the server buffers is not counted."""
        return self._bytes

    def __repr__(self) -> str:
        state = "closed" if self.closed else "blocked" if self.blocked else "open"
        return f"<Outbox {self._bytes} bytes, {state}>"
