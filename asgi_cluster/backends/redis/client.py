"""Commands to one primary, over one connection that is kept open. A caller waits for it as long as it may."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from redis.exceptions import RedisError

from asgi_cluster.backends.redis.connection import MultiplexedConnection
from asgi_cluster.backends.redis.errors import (
    NOT_EXECUTED,
    ConnectionBroken,
    first_word,
    reason_of,
    unavailable,
)
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.reconnect import ReconnectLoop
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.tasks import check_loop

__all__ = ["PrimaryClient"]

logger = logging.getLogger("asgi_cluster.redis")

_SETUP = 1.0
_PROBE_EVERY = 0.5
_SILENT_AFTER = 1.0
_GIVE_UP_AFTER = 2.0


class PrimaryClient:
    """Commands to one primary.

    A breaker spares callers the wait: when the server has not answered for a second, or cannot be reached for
    as long, calls fail at once until a probe is answered.
    """

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self._loop = asyncio.get_running_loop()
        self._connection: MultiplexedConnection | None = None
        self._changed = asyncio.Event()
        self._failing_since: float | None = None
        self._reason = "not connected yet"
        self.run_id = ""
        self.reconnecting = ReconnectLoop(
            lambda: primary.dial(None),
            self._use,
            self._lost,
            refused=lambda reason: StoreUnavailable(f"{primary.name}: {reason}"),
        )
        """To run in a task."""

    def reconnect_now(self) -> None:
        """Another connection has reached the server: try at once, and let callers wait for it again."""
        if self._connection is None:
            self._failing_since = self._loop.time()
            self.reconnecting.skip_pause()

    async def _use(self, connection: MultiplexedConnection) -> None:
        async with asyncio.timeout(_SETUP):
            # Another run id means another history of writes: the store that numbers writes gets it before
            # the first command.
            self.run_id = await self._primary.check_server(connection)
        self._connection = connection
        self._failing_since = None
        self._changed.set()
        self._changed = asyncio.Event()
        self.reconnecting.established()
        await self._probe(connection)

    def _lost(self, error: Exception | None) -> None:
        was_connected, self._connection = self._connection is not None, None
        if error is None:
            return
        self._reason = reason_of(error)
        if was_connected:
            logger.warning("lost the connection to %s: %s", self._primary.name, self._reason)
        if self._failing_since is None:
            self._failing_since = self._loop.time()

    async def _probe(self, connection: MultiplexedConnection) -> None:
        # One PING at a time shows whether the server is stopped or merely idle, so that requests do not wait
        # to find out.
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_PROBE_EVERY)
            asked = loop.time()
            answer = connection.send("PING")
            while not answer.done():
                if loop.time() - asked >= _SILENT_AFTER and self._failing_since is None:
                    self._failing_since = asked
                    self._reason = "the server does not answer"
                if loop.time() - asked >= _GIVE_UP_AFTER:
                    raise ConnectionBroken(f"no answer for {_GIVE_UP_AFTER:g} s")
                await asyncio.wait([answer], timeout=0.1)
            self._failing_since = None

    @property
    def answering(self) -> bool:
        """Whether the server is connected and has answered lately."""
        # A connection is marked as broken some ticks before the loop has dealt with it, and a caller that got
        # that error may try again at once.
        return self._connection is not None and self._connection.up and self._failing_since is None

    async def drained(self, timeout: float) -> None:
        """Returns when everything that was sent is answered.

        Raises ``TimeoutError``, ``ConnectionBroken``, ``RedisError``.
        """
        if self._connection is not None:
            async with asyncio.timeout(timeout):
                # Replies come in order: what was sent before this is answered before it.
                await self._connection.send("PING")

    def drop(self, reason: str) -> None:
        """Connect anew: the primary is another one now."""
        if self._connection is not None:
            self._connection.abort(reason)

    async def call(self, *args: str | bytes | int, timeout: float, asking: bool = False) -> Any:
        """One command; ``asking``: to a node that is importing its slot.

        Raises:
            StoreUnavailable: no reply within ``timeout`` seconds, or the server refused.
            RedisError: an error reply which proves that it did nothing (``errors.NOT_EXECUTED``).
            RuntimeError: called on another event loop than the one that its connection is on.
        """
        check_loop(self._loop)
        sent = False
        try:
            async with asyncio.timeout(timeout):
                connection = self._connection if self.answering else await self._answering()
                assert connection is not None
                if asking:
                    # It holds for the next command, and nothing comes between two of one tick.
                    connection.post("ASKING")
                future = connection.send(*args)
                sent = True
                return await future
        except TimeoutError as error:
            reason = f"no answer within {timeout:.2f} s" if sent else self._reason
            raise StoreUnavailable(f"{self._primary.name}: {reason}", outcome_unknown=sent) from error
        except ConnectionBroken as error:
            reason = f"{self._primary.name}: {error.reason}"
            raise StoreUnavailable(reason, outcome_unknown=sent and error.sent) from error
        except RedisError as error:
            if first_word(error) in NOT_EXECUTED:
                raise
            raise unavailable(error, sent=sent) from error

    def post(self, *args: str | bytes | int) -> bool:
        """One command whose reply is not needed; False when it could not be sent."""
        if self._connection is None:
            return False
        try:
            self._connection.post(*args)
        except ConnectionBroken:
            return False
        return True

    async def _answering(self) -> MultiplexedConnection:
        # A reconnect in progress is worth waiting for; a server that has been away for a second is not.
        loop = asyncio.get_running_loop()
        while not self.answering:
            since = self._failing_since
            if since is not None and loop.time() - since >= _SILENT_AFTER:
                raise ConnectionBroken(self._reason, sent=False)
            await self._changed.wait()
        assert self._connection is not None
        return self._connection

    def __repr__(self) -> str:
        state = "up" if self.answering else f"down ({self._reason})"
        return f"<PrimaryClient {self._primary.name} {state}>"
