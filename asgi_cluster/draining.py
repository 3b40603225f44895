"""Leaving without a crowd: on SIGTERM the sockets are closed a few at a time, and then the server is told.

uvicorn closes every socket with 1012 in the same moment, before ``lifespan.shutdown`` gives anybody a chance,
and all clients come back at once. So we take the signal first, drain, and hand it on to the handler that was
there.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["draining_on_sigterm"]

logger = logging.getLogger("asgi_cluster.draining")


@contextmanager
def draining_on_sigterm(drain: Callable[[], Awaitable[None]], tasks: asyncio.TaskGroup) -> Iterator[None]:
    """While entered, the first SIGTERM runs ``drain`` in ``tasks`` and then the previous handler; the second
    one does so at once.

    Without a handler that can be called (a server that is run from code, or in a thread) nothing is changed:
    call ``await cluster.drain(seconds)`` there.
    """
    previous = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        logger.warning(
            "RealtimeConfig(drain=…) found no SIGTERM handler to chain: call cluster.drain() before stopping"
        )
        yield
        return
    hand_on: Callable[[int, FrameType | None], object] = previous
    loop = asyncio.get_running_loop()
    begun = False
    draining: asyncio.Task[None] | None = None

    async def drain_and_hand_on() -> None:
        await drain()
        hand_on(signal.SIGTERM, None)

    def begin() -> None:
        nonlocal draining
        draining = tasks.create_task(drain_and_hand_on(), name="asgi-cluster drain")

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal begun
        if begun:
            hand_on(number, frame)
            return
        begun = True
        # A Python signal handler runs between two bytecodes of whatever the loop is doing: only wake it.
        loop.call_soon_threadsafe(begin)

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        if draining is not None:
            # Told twice, or stopped in another way: whoever stops does not wait for the rest of the drain.
            draining.cancel()
        # Somebody may have chained us in turn: then their handler stays.
        if signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, previous)
