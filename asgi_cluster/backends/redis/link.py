"""One connection to one Redis, multiplexed.

One reader takes replies and pushes in the order in which the server wrote them and matches replies to commands first in,
first out. Commands of one loop tick go out in one write. A caller that stops waiting leaves the connection as it is: its
reply is dropped when it comes. When the connection breaks, everybody who waits is told that the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import BusyLoadingError, RedisError, ResponseError

from asgi_cluster.backends.redis.errors import LinkBroken, reason_of

__all__ = ["Link", "OnPush"]

OnPush = Callable[[bytes, bytes, Any], None]
"""Kind (``message``, ``smessage``, or an unsolicited ``unsubscribe``/``sunsubscribe``), channel, payload. Must not block."""

_MAX_PENDING = 20_000
_PUSHED: Any = object()


class _Acks:
    """The place of a (un)subscribe among the replies: answered by one push per channel, or by one error."""

    __slots__ = ("future", "left", "verb")

    def __init__(self, verb: bytes, count: int, future: asyncio.Future[Any]) -> None:
        self.verb = verb
        self.left = count
        self.future = future


class Link:
    """A connection while it lasts: ``await open()``, then ``run()`` in a task until it breaks; it is not opened again."""

    def __init__(self, connection: AbstractConnection, on_push: OnPush | None = None) -> None:
        self._connection = connection
        self._on_push = on_push
        self._pending: deque[asyncio.Future[Any] | _Acks | None] = deque()
        self._outgoing: list[bytes] = []
        self._wake = asyncio.Event()
        self._broken: str | None = "not open yet"

    async def open(self, timeout: float) -> None:
        """Connect, authenticate, switch to RESP3.

        Raises:
            LinkBroken: with the reason; nothing was sent.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._connection.connect()  # type: ignore[no-untyped-call]
        except (RedisError, OSError, TimeoutError) as error:
            await self._connection.disconnect(nowait=True)
            raise LinkBroken(reason_of(error), sent=False) from error
        except BaseException:
            await self._connection.disconnect(nowait=True)
            raise
        parser: Any = self._connection._parser
        parser.set_pubsub_push_handler(self._pushed)
        self._broken = None

    @property
    def up(self) -> bool:
        """Whether commands can be sent."""
        return self._broken is None

    def send(self, *args: str | bytes | int) -> asyncio.Future[Any]:
        """Send a command with the others of this loop tick; the future gets the reply, or a ``ResponseError``.

        Raises:
            LinkBroken: not sent.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._write(args, future)
        return future

    def post(self, *args: str | bytes | int) -> None:
        """Send a command whose reply nobody wants. Raises as ``send``."""
        self._write(args, None)

    def subscribe(self, verb: str, channels: Sequence[str]) -> asyncio.Future[None]:
        """``SUBSCRIBE``, ``UNSUBSCRIBE`` and their sharded forms: done when every channel is acknowledged. Raises as ``send``."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._write((verb, *channels), _Acks(verb.lower().encode(), len(channels), future))
        return future

    def _write(self, args: Sequence[str | bytes | int], waiter: asyncio.Future[Any] | _Acks | None) -> None:
        if self._broken is not None:
            raise LinkBroken(self._broken, sent=False)
        if len(self._pending) >= _MAX_PENDING:
            raise LinkBroken(f"{_MAX_PENDING} commands are waiting for their replies", sent=False)
        self._outgoing += self._connection.pack_command(*args)
        self._pending.append(waiter)
        self._wake.set()

    async def run(self) -> None:
        """Read and write until the connection breaks.

        Raises:
            LinkBroken: always, unless cancelled.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_all(), name="asgi-cluster link reader")
                tasks.create_task(self._write_all(), name="asgi-cluster link writer")
        except* (RedisError, OSError) as group:
            error = group.exceptions[0]
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self._fail(reason_of(error))
            raise LinkBroken(reason_of(error)) from error
        finally:
            self._fail("the connection was closed")
            await self._connection.disconnect(nowait=True)

    def _fail(self, reason: str) -> None:
        if self._broken is None:
            self._broken = reason
        while self._pending:
            waiter = self._pending.popleft()
            future = waiter.future if isinstance(waiter, _Acks) else waiter
            if future is not None and not future.done():
                future.set_exception(LinkBroken(reason))
                future.exception()  # its caller may have gone

    async def _write_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            chunks, self._outgoing = self._outgoing, []
            await self._connection.send_packed_command(chunks, check_health=False)

    async def _read_all(self) -> None:
        read = self._connection.read_response
        while True:
            try:
                reply = await read(disable_decoding=True, timeout=math.inf, push_request=True)
            except (ResponseError, BusyLoadingError) as error:
                self._replied(None, error)
                continue
            if reply is not _PUSHED:
                self._replied(reply, None)

    def _replied(self, reply: Any, error: Exception | None) -> None:
        waiter = self._pending.popleft() if self._pending else None
        future = waiter.future if isinstance(waiter, _Acks) else waiter
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(reply)

    async def _pushed(self, push: Sequence[Any]) -> Any:
        kind, channel = push[0], push[1]
        if kind in (b"message", b"smessage"):
            if self._on_push is not None:
                self._on_push(kind, channel, push[2])
            return _PUSHED
        head = self._pending[0] if self._pending else None
        if isinstance(head, _Acks) and head.verb == kind:
            head.left -= 1
            if head.left == 0:
                self._pending.popleft()
                if not head.future.done():
                    head.future.set_result(None)
        elif self._on_push is not None:
            # Nobody asked: a slot has moved away, and its channels with it.
            self._on_push(kind, channel, None)
        return _PUSHED
