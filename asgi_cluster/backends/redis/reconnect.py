"""The one loop that keeps a connection open. A primary's client, a subscriber and a sentinel all use it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from redis.exceptions import RedisError

from asgi_cluster.backends.redis.connection import MultiplexedConnection
from asgi_cluster.backends.redis.errors import ConnectionBroken, is_timeout, reason_of
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.tasks import cancellations, stop_if_cancelled

__all__ = ["ReconnectLoop", "connected"]

_FIRST_PAUSE = 0.05
_PATIENCE_AT_START = 3.0


@asynccontextmanager
async def connected(opening: Awaitable[MultiplexedConnection]) -> AsyncIterator[MultiplexedConnection]:
    """A connection whose replies are read while the block runs, and which is closed at its end.

    The first error, of the block or of the connection, ends both, and is raised as it is.
    """
    connection = await opening
    before = cancellations()  # a node that signs off when its loop ends does it in a cancelled task
    error: Exception | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(connection.run(), name="asgi-cluster reader")
            yield connection
            reader.cancel()
    except* Exception as group:
        error = _first_of(group)
    finally:
        await connection.close()
    stop_if_cancelled(before)
    if error is not None:
        raise error


class ReconnectLoop:
    """Opens a connection, uses it until it breaks, and opens the next one after a pause.

    ``dial`` opens a connection. ``use`` sets it up, calls ``established`` when it has proven to be of use,
    and returns only by an exception. ``lost`` is called after each connection and each failed attempt, with
    the error, or with ``None`` when the loop is cancelled.

    The pause has full jitter. It is at most 0.05 s after an established connection, and twice as long after
    each attempt that fails, up to ``longest_pause`` seconds.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[MultiplexedConnection]],
        use: Callable[[MultiplexedConnection], Awaitable[None]],
        lost: Callable[[Exception | None], None],
        *,
        refused: Callable[[str], Exception] = StoreUnavailable,
        longest_pause: float = 0.5,
    ) -> None:
        self._dial = dial
        self._use = use
        self._lost = lost
        self._refused = refused
        self._longest_pause = longest_pause
        self._pause = _FIRST_PAUSE
        self._wanted = asyncio.Event()
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """The outcome of the start: done when a connection is established. An attempt that fails sets the
        exception that ``refused`` makes of the reason, but while the server may only be busy: after a timeout
        there are more attempts for three seconds.
        """
        self.started.add_done_callback(_retrieve)  # a primary that comes later has no start to wait for

    def established(self) -> None:
        """The connection is of use."""
        self._pause = _FIRST_PAUSE
        if not self.started.done():
            self.started.set_result(None)

    def refuse(self, reason: str) -> None:
        """If this is the start, it fails."""
        if not self.started.done():
            self.started.set_exception(self._refused(reason))

    def skip_pause(self) -> None:
        """The server can be reached again: the next attempt need not wait."""
        self._wanted.set()

    async def run(self) -> None:
        """Runs until cancelled. An error that is not one of the connection or the server is raised."""
        began = asyncio.get_running_loop().time()
        while True:
            error: Exception | None = None
            try:
                async with connected(self._dial()) as connection:
                    await self._use(connection)
            except Exception as raised:
                error = raised
                late = asyncio.get_running_loop().time() - began > _PATIENCE_AT_START
                if late or not is_timeout(error):
                    self.refuse(reason_of(error))
                if not isinstance(error, ConnectionBroken | RedisError | OSError):
                    raise
            finally:
                self._lost(error)
            await self._rest()

    async def _rest(self) -> None:
        self._wanted.clear()
        pause, self._pause = self._pause, min(self._pause * 2, self._longest_pause)
        try:
            async with asyncio.timeout(random.uniform(0, pause)):
                await self._wanted.wait()
        except TimeoutError:
            return


def _first_of(group: BaseExceptionGroup[BaseException]) -> Exception:
    """The first error in a group, however deep."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _retrieve(done: asyncio.Future[None]) -> None:
    if not done.cancelled():
        done.exception()
