"""One connection to one Redis, multiplexed.

One reader takes replies and pushes in the order in which the server wrote them and matches replies to
commands first in, first out. Commands of one loop tick go out in one write. A caller that stops waiting
leaves the connection as it is: its reply is dropped when it comes. When the connection breaks, all callers
that wait get an error: the outcome is unknown.

(Un)subscribe commands have no reply of their own, only pushes, and on a Cluster a slot that moves away brings
the same push unasked. Counting them could put every later reply in the wrong place by one, and a heartbeat
would take an older one's echo for its own. So each batch is closed by a ``PING`` with a nonce: whatever came
before it belongs to the batch.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import BusyLoadingError, ConnectionError, RedisError, ResponseError

from asgi_cluster.backends.redis.errors import ConnectionBroken, reason_of

__all__ = ["MultiplexedConnection", "OnPush", "Refusals"]

OnPush = Callable[[bytes, bytes, Any], None]
"""Kind (``message``, ``smessage``, or an unsolicited ``unsubscribe``/``sunsubscribe``), channel, payload.

Must not block.
"""

Refusals = dict[str, ResponseError]
"""The channels that were not subscribed, each with the server's reason."""

_MAX_PENDING = 20_000
_MAX_UNSENT = 64 << 20
_PUSHED: Any = object()


class _Batch:
    """The place of (un)subscribe commands among the replies."""

    __slots__ = ("commands", "future", "nonce", "refused", "verb")

    def __init__(self, verb: str, commands: Sequence[Sequence[str]], nonce: bytes) -> None:
        self.verb = verb.lower().encode()
        self.commands = deque(set(channels) for channels in commands)
        self.nonce = nonce
        self.refused: Refusals = {}
        self.future: asyncio.Future[Refusals] = asyncio.get_running_loop().create_future()

    def acknowledged(self, kind: bytes, channel: str) -> bool:
        """Whether the push answers this batch."""
        if kind != self.verb or not self.commands or channel not in self.commands[0]:
            return False
        self.commands[0].discard(channel)
        if not self.commands[0]:
            self.commands.popleft()
        return True

    def failed(self, error: ResponseError) -> None:
        """The server refused the command whose turn it is."""
        if self.commands:
            self.refused.update(dict.fromkeys(self.commands.popleft(), error))

    def closed(self, reply: Any) -> None:
        """The reply to the PING.

        Raises ``ConnectionBroken`` when it is none, or acks are missing: then nothing can be trusted.
        """
        subscribing = self.verb in (b"subscribe", b"ssubscribe")
        if reply != self.nonce or (subscribing and self.commands):
            raise ConnectionBroken("replies are out of step")
        if not self.future.done():
            self.future.set_result(self.refused)


