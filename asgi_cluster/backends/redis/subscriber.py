"""The subscriber: one connection that receives everything, and proves with every heartbeat that it has missed
nothing.

Order is all. Subscriptions first; a beat that was sent before the last of them was acknowledged proves
nothing. Pushes are handed on as they are read, before any later reply is looked at. On a gap the lease goes
first, then the listener is called.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

from redis.exceptions import RedisError

from asgi_cluster.backends.redis.connection import MultiplexedConnection
from asgi_cluster.backends.redis.errors import (
    PATIENCE_AT_START,
    ConnectionBroken,
    first_of,
    first_word,
    is_timeout,
    reason_of,
)
from asgi_cluster.backends.redis.listener import Heartbeat, Listener
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.quorum import PrimaryReport, QuorumHeartbeats
from asgi_cluster.backends.redis.replies import Refusals
from asgi_cluster.backends.redis.slots import facts_of
from asgi_cluster.bus.lease import Heartbeats, Lease
from asgi_cluster.exceptions import BusUnavailable
from asgi_cluster.tasks import stop_if_cancelled

__all__ = ["Subscriber"]

logger = logging.getLogger("asgi_cluster.bus")

_BEAT_EVERY = 0.5
_DEAD_AFTER = 1.0
_LOOK_EVERY = 0.1
_REAPED_AFTER = 3.5  # seconds of silence from which on the other nodes may have removed this one
_SETUP = 2.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.5
_RETRY_MOVED = 0.1
_BATCH = 500
_UNKNOWN = "?"
_MOVED = frozenset(("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN"))
_DEMOTED = frozenset(("READONLY", "MASTERDOWN"))


class Subscriber:
    """One connection to one primary, and what it is subscribed to.

    ``vital``: channels without which it is of no use.
    """

    def __init__(
        self,
        primary: Primary,
        lease: Lease,
        listener: Listener,
        *,
        sharded: bool,
        vital: Collection[str] = (),
    ) -> None:
        self.primary = primary
        self.lease = lease
        self.echo = QuorumHeartbeats(lease) if sharded else Heartbeats(lease)
        self.standing: PrimaryReport | None = None
        """What a primary of a Cluster has reported last on this connection."""
        self._listener = listener
        self._sharded = sharded
        self._prefix = "S" if sharded else ""
        self._vital = vital
        self._wanted: set[str] = set()
        self._sent: dict[str, int] = {}
        self._acked: set[str] = set()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._batches = 0
        self._link: MultiplexedConnection | None = None
        self._flushing = False
        self._changed: set[str] = set()
        self._registered = False
        self._stall = (0.0, 0.0)  # how long the event loop stood still, and until when
        self.received = 0
        self.connections = 0
        self.run_id = _UNKNOWN
        """Of the server at the other end, or the last one."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands and was subscribed to all that was wanted then."""
        return self._link is not None

    def is_subscribed(self, channel: str) -> bool:
        """Whether the subscription to ``channel`` stands."""
        return channel in self._acked

    # Subscriptions

    def want(self, channel: str) -> None:
        """Subscribe, without waiting."""
        self._wanted.add(channel)
        self._flush_soon(channel)

    async def subscribe(self, channel: str) -> None:
        """Returns when the server has acknowledged; at once while the connection is down: then it is among
        the first to be sent.

        Raises:
            BusUnavailable: the server refused.
        """
        self.want(channel)
        if self._link is None or channel in self._acked:
            return
        future = self._waiting.get(channel)
        if future is None:
            future = self._waiting[channel] = asyncio.get_running_loop().create_future()
        await asyncio.shield(future)

    def unsubscribe(self, channel: str) -> None:
        """No more of it."""
        self._wanted.discard(channel)
        self._flush_soon(channel)

    def _flush_soon(self, *channels: str) -> None:
        # One command for all the joins and leaves of a loop tick; a join and a leave in one tick cost
        # nothing.
        if self._link is None:
            return  # whatever is wanted is subscribed when there is one
        self._changed.update(channels)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        changed, self._changed = self._changed, set()
        link = self._link
        if link is None or not link.up:
            return  # the gap is on its way, and then everything is subscribed anew
        self._answer(changed - self._wanted, None)
        leaving = sorted(channel for channel in changed - self._wanted if channel in self._sent)
        joining = sorted(channel for channel in changed & self._wanted if channel not in self._sent)
        if leaving:
            for channel in leaving:
                del self._sent[channel]
                self._acked.discard(channel)
            link.subscribe(f"{self._prefix}UNSUBSCRIBE", self._commands(leaving))
        if joining:
            self._send(link, joining)

    def _commands(self, channels: Sequence[str], *, apart: bool = False) -> list[Sequence[str]]:
        # Channels of one sharded command must share a slot; a refusal by an access list refuses all of its
        # command.
        size = 1 if self._sharded or apart else _BATCH
        return [channels[start : start + size] for start in range(0, len(channels), size)]

    def _send(
        self, link: MultiplexedConnection, channels: Sequence[str], *, apart: bool = False
    ) -> asyncio.Future[Refusals]:
        self._batches += 1
        self._sent.update(dict.fromkeys(channels, self._batches))
        done = link.subscribe(f"{self._prefix}SUBSCRIBE", self._commands(channels, apart=apart))
        if self._link is not None:
            done.add_done_callback(partial(self._answered, link, self._batches, channels))
        return done

    def _answered(
        self, link: MultiplexedConnection, batch: int, channels: Sequence[str], done: asyncio.Future[Refusals]
    ) -> None:
        if done.cancelled() or done.exception() is not None or link is not self._link:
            return  # lost with the connection
        refused = done.result()
        # A channel that was left meanwhile, or left and joined again, has a later command on the way.
        current = [channel for channel in channels if self._sent.get(channel) == batch]
        heard = frozenset(channel for channel in current if channel not in refused)
        self._acked |= heard
        if heard:
            self._listener.acknowledged(self, heard)
        self._answer(heard, None)
        self._refused(link, {channel: refused[channel] for channel in current if channel in refused})

    def _refused(self, link: MultiplexedConnection, refused: Refusals) -> None:
        if not refused:
            return
        for channel in refused:
            del self._sent[channel]
        moved = frozenset(channel for channel, error in refused.items() if first_word(error) in _MOVED)
        if moved:
            # Their messages arrive again when the server that has them now has acknowledged; until then this
            # is a gap, and no caller need wait.
            self._listener.gap(self, "channels are being moved", moved)
            self._answer(moved, None)
            self._listener.moved(self)
            asyncio.get_running_loop().call_later(_RETRY_MOVED, self._flush_soon, *moved)
        others = [channel for channel in refused if channel not in moved]
        if len(others) > 1 and not self._sharded and len(set(map(id, refused.values()))) < len(others):
            self._send(link, others, apart=True)
            return
        for channel in others:
            self._wanted.discard(channel)
            self._answer([channel], BusUnavailable(reason_of(refused[channel])))
            logger.error("a room's channel was refused: %s", reason_of(refused[channel]))

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
        """Stay connected until cancelled.

        ``started`` gets the first echo, or why the first attempt failed.
        """
        pause = _FIRST_PAUSE
        began = asyncio.get_running_loop().time()
        unexpected: BaseException | None = None
        while unexpected is None:
            reason: str | None = None
            try:
                await self._one_connection(started)
            except* Exception as group:
                error = first_of(group)
                if not isinstance(error, ConnectionBroken | RedisError | OSError):
                    unexpected = error
                reason = reason_of(error)
                late = asyncio.get_running_loop().time() - began > PATIENCE_AT_START
                if not started.done() and (late or not is_timeout(error)):
                    started.set_exception(BusUnavailable(f"{self.primary.name}: cannot subscribe: {reason}"))
            finally:
                pause = _FIRST_PAUSE if self.connected else min(pause * 2, _LONGEST_PAUSE)
                self._lost(reason)
            stop_if_cancelled()
            if unexpected is None:
                await asyncio.sleep(random.uniform(0, pause))
        raise unexpected

    def _lost(self, reason: str | None) -> None:
        was_connected, self._link = self.connected, None
        self.echo.gap()
        self.standing = None
        self._sent.clear()
        self._acked.clear()
        self._changed.clear()
        if was_connected and reason is not None:  # without one it is being stopped
            self._listener.gap(self, reason, frozenset(self._wanted))
        self._answer(list(self._waiting), None)

    async def _one_connection(self, started: asyncio.Future[None]) -> None:
        link = await self.primary.dial(
            lambda kind, channel, payload: self._pushed(link, kind, channel, payload)
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(link.run(), name="asgi-cluster subscriber link")
                async with asyncio.timeout(_SETUP):
                    self.run_id = await self.primary.check_server(link) or _UNKNOWN
                    await self._register(link)
                    await self._subscribe_all(link)
                self.connections += 1
                self._link = link
                self.echo.subscribed()
                self._listener.acknowledged(self, frozenset(self._acked))
                self._flush_soon(*self._wanted.symmetric_difference(self._sent))
                await self._beat_forever(link, started)
        finally:
            await link.close()

    async def _register(self, link: MultiplexedConnection) -> None:
        # Before the first lease: a logout waits for every registered node that serves from a cache. After a
        # mere reconnect it is registered already: the incarnation stays, and with it the presence entries.
        heartbeat = self._listener.heartbeat(self)
        if not self._registered or await link.send(*heartbeat.beat()) != 1:
            await link.send(*heartbeat.registration())
            self._registered = True

    async def _subscribe_all(self, link: MultiplexedConnection) -> None:
        channels = sorted(self._wanted)
        if not channels:
            return
        refused = await self._send(link, channels)
        if refused and not self._sharded:
            for channel in refused:
                del self._sent[channel]
            refused = await self._send(link, sorted(refused), apart=True)
        for channel in self._vital:
            if channel in refused and first_word(refused[channel]) not in _MOVED:
                raise refused[channel]
        self._acked = set(self._sent) - set(refused)
        self._refused(link, refused)

    async def _beat_forever(self, link: MultiplexedConnection, started: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        next_beat = loop.time()
        while True:
            heartbeat = self._listener.heartbeat(self)
            if self._sharded:
                # Asked before the beat: at the beat its epoch was this one or a newer one.
                asked = self.lease.clock()
                link.send("CLUSTER", "INFO").add_done_callback(partial(self._stands, link, asked))
            self.echo.beat()
            link.send(*heartbeat.beat()).add_done_callback(partial(self._echoed, link, heartbeat, started))
            next_beat = max(next_beat + _BEAT_EVERY, loop.time())
            while (now := loop.time()) < next_beat:
                await asyncio.sleep(min(_LOOK_EVERY, next_beat - now))
                if loop.time() - now > _BEAT_EVERY:
                    self._stall = (loop.time() - now, loop.time())
                    continue  # this process slept: the echo may be waiting to be read
                since = self.echo.waiting_since
                if since is not None and self.lease.clock() - since > _DEAD_AFTER:
                    raise ConnectionBroken(f"no echo for {_DEAD_AFTER:g} s")

    def _stands(self, link: MultiplexedConnection, asked: float, done: asyncio.Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None and link is self._link and link.up:
            _, epoch, size = facts_of(done.result())
            self.standing = PrimaryReport(asked, epoch, size)

    def _echoed(
        self,
        link: MultiplexedConnection,
        heartbeat: Heartbeat,
        started: asyncio.Future[None],
        done: asyncio.Future[Any],
    ) -> None:
        if done.cancelled() or link is not self._link or not link.up:
            return
        error = done.exception()
        known = error is None and done.result() == 1
        if not self.lease.live:
            heartbeat.interrupted()
        self.echo.reply(known)
        if self._sharded:
            self._listener.standing(self)
        if error is not None:
            word = first_word(error)
            if not started.done():
                started.set_exception(BusUnavailable(f"{self.primary.name}: cannot beat: {reason_of(error)}"))
            if word in _MOVED:
                self._listener.moved(self)
            elif word in _DEMOTED:
                link.abort("the server is a replica now")
        elif known:
            if not started.done():
                started.set_result(None)
        else:
            # Removed by a FLUSHALL, or by another node because this one sent no beat for long: until it is
            # back, a logout does not wait for this node.
            reason = "the registration was gone"
            seconds, ended = self._stall
            if seconds >= _REAPED_AFTER and asyncio.get_running_loop().time() - ended < _REAPED_AFTER:
                reason = f"the event loop stood still for {seconds:.0f} s"
                logger.warning(
                    "%s, so the other nodes removed this one as dead: registering again. Look for a blocking "
                    "call (asyncio's debug mode names slow callbacks), or a process that was suspended",
                    reason,
                )
            else:
                logger.warning("this node's registration was gone from Redis: registering again")
            link.abort(reason)
            self._registered = False

    def _pushed(self, link: MultiplexedConnection, kind: bytes, channel: bytes, payload: Any) -> None:
        name = channel.decode()
        if kind in (b"message", b"smessage"):
            self.received += 1
            try:
                self._listener.message(name, payload)
            except Exception:
                # It was not processed, and may have been an invalidation: that is a gap.
                logger.exception("a message of the bus could not be processed: connecting anew")
                link.abort("a message could not be processed")
            return
        if self._sent.pop(name, None) is None:
            return  # left already
        if not self._sharded:
            link.abort("the server ended a subscription")
            return
        # The slot has moved, and what is published there now does not arrive here.
        self._acked.discard(name)
        self._listener.gap(self, "a channel has moved", frozenset((name,)))
        self._listener.moved(self)
        # The slot may have come back here, or never have left: a MOVED in answer shows it.
        self._flush_soon(name)

    def __repr__(self) -> str:
        state = "connected" if self.connected else "down"
        return f"<Subscriber {self.primary.name} {state}, {len(self._wanted)} channels>"
