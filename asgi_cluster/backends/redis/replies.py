"""Which reply belongs to which command of one connection. Without I/O.

Replies come in the order of the commands. (Un)subscribe commands have no reply of their own, only pushes,
and on a Cluster a slot that moves away brings the same push unasked. Counting them could put every later
reply in the wrong place by one, and a heartbeat would take the reply to an older one for its own. So each
batch is closed by a ``PING`` with a nonce: whatever came before its reply belongs to the batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any

from redis.exceptions import RedisError, ResponseError

from asgi_cluster.backends.redis.errors import ConnectionBroken

__all__ = ["Batch", "Refusals", "Replies"]

Refusals = dict[str, ResponseError]
"""The channels that were not subscribed, each with the server's reason."""


class Batch:
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

        Raises ``ConnectionBroken`` when it is none, or acks are missing: then no later reply can be matched.
        """
        subscribing = self.verb in (b"subscribe", b"ssubscribe")
        if reply != self.nonce or (subscribing and self.commands):
            raise ConnectionBroken("replies are out of step")
        if not self.future.done():
            self.future.set_result(self.refused)


class Replies:
    """The commands that were sent and are not answered yet."""

    def __init__(self) -> None:
        self._pending: deque[asyncio.Future[Any] | Batch | None] = deque()
        self._nonces = count(1)

    def __len__(self) -> int:
        return len(self._pending)

    def expect(self, waiter: asyncio.Future[Any] | Batch | None) -> None:
        """A command was sent; ``None``: its reply is not needed."""
        self._pending.append(waiter)

    def batch(self, verb: str, commands: Sequence[Sequence[str]]) -> Batch:
        """A batch of its own nonce, which ``expect`` is still to get."""
        return Batch(verb, commands, b"%d" % next(self._nonces))

    def replied(self, reply: Any) -> None:
        """Raises ``ConnectionBroken``: it answers no command."""
        waiter = self._next()
        if isinstance(waiter, Batch):
            waiter.closed(reply)
        elif waiter is not None and not waiter.done():
            waiter.set_result(reply)

    def failed(self, error: RedisError) -> None:
        """An error reply. Raises as ``replied``."""
        if self._pending and isinstance(self._pending[0], Batch):
            # Of one of its commands. An error for the PING itself leaves the batch open, and the next reply
            # out of step.
            self._pending[0].failed(error if isinstance(error, ResponseError) else ResponseError(str(error)))
            return
        waiter = self._next()
        if isinstance(waiter, asyncio.Future) and not waiter.done():
            waiter.set_exception(error)
            waiter.exception()

    def acknowledged(self, kind: bytes, channel: str) -> bool:
        """Whether a push about a subscription answers the batch whose turn it is."""
        head = self._pending[0] if self._pending else None
        return isinstance(head, Batch) and head.acknowledged(kind, channel)

    def lost(self, reason: str) -> None:
        """The connection has broken: the outcome of all that was sent is unknown."""
        while self._pending:
            waiter = self._pending.popleft()
            future = waiter.future if isinstance(waiter, Batch) else waiter
            if future is not None and not future.done():
                future.set_exception(ConnectionBroken(reason))
                future.exception()  # its caller may have gone

    def _next(self) -> asyncio.Future[Any] | Batch | None:
        if not self._pending:
            raise ConnectionBroken("a reply to no command")
        return self._pending.popleft()
