"""Closing sockets a few at a time: on SIGTERM the sockets are closed first, and then the server gets the
signal.

uvicorn closes every socket with 1012 in the same moment, before ``lifespan.shutdown``, and all clients come
back at once. So the signal is held back, the sockets are drained, and the signal is raised again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from asgi_cluster.tasks import spawn

__all__ = ["Drainer", "draining_on_sigterm"]

logger = logging.getLogger("asgi_cluster.draining")

_drainers: dict[int, Drainer] = {}
"""Of this process, by the file descriptor that each one writes to. Several clusters in one process make a
chain: the latest one comes first, and forwards to the one before.
"""


@contextmanager
def draining_on_sigterm(
    drain: Callable[[], Awaitable[None]], tasks: asyncio.TaskGroup, *, level: int = logging.WARNING
) -> Iterator[Drainer | None]:
    """While entered, the first SIGTERM runs ``drain`` in ``tasks`` and is then raised again for the handlers
    that were there before; the second one goes to them at once.

    Without a handler before (a server that is run from code, or one that is stopped in another way), or
    outside of the main thread, nothing is changed, which is logged with ``level``.
    """
    main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM)
    if not main or not callable(previous):
        logger.log(
            level,
            "SIGTERM will close all sockets at once: %s. Call cluster.drain() before stopping",
            "the server handles no SIGTERM in this process" if main else "this is not the main thread",
        )
        yield None
        return
    drainer = Drainer(drain, tasks, previous)
    try:
        drainer.install()
        yield drainer
    finally:
        drainer.close()


class Drainer:
    """Holds SIGTERM back on both ways in which it reaches a server: a handler of ``signal.signal`` (uvicorn,
    Daphne), and one of ``loop.add_signal_handler`` (granian, hypercorn, gunicorn's ASGI worker), which the
    loop calls for what it reads from Python's wakeup file descriptor.
    """

    def __init__(
        self,
        drain: Callable[[], Awaitable[None]],
        tasks: asyncio.TaskGroup,
        previous: Callable[[int, FrameType | None], object],
    ) -> None:
        self._drain = drain
        self._tasks = tasks
        self._previous = previous
        self._loop = asyncio.get_running_loop()
        self._begun = False
        self._over = False
        self._draining: asyncio.Task[None] | None = None
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._fd = -1
        """The file descriptor that was set before: the loop's own, or that of another drainer; -1 when the
        loop handles no signals.
        """
        _drainers[self._writer.fileno()] = self

    def install(self) -> None:
        """Replace the handlers, again if need be: uvloop sets its file descriptor each time it is run, and
        granian runs its loop several times.
        """
        if self._over or asyncio.get_running_loop() is not self._loop:
            return
        if signal.getsignal(signal.SIGTERM) == self._previous:
            signal.signal(signal.SIGTERM, self._handle)
        fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if fd == -1:
            signal.set_wakeup_fd(-1)
        elif fd in _drainers and self._fd != -1:
            # That one forwards to this one. Before it again, this one would send every signal in a circle.
            signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        elif fd != self._writer.fileno():
            if self._fd == -1:
                self._loop.add_reader(self._reader, self._forward)
            self._fd = fd

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            self._previous(number, frame)
        elif self._begun:
            self._raise_again()
        else:
            self._begun = True
            # A Python signal handler runs between any two bytecodes of the loop: it only wakes the loop up.
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        try:
            self._draining = spawn(self._tasks, self._drain_then_raise(), name="asgi-cluster drain")
        except RuntimeError:
            self._raise_again()  # the cluster has ended in this moment

    async def _drain_then_raise(self) -> None:
        try:
            await self._drain()
        finally:
            self._raise_again()

    def _raise_again(self) -> None:
        if not self._over:
            self._restore()
            signal.raise_signal(signal.SIGTERM)

    def _forward(self) -> None:
        # Every signal but the one that is held back.
        with suppress(OSError):  # there is none, or the loop has closed its file descriptor
            numbers = self._reader.recv(4096).replace(bytes([signal.SIGTERM]), b"")
            if numbers:
                os.write(self._fd, numbers)

    def _restore(self) -> None:
        self._over = True
        # A handler that has chained this one in turn stays.
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._previous)
        if self._fd != -1:
            try:
                fd = signal.set_wakeup_fd(self._fd, warn_on_full_buffer=False)
            except (OSError, ValueError):
                # uvloop closes its own each time it has run; the number may be another file's by now.
                fd = signal.set_wakeup_fd(-1)
            if fd != self._writer.fileno():
                signal.set_wakeup_fd(fd, warn_on_full_buffer=False)  # the loop has set its own already
            self._loop.remove_reader(self._reader)
            self._forward()
            for other in _drainers.values():
                if other._fd == self._writer.fileno():
                    other._fd = self._fd

    def close(self) -> None:
        """Restore the handlers. A stop in another way does not wait for the rest of a drain; a signal that is
        still held back is raised again.
        """
        if self._draining is not None:
            self._draining.cancel()
        held_back = self._begun and not self._over
        if not self._over:
            self._restore()
        del _drainers[self._writer.fileno()]
        self._reader.close()
        self._writer.close()
        if held_back:
            signal.raise_signal(signal.SIGTERM)


def reloads() -> bool:
    """Whether a developer's server restarts its worker when a file changes: nothing is to wait then."""
    return "--reload" in sys.argv
