"""A start without ASGI lifespan: at the first call, once, on the loop that serves it.

Daphne has no lifespan, other servers can turn it off, and gunicorn's own ASGI worker serves although the
start in it has failed. There the first request or WebSocket starts the cluster, all that come meanwhile wait
for the same start, and the exit of the process stops it.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from multiprocessing import util
from time import monotonic

from asgi_cluster.exceptions import ClusterError, StoreUnavailable
from asgi_cluster.tasks import check_loop, running_asyncio_loop

__all__ = ["LazyStart"]

logger = logging.getLogger("asgi_cluster.lifespan")

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds after a start that failed before the next one
_START_TIMEOUT = 10.0  # seconds
_STOP_TIMEOUT = 5.0  # seconds by which the stop may delay the exit of the process


class LazyStart:
    """Starts a cluster once when it is needed, and again after a failure, with growing pauses."""

    def __init__(
        self,
        start: Callable[[], Awaitable[object]],
        stop: Callable[[], Awaitable[object]],
    ) -> None:
        self._start = start
        self._stop = stop
        self._starting: asyncio.Task[None] | None = None
        self._pause = 0.0
        self._again_at = 0.0
        self._failure = ""
        self._at_exit: Callable[[], object] | None = None

    async def __call__(self) -> None:
        """Return when the cluster is started.

        Raises:
            StoreUnavailable: it could not be started; ``retry_after`` is when the next try is made.
            RuntimeError: another loop starts it.
        """
        starting = self._starting
        if starting is None:
            if (left := self._again_at - monotonic()) > 0:
                raise StoreUnavailable(self._failure, retry_after=left)
            # A task of its own, which no group can own yet: a client that goes away must not take the start
            # along. Without the context of the request that happens to be the first.
            starting = self._starting = running_asyncio_loop().create_task(
                self._try(), name="asgi-cluster start", context=Context()
            )
        else:
            check_loop(starting.get_loop())
        await asyncio.wait((starting,))
        if starting.cancelled():
            raise StoreUnavailable("the start of the cluster was cancelled")
        if self._failure:
            raise StoreUnavailable(self._failure, retry_after=self._pause)

    async def _try(self) -> None:
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await self._start()
        except Exception as error:
            self._pause = min(_LONGEST_PAUSE, self._pause * 2 or _FIRST_PAUSE)
            self._again_at = monotonic() + self._pause
            reason = (
                error.reason if isinstance(error, StoreUnavailable) else str(error) or type(error).__name__
            )
            self._failure = f"the cluster could not be started: {reason}"
            if isinstance(error, ClusterError | TimeoutError):
                logger.error("%s; the next try is in %g s", self._failure, self._pause)
            else:
                logger.exception("%s; the next try is in %g s", self._failure, self._pause)
        else:
            self._pause, self._failure = 0.0, ""
            self._stop_at_exit(asyncio.get_running_loop())
            logger.info(
                "started by the first request: ASGI lifespan has not run, or the start in it has failed"
            )
        finally:
            self._starting = None

    def _stop_at_exit(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)

        def stop() -> None:
            # Only where the server has left its loop open: a closed one has cancelled what ran on it.
            if not loop.is_closed() and not loop.is_running():
                with suppress(TimeoutError):
                    loop.run_until_complete(asyncio.wait_for(self._stop(), _STOP_TIMEOUT))

        self._at_exit = stop
        atexit.register(stop)
        if multiprocessing.parent_process() is not None:
            util.Finalize(None, stop, exitpriority=1)  # a forked worker runs these and no atexit
