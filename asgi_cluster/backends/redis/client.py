"""The command link of one primary: kept up in the background, waited for as long as a caller may wait."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

from redis.exceptions import RedisError

from asgi_cluster.backends.redis.connection import MultiplexedConnection
from asgi_cluster.backends.redis.errors import (
    NOT_EXECUTED,
    PATIENCE_AT_START,
    ConnectionBroken,
    first_of,
    first_word,
    is_timeout,
    reason_of,
    unavailable,
)
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.tasks import check_loop, stop_if_cancelled

__all__ = ["PrimaryClient"]

logger = logging.getLogger("asgi_cluster.redis")

_INTRODUCTION = 1.0
_PROBE_EVERY = 0.5
_SILENT_AFTER = 1.0
_GIVE_UP_AFTER = 2.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.5


class PrimaryClient:
    """Commands to one primary.

    A breaker spares callers the wait: when the server has not answered for a second, or cannot be reached for
    as long, calls fail at once until a probe of ours is answered.
    """

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: MultiplexedConnection | None = None
        self._changed = asyncio.Event()
        self._reconnect_wanted = asyncio.Event()
        self._failing_since: float | None = None
        self._reason = "not connected yet"
        self.run_id = ""

    async def run(self, started: asyncio.Future[None] | None = None) -> None:
        """Keep the link up until cancelled; full-jitter backoff between tries.

        ``started`` gets the outcome of the first.
        """
        pause = _FIRST_PAUSE
        self._loop = asyncio.get_running_loop()
        began = self._loop.time()
        unexpected: BaseException | None = None
        while unexpected is None:
            try:
                await self._one_connection(started)
            except* Exception as group:
                error = first_of(group)
                if not isinstance(error, ConnectionBroken | StoreUnavailable | RedisError | OSError):
                    unexpected = error
                if self._link is not None:
                    pause = _FIRST_PAUSE
                    logger.warning("lost the connection to %s: %s", self._primary.name, reason_of(error))
                self._went_down(reason_of(error))
                # A server that does not answer in time may only be busy, and at the start there is time; a
                # refusal is final.
                late = asyncio.get_running_loop().time() - began > PATIENCE_AT_START
                if started is not None and not started.done() and (late or not is_timeout(error)):
                    started.set_exception(StoreUnavailable(f"{self._primary.name}: {reason_of(error)}"))
            finally:
                self._link = None
            stop_if_cancelled()
            if unexpected is None:
                await self._rest(random.uniform(0, pause))
            pause = min(pause * 2, _LONGEST_PAUSE)
        raise unexpected

    async def _rest(self, pause: float) -> None:
        self._reconnect_wanted.clear()
        try:
            async with asyncio.timeout(pause):
                await self._reconnect_wanted.wait()
        except TimeoutError:
            return

    def reconnect_now(self) -> None:
        """Another connection has reached the server: try at once, and let callers wait for it again."""
        if self._link is None:
            self._failing_since = asyncio.get_running_loop().time()
            self._reconnect_wanted.set()

    async def _one_connection(self, started: asyncio.Future[None] | None) -> None:
        link = await self._primary.dial(None)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(link.run(), name="asgi-cluster command link")
                async with asyncio.timeout(_INTRODUCTION):
                    # Another run id means another history of writes: the store that numbers writes gets it
                    # before the first command.
                    self.run_id = await self._primary.check_server(link)
                self._link = link
                self._failing_since = None
                self._changed.set()
                self._changed = asyncio.Event()
                if started is not None and not started.done():
                    started.set_result(None)
                await self._probe(link)
        finally:
            await link.close()

    def _went_down(self, reason: str) -> None:
        self._reason = reason
        if self._failing_since is None:
            self._failing_since = asyncio.get_running_loop().time()

    async def _probe(self, link: MultiplexedConnection) -> None:
        # One PING at a time tells a stopped server from an idle one, so that requests need not find out by
        # waiting.
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_PROBE_EVERY)
            asked = loop.time()
            answer = link.send("PING")
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
        # A link is marked as broken some ticks before its task has cleared up, and a caller that got that
        # error may try again at once.
        return self._link is not None and self._link.up and self._failing_since is None

    async def drained(self, timeout: float) -> None:
        """Returns when everything that was sent is answered.

        Raises ``TimeoutError``, ``ConnectionBroken``, ``RedisError``.
        """
        if self._link is not None:
            async with asyncio.timeout(timeout):
                # Replies come in order: what was sent before this is answered before it.
                await self._link.send("PING")

    def drop(self, reason: str) -> None:
        """Connect anew: the primary is another one now."""
        if self._link is not None:
            self._link.abort(reason)

    async def call(self, *args: str | bytes | int, timeout: float, asking: bool = False) -> Any:
        """One command; ``asking``: to a node that is importing its slot.

        Raises:
            StoreUnavailable: no reply within ``timeout`` seconds, or the server refused.
            RedisError: an error reply which proves that it did nothing (``errors.NOT_EXECUTED``).
            RuntimeError: called on another event loop than the one that the link is on.
        """
        check_loop(self._loop)
        sent = False
        try:
            async with asyncio.timeout(timeout):
                link = self._link if self.answering else await self._answering()
                assert link is not None
                if asking:
                    link.post(
                        "ASKING"
                    )  # holds for the next command, and nothing comes between two of one tick
                future = link.send(*args)
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
        if self._link is None:
            return False
        try:
            self._link.post(*args)
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
        assert self._link is not None
        return self._link

    def __repr__(self) -> str:
        state = "up" if self.answering else f"down ({self._reason})"
        return f"<PrimaryClient {self._primary.name} {state}>"
