"""The subscriber: one connection that hears everything, and proves with every heartbeat that it has missed nothing.

Order is all. Subscriptions first; a beat that was sent before the last of them was acknowledged proves nothing. Pushes are
handed on as they are read, before any later reply is looked at. On a gap the lease goes first, then everybody is told.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from redis.exceptions import RedisError, ResponseError

from asgi_cluster.backends.redis.errors import LinkBroken, reason_of
from asgi_cluster.backends.redis.link import Link, OnPush
from asgi_cluster.backends.redis.registry import Registry
from asgi_cluster.bus.lease import Echo
from asgi_cluster.exceptions import BusUnavailable

__all__ = ["Subscriber"]

logger = logging.getLogger("asgi_cluster.bus")

_BEAT_EVERY = 0.5
_DEAD_AFTER = 1.0
_CONNECT_TIMEOUT = 1.0
_LONGEST_PAUSE = 0.5
_BATCH = 500


class Subscriber:
    """One connection to one primary, and what it is subscribed to.

    ``fixed`` are the channels it always has; others come and go. ``on_message(channel, payload)`` is called for every message;
    ``on_gap(reason, channels)`` when messages may have been lost, on these channels or (``None``) on all; ``on_trusted()`` when the
    first echo after a gap has come back.
    """

    def __init__(
        self,
        make_link: Callable[[OnPush], Link],
        *,
        fixed: Iterable[str],
        echo: Echo,
        registry: Registry,
        sharded: bool,
        on_message: Callable[[str, bytes], None],
        on_gap: Callable[[str, frozenset[str] | None], None],
        on_trusted: Callable[[], None],
    ) -> None:
        self._make_link = make_link
        self._fixed = list(fixed)
        self._echo = echo
        self._registry = registry
        self._on_message = on_message
        self._on_gap = on_gap
        self._on_trusted = on_trusted
        self._subscribe_verb = "SSUBSCRIBE" if sharded else "SUBSCRIBE"
        self._unsubscribe_verb = "SUNSUBSCRIBE" if sharded else "UNSUBSCRIBE"
        self._wanted: set[str] = set()
        self._sent: set[str] = set()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._link: Link | None = None
        self._ready = False
        self._flushing = False
        self._trusted = False
        self.received = 0
        self.connections = 0

    @property
    def connected(self) -> bool:
        """Whether the connection stands and all subscriptions have been acknowledged."""
        return self._ready

    # Channels that come and go

    async def subscribe(self, channel: str) -> None:
        """Returns when the server has acknowledged; at once while the connection is down: then it is among the first to be sent.

        Raises:
            BusUnavailable: the server refused.
        """
        self._wanted.add(channel)
        if not self._ready or (channel in self._sent and channel not in self._waiting):
            return
        future = self._waiting.get(channel)
        if future is None:
            future = self._waiting[channel] = asyncio.get_running_loop().create_future()
            self._flush_soon()
        await asyncio.shield(future)

    def unsubscribe(self, channel: str) -> None:
        """No more of it."""
        self._wanted.discard(channel)
        if self._ready:
            self._flush_soon()

    def _flush_soon(self) -> None:
        # One command for all the joins and leaves of a loop tick.
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        link = self._link
        if link is None or not self._ready:
            return
        joining, leaving = sorted(self._wanted - self._sent), sorted(self._sent - self._wanted)
        for channel in [c for c in self._waiting if c not in self._wanted]:
            self._answer([channel], None)
        try:
            for some in _batches(leaving):
                self._sent.difference_update(some)
                link.subscribe(self._unsubscribe_verb, some).add_done_callback(_retrieve)
            for some in _batches(joining):
                self._sent.update(some)
                acked = link.subscribe(self._subscribe_verb, some)
                acked.add_done_callback(partial(self._acknowledged, some))
        except LinkBroken:
            return  # the gap is on its way, and then everything is subscribed anew

    def _acknowledged(self, channels: list[str], done: asyncio.Future[None]) -> None:
        error = done.exception()
        if isinstance(error, ResponseError):
            self._sent.difference_update(channels)
            self._wanted.difference_update(channels)
            self._answer(channels, BusUnavailable(reason_of(error)))
        else:
            self._answer(channels, None)

    def _answer(self, channels: Iterable[str], error: BusUnavailable | None) -> None:
        for channel in channels:
            future = self._waiting.pop(channel, None)
            if future is not None and not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
                    future.exception()

    # The connection

    async def run(self, started: asyncio.Future[None]) -> None:
        """Stay connected until cancelled. ``started`` gets the outcome of the first attempt."""
        pause = 0.05
        while True:
            reason: str | None = None
            try:
                await self._one_connection(started)
            except* (LinkBroken, RedisError, OSError, TimeoutError) as group:
                error: BaseException = group
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                reason = reason_of(error)
                if not started.done():
                    started.set_exception(BusUnavailable(reason))
            finally:
                pause = 0.05 if self._ready else min(pause * 2, _LONGEST_PAUSE)
                self._lost(reason)
            await asyncio.sleep(random.uniform(0, pause))

    def _lost(self, reason: str | None) -> None:
        was_ready, self._ready = self._ready, False
        self._link = None
        self._trusted = False
        self._sent.clear()
        self._echo.gap()
        if was_ready and reason is not None:  # without one it is being stopped, and nobody is left to be told
            self._on_gap(reason, None)
        self._answer(list(self._waiting), None)

    async def _one_connection(self, started: asyncio.Future[None]) -> None:
        link = self._make_link(self._pushed)
        await link.open(_CONNECT_TIMEOUT)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(link.run(), name="asgi-cluster subscriber link")
            async with asyncio.timeout(_CONNECT_TIMEOUT * 2):
                # Registered before the first lease: whoever serves from a cache is known to those who log out.
                await link.send(*self._registry.registration())
                channels = [*self._fixed, *sorted(self._wanted)]
                self._sent = set(self._wanted)
                await asyncio.gather(*[link.subscribe(self._subscribe_verb, some) for some in _batches(channels)])
            self._link = link
            self._ready = True
            self.connections += 1
            self._echo.subscribed()
            if not self._sent.issuperset(self._wanted) or not self._wanted.issuperset(self._sent):
                self._flush_soon()
            await self._beat_forever(link, started)

    async def _beat_forever(self, link: Link, started: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        next_beat = loop.time()
        while True:
            self._echo.beat()
            link.send(*self._registry.beat()).add_done_callback(lambda done: self._echoed(link, done, started))
            next_beat = max(next_beat + _BEAT_EVERY, loop.time())
            while loop.time() < next_beat:
                await asyncio.sleep(min(0.1, max(0.0, next_beat - loop.time())))
                since = self._echo.waiting_since
                if since is not None and self._echo.lease.clock() - since > _DEAD_AFTER:
                    raise LinkBroken(f"no echo for {_DEAD_AFTER:g} s")

    def _echoed(self, link: Link, done: asyncio.Future[Any], started: asyncio.Future[None]) -> None:
        if done.cancelled() or link is not self._link:
            return
        error = done.exception()
        renewed = error is None and done.result() == 1
        self._echo.reply(renewed)
        if isinstance(error, LinkBroken):
            return
        if error is None and not renewed:
            # The registration is gone (a restart, FLUSHALL): until it is back, a logout would not know this node.
            logger.warning("this node's registration was gone: registering again")
            link.send(*self._registry.registration()).add_done_callback(_retrieve)
        elif error is not None and not started.done():
            started.set_exception(BusUnavailable(reason_of(error)))
        elif renewed:
            if not started.done():
                started.set_result(None)
            if not self._trusted:
                self._trusted = True
                self._on_trusted()

    def _pushed(self, kind: bytes, channel: bytes, payload: Any) -> None:
        name = channel.decode()
        if kind in (b"message", b"smessage"):
            self.received += 1
            self._on_message(name, payload)
            return
        # An unsolicited unsubscribe: the slot has moved, and what is published there now is not heard here.
        self._sent.discard(name)
        self._echo.gap()
        self._on_gap("a channel moved away", frozenset((name,)))
        raise LinkBroken("a channel moved away")


def _batches(channels: list[str]) -> Iterable[list[str]]:
    return [channels[start : start + _BATCH] for start in range(0, len(channels), _BATCH)]


def _retrieve(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()
