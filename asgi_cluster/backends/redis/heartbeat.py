"""Heartbeats on a subscriber's connection: each reply renews the lease, and the node's registration."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from asgi_cluster.backends.redis.connection import MultiplexedConnection
from asgi_cluster.backends.redis.errors import ConnectionBroken, first_word, reason_of
from asgi_cluster.backends.redis.listener import Heartbeat, Listener
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.quorum import PrimaryReport, QuorumHeartbeats
from asgi_cluster.backends.redis.reconnect import ReconnectLoop
from asgi_cluster.backends.redis.slots import facts_of
from asgi_cluster.backends.redis.subscriptions import MOVED
from asgi_cluster.bus.lease import Heartbeats, Lease

__all__ = ["HeartbeatLoop"]

logger = logging.getLogger("asgi_cluster.bus")

_BEAT_EVERY = 0.5
_DEAD_AFTER = 1.0
_LOOK_EVERY = 0.1
_REMOVED_AFTER = 3.5  # seconds without a heartbeat after which other nodes may have removed this one
_DEMOTED = frozenset(("READONLY", "MASTERDOWN"))


class HeartbeatLoop:
    """Sends heartbeats on the connection of one subscriber, and judges the replies.

    On a Redis Cluster a reply renews nothing before ``confirm``.
    """

    def __init__(
        self,
        primary: Primary,
        lease: Lease,
        listener: Listener,
        reconnecting: ReconnectLoop,
        *,
        sharded: bool,
    ) -> None:
        self.report: PrimaryReport | None = None
        """What a primary of a Cluster has reported last on this connection."""
        self._primary = primary
        self._lease = lease
        self._listener = listener
        self._reconnecting = reconnecting
        self._loop = asyncio.get_running_loop()
        self._quorum = QuorumHeartbeats(lease) if sharded else None
        self._beats: Heartbeats = self._quorum or Heartbeats(lease)
        self._registered = False
        self._blocked = (0.0, 0.0)  # how long the event loop was blocked, and until when

    async def register(self, connection: MultiplexedConnection) -> None:
        """Before the first lease: a logout waits for every registered node that serves from a cache."""
        # After a mere reconnect it is registered already: the incarnation stays, and with it the presence
        # entries.
        heartbeat = self._listener.heartbeat(self._primary)
        if not self._registered or await connection.send(*heartbeat.beat()) != 1:
            await connection.send(*heartbeat.registration())
            self._registered = True

    async def run(self, connection: MultiplexedConnection) -> None:
        """All subscriptions are acknowledged: heartbeats from now on count.

        Raises:
            ConnectionBroken: there was no reply in time.
        """
        self._beats.subscribed()
        next_beat = self._loop.time()
        while True:
            heartbeat = self._listener.heartbeat(self._primary)
            if self._quorum is not None:
                # Sent before the heartbeat: at the heartbeat its epoch was this one or a newer one.
                asked = self._lease.clock()
                connection.send("CLUSTER", "INFO").add_done_callback(
                    partial(self._reported, connection, asked)
                )
            self._beats.beat()
            connection.send(*heartbeat.beat()).add_done_callback(
                partial(self._replied, connection, heartbeat)
            )
            next_beat = max(next_beat + _BEAT_EVERY, self._loop.time())
            while (now := self._loop.time()) < next_beat:
                await asyncio.sleep(min(_LOOK_EVERY, next_beat - now))
                slept = self._loop.time() - now
                if slept > _BEAT_EVERY:
                    self._blocked = (slept, self._loop.time())
                    continue  # the reply may be waiting to be read
                since = self._beats.waiting_since
                if since is not None and self._lease.clock() - since > _DEAD_AFTER:
                    raise ConnectionBroken(f"no reply to a heartbeat for {_DEAD_AFTER:g} s")

    def lost(self) -> None:
        """The connection is gone: nothing that was sent on it proves anything."""
        self._beats.gap()
        self.report = None

    def confirm(self, moment: float) -> None:
        """At ``moment`` the primary had not been replaced."""
        if self._quorum is not None:
            self._quorum.confirm(moment)

    def _reported(self, connection: MultiplexedConnection, asked: float, done: asyncio.Future[Any]) -> None:
        if connection.up and not done.cancelled() and done.exception() is None:
            _, epoch, size = facts_of(done.result())
            self.report = PrimaryReport(asked, epoch, size)

    def _replied(
        self, connection: MultiplexedConnection, heartbeat: Heartbeat, done: asyncio.Future[Any]
    ) -> None:
        if done.cancelled() or not connection.up:
            return
        error = done.exception()
        known = error is None and done.result() == 1
        if not self._lease.live:
            heartbeat.interrupted()
        self._beats.reply(known)
        if self._quorum is not None:
            self._listener.reported()
        if error is not None:
            self._refused(connection, error)
        elif known:
            self._reconnecting.established()
        else:
            self._unregistered(connection)

    def _refused(self, connection: MultiplexedConnection, error: BaseException) -> None:
        self._reconnecting.refuse(f"a heartbeat was refused: {reason_of(error)}")
        word = first_word(error)
        if word in MOVED:
            self._listener.moved()
        elif word in _DEMOTED:
            connection.abort("the server is a replica now")

    def _unregistered(self, connection: MultiplexedConnection) -> None:
        # Removed by a FLUSHALL, or by another node because this one sent no heartbeat for long: until it
        # is registered again, a logout does not wait for this node.
        reason = "the registration was gone"
        seconds, ended = self._blocked
        if seconds >= _REMOVED_AFTER and self._loop.time() - ended < _REMOVED_AFTER:
            reason = f"the event loop stood still for {seconds:.0f} s"
            logger.warning(
                "%s, so the other nodes removed this one as dead: registering again. Look for a blocking "
                "call (asyncio's debug mode names slow callbacks), or a process that was suspended",
                reason,
            )
        else:
            logger.warning("this node's registration was gone from Redis: registering again")
        connection.abort(reason)
        self._registered = False
