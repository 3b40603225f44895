"""One connection to one Redis, multiplexed.

One reader takes replies and pushes in the order in which the server wrote them and matches replies to
commands first in, first out. Commands of one loop tick go out in one write. A caller that stops waiting
leaves the connection as it is: its reply is dropped when it comes. When the connection breaks, all callers
that wait get an error: the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import BusyLoadingError, ConnectionError, RedisError, ResponseError

from asgi_cluster.backends.redis.compat import receive_pushes, writer_of
from asgi_cluster.backends.redis.errors import ConnectionBroken, reason_of
from asgi_cluster.backends.redis.replies import Batch, Refusals, Replies

__all__ = ["MultiplexedConnection", "OnPush"]

OnPush = Callable[[bytes, bytes, Any], None]
"""Kind (``message``, ``smessage``, or an unsolicited ``unsubscribe``/``sunsubscribe``), channel, payload.

Must not block.
"""

_MAX_PENDING = 20_000
_MAX_UNSENT = 64 << 20
_PUSHED: Any = object()


class MultiplexedConnection:
    """A connection while it lasts: ``await open()``, then ``run()`` in a task until it breaks; it is not
    opened again.
    """

    def __init__(self, connection: AbstractConnection, on_push: OnPush | None = None) -> None:
        self._connection = connection
        self._on_push = on_push
        self._replies = Replies()
        self._outgoing: list[bytes] = []
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
        receive_pushes(self._connection, self._pushed)
        self._writer = writer_of(self._connection)
        self._tls = self._writer.get_extra_info("ssl_object") is not None
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
        self.check()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._write(args, future)
        return future

    def post(self, *args: str | bytes | int) -> None:
        """Send a command whose reply is not needed. Raises as ``send``."""
        self.check()
        self._write(args, None)

    def subscribe(self, verb: str, commands: Sequence[Sequence[str]]) -> asyncio.Future[Refusals]:
        """``SUBSCRIBE``, ``UNSUBSCRIBE`` or a sharded form, one command per list of channels: done when all
        are answered.

        An error reply refuses all channels of its command. Raises as ``send``.
        """
        self.check()
        batch = self._replies.batch(verb, commands)
        for channels in commands:
            self._outgoing += self._connection.pack_command(verb, *channels)
        self._write(("PING", batch.nonce), batch)
        return batch.future

    def check(self) -> None:
        """Raises ``ConnectionBroken``, with the reason: no command can be sent."""
        if self._broken is not None:
            raise ConnectionBroken(self._broken, sent=False)
        if len(self._replies) >= _MAX_PENDING:
            raise ConnectionBroken(f"{_MAX_PENDING} commands are waiting for their replies", sent=False)

    def _write(self, args: Sequence[str | bytes | int], waiter: asyncio.Future[Any] | Batch | None) -> None:
        if not self._outgoing or isinstance(waiter, Batch):
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += self._connection.pack_command(*args)
        self._replies.expect(waiter)

    def _flush(self) -> None:
        chunks, self._outgoing = self._outgoing, []
        if not chunks or self._broken is not None or self._writer is None:
            return
        self._writer.write(b"".join(chunks))
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT:
            # Bounded in bytes too: a server that reads nothing gets no more of this process's memory.
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
        self._replies.lost(reason)

    async def _read_all(self) -> None:
        read = self._connection.read_response
        while True:
            try:
                reply = await read(
                    disable_decoding=True, timeout=math.inf, push_request=True, disconnect_on_error=False
                )
            except (ResponseError, BusyLoadingError) as error:
                self._replies.failed(error)
            except ConnectionError as error:
                # An error reply of the server ("NOAUTH", "LOADING") has its first word as status; a broken
                # socket has none.
                if error.status_code is None:
                    raise
                self._replies.failed(error)
            else:
                if reply is not _PUSHED:
                    self._replies.replied(reply)

    async def _pushed(self, push: Sequence[Any]) -> Any:
        # Runs inside the read: a push is handled before the next reply is looked at.
        kind, channel = push[0], push[1]
        if kind in (b"message", b"smessage"):
            if self._on_push is not None:
                self._on_push(kind, channel, push[2])
            return _PUSHED
        if channel is None or self._replies.acknowledged(kind, channel.decode()):
            return _PUSHED
        if kind in (b"unsubscribe", b"sunsubscribe") and self._on_push is not None:
            # No unsubscribe was sent: a slot has moved away, and its channels with it.
            self._on_push(kind, channel, None)
        return _PUSHED

    def __repr__(self) -> str:
        return f"<MultiplexedConnection {'up' if self.up else self._broken}, {len(self._replies)} waiting>"
