"""The I/O of a room's order: the reads of its history, the pauses between them, and the tail's end."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from asgi_cluster.bus.lease import Lease
from asgi_cluster.exceptions import ClusterError
from asgi_cluster.rooms.history import Entry, HistoryStore, Page, Position
from asgi_cluster.rooms.stream import Action, Actions, Recovered, RoomStream

__all__ = ["StreamRunner"]

logger = logging.getLogger("asgi_cluster.realtime")

_TAIL_KEPT = 30.0  # seconds after its last use
_RETRY = 0.25
_LONGEST_RETRY = 5.0


class StreamRunner:
    """Runs one ``RoomStream``. ``deliver`` gets each publication once, in order; ``lost`` is called when some
    are lost for good.

    ``spawn`` starts a repair in the background.
    """

    def __init__(
        self,
        room: str,
        *,
        history: HistoryStore,
        size: int,
        ttl: float,
        timeout: float,
        epoch: Callable[[], str],
        lease: Callable[[], Lease],
        deliver: Callable[[Entry], None],
        lost: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._room = room
        self._history = history
        self._ttl = ttl
        self._timeout = timeout
        self._epoch = epoch
        self._lease = lease
        self._deliver = deliver
        self._lost = lost
        self._spawn = spawn
        self._stream = RoomStream(size=size)
        self._reading: asyncio.Future[bool] | None = None
        self._tail_timer: asyncio.TimerHandle | None = None
        # memory:// delivers on the publisher's thread.
        self._lock = threading.RLock()

    @property
    def last(self) -> Position | None:
        """The position of every member here; ``None`` before the room was first read."""
        return self._stream.last

    # Receiving

    def receive(self, position: Position, previous: int, payload: bytes) -> None:
        """A publication from the bus."""
        with self._lock:
            self._perform(self._stream.receive(position, previous, payload))

    def gap(self) -> None:
        """Publications may have been missed; wait for ``restored``."""
        self._stream.gap()

    def restored(self) -> None:
        """The room is subscribed to again: read what was missed."""
        with self._lock:
            self._perform(self._stream.restored())

    def _perform(self, actions: Actions) -> None:
        """Under the lock, so that the order of the events is the order of the deliveries."""
        for action in actions:
            try:
                if action is Action.LOST:
                    self._lost()
                elif action is Action.REPAIR:
                    self._start_repair()
                else:
                    self._deliver(action)
            except Exception:
                logger.exception("a room message could not be delivered")  # those after it still are

    # Reading

    def _start_repair(self) -> None:
        work = self._repair()
        self._spawn(work)
        if inspect.getcoroutinestate(work) == inspect.CORO_CLOSED:
            self._stream.abandon_repair()  # nothing runs it: no member is here, or the node is stopping

    async def _repair(self) -> None:
        stream, delay = self._stream, _RETRY
        try:
            while True:
                stream.begin_try()
                try:
                    await self._read(full=False)
                except ClusterError as error:
                    logger.debug("a room's history cannot be read (%s)", type(error).__name__)
                    # The room stays as it is until the history can be read; the pause is random, so that the
                    # rooms do not all read at once when the store is back.
                    await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                    delay = min(delay * 2, _LONGEST_RETRY)
                else:
                    with self._lock:
                        self._perform(stream.end_try())
                        if not stream.repairing:
                            return
        except BaseException:
            stream.abandon_repair()
            raise

    async def _read(self, *, full: bool) -> None:
        """Read history and deliver what is missing. ``full``: all of it, to be kept as the tail. Concurrent
        reads are one.
        """
        loop = asyncio.get_running_loop()
        while (reading := self._reading) is not None and reading.get_loop() is loop:
            if await asyncio.shield(reading) and (self._stream.has_tail or not full):
                return
        self._reading = reading = loop.create_future()
        with self._lock:
            read = self._stream.begin_read(full=full)
        page: Page | None = None
        failure: ClusterError | None = None
        try:
            page = await self._history.read(
                self._room,
                since=read.since,
                limit=read.limit,
                epoch=self._epoch(),
                ttl=self._ttl,
                timeout=self._timeout,
            )
        except ClusterError as error:
            failure = error
            raise
        finally:
            with self._lock:
                self._perform(self._stream.end_read(read, page))
                if full and self._stream.has_tail:
                    self._use_tail()  # here too: the caller may have been cancelled
            if self._reading is reading:
                self._reading = None
            if failure is None:
                reading.set_result(page is not None)
            else:
                reading.set_exception(failure)
                reading.exception()  # retrieved here: it may have no other waiter

    # Recovery

    async def recover(self, since: Position | None) -> Recovered:
        """What lies between ``since`` and ``last``, and ``last``.

        Nothing is delivered between the return and the caller's next ``await``: a member that attaches before
        that misses nothing. ``since=None``: only the position is wanted.

        Raises:
            BusUnavailable: the history could not be read.
        """
        steps = self._stream.recover(since, live=self._lease().live)
        while True:
            try:
                with self._lock:
                    full = next(steps)
            except StopIteration as end:
                recovered: Recovered = end.value
                if since is not None and self._stream.has_tail:
                    self._use_tail()
                return recovered
            await self._read(full=full)

    def _use_tail(self) -> None:
        if self._tail_timer is not None:
            self._tail_timer.cancel()
        self._tail_timer = asyncio.get_running_loop().call_later(_TAIL_KEPT, self._drop_tail)

    def _drop_tail(self) -> None:
        self._stream.drop_tail()
        self._tail_timer = None

    def close(self) -> None:
        """The room has no members here any more."""
        if self._tail_timer is not None:
            self._tail_timer.cancel()
        self._drop_tail()

    def __repr__(self) -> str:
        return f"<StreamRunner {self._stream!r}>"