class MultiplexedConnection:
    """A connection while it lasts: ``await open()``, then ``run()`` in a task until it breaks; it is not
    opened again.
    """

    def __init__(self, connection: AbstractConnection, on_push: OnPush | None = None) -> None:
        self._connection = connection
        self._on_push = on_push
        self._pending: deque[asyncio.Future[Any] | _Batch | None] = deque()
        self._outgoing: list[bytes] = []
        self._nonces = count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._tls = False
        self._broken: str | None = "not open"

    async def open(self, timeout: float) -> None:
        """Connect, authenticate, switch to RESP3.

        Raises:
            ConnectionBroken: with the reason; nothing was sent.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._connection.connect()
        except (RedisError, OSError, TimeoutError) as error:
            await self._connection.disconnect(nowait=True)
            raise ConnectionBroken(reason_of(error), sent=False) from error
        except BaseException:
            await self._connection.disconnect(nowait=True)
            raise
        parser: Any = self._connection._parser
        parser.set_pubsub_push_handler(self._pushed)
        self._writer = self._connection._writer
        self._tls = self._writer is not None and self._writer.get_extra_info("ssl_object") is not None
        self._broken = None

    @property
    def up(self) -> bool:
        """Whether commands can be sent."""
        return self._broken is None

    def send(self, *args: str | bytes | int) -> asyncio.Future[Any]:
        """Send a command with the others of this loop tick; the future gets the reply, or an error reply as
        ``RedisError``.

        Raises:
            ConnectionBroken: not sent.
        """
        self._check()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._write(args, future)
        return future

    def post(self, *args: str | bytes | int) -> None:
        """Send a command whose reply is not needed. Raises as ``send``."""
        self._check()
        self._write(args, None)

    def subscribe(self, verb: str, commands: Sequence[Sequence[str]]) -> asyncio.Future[Refusals]:
        """``SUBSCRIBE``, ``UNSUBSCRIBE`` or a sharded form, one command per list of channels: done when all
        are answered.

        An error reply refuses all channels of its command. Raises as ``send``.
        """
        self._check()
        batch = _Batch(verb, commands, b"%d" % next(self._nonces))
        for channels in commands:
            self._outgoing += self._connection.pack_command(verb, *channels)
        self._write(("PING", batch.nonce), batch)
        return batch.future

    def _check(self) -> None:
        if self._broken is not None:
            raise ConnectionBroken(self._broken, sent=False)
        if len(self._pending) >= _MAX_PENDING:
            raise ConnectionBroken(f"{_MAX_PENDING} commands are waiting for their replies", sent=False)

    def _write(self, args: Sequence[str | bytes | int], waiter: asyncio.Future[Any] | _Batch | None) -> None:
        if not self._outgoing or isinstance(waiter, _Batch):
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += self._connection.pack_command(*args)
        self._pending.append(waiter)

    def _flush(self) -> None:
        chunks, self._outgoing = self._outgoing, []
        if not chunks or self._broken is not None or self._writer is None:
            return
        self._writer.write(b"".join(chunks))
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT:
            # Bounded in bytes too: a server that reads nothing gets no more of our memory.
            self.abort("the server does not read")

    async def run(self) -> None:
        """Read until the connection breaks.

        Raises:
            ConnectionBroken: always, unless cancelled.
        """
        try:
            await self._read_all()
        except (RedisError, OSError, ConnectionBroken) as error:
            self._fail(reason_of(error))
            raise ConnectionBroken(self._broken or "the connection was closed") from error
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection; callers that still wait get ``ConnectionBroken``."""
        self._fail("the connection was closed")
        await self._connection.disconnect(nowait=True)
        if self._writer is not None and self._tls:
            # Closing TLS takes a round trip, and the loop may be closed before its end.
            self._writer.transport.abort()

    def abort(self, reason: str) -> None:
        """Give the connection up at once: ``run`` ends with ``reason``."""
        self._fail(reason)
        if self._writer is not None:
            self._writer.transport.abort()

    def _fail(self, reason: str) -> None:
        if self._broken is None:
            self._broken = reason
        while self._pending:
            waiter = self._pending.popleft()
            future = waiter.future if isinstance(waiter, _Batch) else waiter
            if future is not None and not future.done():
                future.set_exception(ConnectionBroken(reason))
                future.exception()  # its caller may have gone

    async def _read_all(self) -> None:
        read = self._connection.read_response
        while True:
            try:
                reply = await read(
                    disable_decoding=True, timeout=math.inf, push_request=True, disconnect_on_error=False
                )
            except (ResponseError, BusyLoadingError) as error:
                self._failed(error)
            except ConnectionError as error:
                # An error reply of the server ("NOAUTH", "LOADING") has its first word as status; a broken
                # socket has none.
                if error.status_code is None:
                    raise
                self._failed(error)
            else:
                if reply is not _PUSHED:
                    self._replied(reply)

    def _replied(self, reply: Any) -> None:
        waiter = self._next()
        if isinstance(waiter, _Batch):
            waiter.closed(reply)
        elif waiter is not None and not waiter.done():
            waiter.set_result(reply)

    def _failed(self, error: RedisError) -> None:
        if self._pending and isinstance(self._pending[0], _Batch):
            # Of one of its commands. An error for the PING itself leaves the batch open, and the next reply
            # out of step.
            self._pending[0].failed(error if isinstance(error, ResponseError) else ResponseError(str(error)))
            return
        waiter = self._next()
        if isinstance(waiter, asyncio.Future) and not waiter.done():
            waiter.set_exception(error)
            waiter.exception()

    def _next(self) -> asyncio.Future[Any] | _Batch | None:
        if not self._pending:
            raise ConnectionBroken("a reply to no command")
        return self._pending.popleft()

    async def _pushed(self, push: Sequence[Any]) -> Any:
        # Runs inside the read: what a push brings is dealt with before the next reply is so much as looked
        # at.
        kind, channel = push[0], push[1]
        if kind in (b"message", b"smessage"):
            if self._on_push is not None:
                self._on_push(kind, channel, push[2])
            return _PUSHED
        head = self._pending[0] if self._pending else None
        if isinstance(head, _Batch) and channel is not None and head.acknowledged(kind, channel.decode()):
            return _PUSHED
        if kind in (b"unsubscribe", b"sunsubscribe") and channel is not None and self._on_push is not None:
            # No unsubscribe was sent: a slot has moved away, and its channels with it.
            self._on_push(kind, channel, None)
        return _PUSHED

    def __repr__(self) -> str:
        return f"<MultiplexedConnection {'up' if self.up else self._broken}, {len(self._pending)} waiting>"
