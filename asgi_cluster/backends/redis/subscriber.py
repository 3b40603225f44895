"""The subscriber: one connection that receives every message, and proves with each heartbeat that none was
missed.

The order is what counts. Subscriptions first: a heartbeat that was sent before the last of them was
acknowledged proves nothing. A push is handled when it is read, before any later reply is looked at. After a
gap the lease is revoked first, then the listener is called.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from asgi_cluster.backends.redis.connection import MultiplexedConnection
from asgi_cluster.backends.redis.errors import reason_of
from asgi_cluster.backends.redis.heartbeat import HeartbeatLoop
from asgi_cluster.backends.redis.listener import Listener
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.reconnect import ReconnectLoop
from asgi_cluster.backends.redis.replies import Refusals
from asgi_cluster.backends.redis.subscriptions import (
    Acknowledged,
    Action,
    Answer,
    Gap,
    GiveUp,
    Refuse,
    Retry,
    Subscribe,
    Subscriptions,
    Unsubscribe,
)
from asgi_cluster.bus.lease import Lease
from asgi_cluster.exceptions import BusUnavailable

__all__ = ["Subscriber"]

logger = logging.getLogger("asgi_cluster.bus")

_SETUP = 2.0
_RETRY_MOVED = 0.1
_UNKNOWN = "?"


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
        self._listener = listener
        self._prefix = "S" if sharded else ""
        self._loop = asyncio.get_running_loop()
        self._subscriptions = Subscriptions(sharded=sharded, vital=vital)
        self._callers: dict[str, asyncio.Future[None]] = {}
        self._unanswered: set[asyncio.Future[Refusals]] = set()
        self._connection: MultiplexedConnection | None = None
        self._flushing = False
        self.reconnecting = ReconnectLoop(
            lambda: primary.dial(self._pushed),
            self._use,
            self._lost,
            refused=lambda reason: BusUnavailable(f"{primary.name}: cannot subscribe: {reason}"),
        )
        """To run in a task. It has started with the first answer to a heartbeat."""
        self.heartbeats = HeartbeatLoop(primary, lease, listener, self.reconnecting, sharded=sharded)
        self.received = 0
        self.connections = 0
        self.run_id = _UNKNOWN
        """Of the server at the other end, or the last one."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands and was subscribed to all that was wanted then."""
        return self._subscriptions.established

    def is_subscribed(self, channel: str) -> bool:
        """Whether the subscription to ``channel`` stands."""
        return self._subscriptions.acknowledged(channel)

    # Subscriptions

    def want(self, channel: str) -> None:
        """Subscribe, without waiting."""
        self._subscriptions.want(channel)
        self._flush_soon()

    async def subscribe(self, channel: str) -> None:
        """Returns when the server has acknowledged; at once while the connection is down: then it is among
        the first to be sent.

        Raises:
            BusUnavailable: the server refused.
        """
        self.want(channel)
        if self._subscriptions.wait(channel):
            caller = self._callers.get(channel)
            if caller is None:
                caller = self._callers[channel] = self._loop.create_future()
            await asyncio.shield(caller)

    def unsubscribe(self, channel: str) -> None:
        """No more of it."""
        self._subscriptions.drop(channel)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._subscriptions.changed and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        connection = self._connection
        if connection is not None and connection.up:  # else a gap follows: then all is subscribed anew
            self._perform(connection, self._subscriptions.flush())

    def _perform(self, connection: MultiplexedConnection, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Subscribe(commands):
                    answer = connection.subscribe(f"{self._prefix}SUBSCRIBE", commands)
                    self._unanswered.add(answer)
                    answer.add_done_callback(partial(self._answered, connection, action))
                case Unsubscribe(commands):
                    connection.subscribe(f"{self._prefix}UNSUBSCRIBE", commands)
                case GiveUp(reason):
                    connection.abort(reason if isinstance(reason, str) else reason_of(reason))
                case Retry(channels):
                    self._loop.call_later(_RETRY_MOVED, self._retry, channels)
                case _:
                    self._report(action)
        self._flush_soon()

    def _report(self, action: Action) -> None:
        match action:
            case Acknowledged(channels):
                self._listener.acknowledged(self.primary, channels)
            case Gap(channels, reason):
                self._listener.gap(reason, channels)
            case Answer(channels):
                for channel in channels:
                    caller = self._callers.pop(channel)
                    if not caller.done():
                        caller.set_result(None)
            case Refuse(channel, error):
                logger.error("subscribing to the channel %s was refused: %s", channel, reason_of(error))
                refused = self._callers.pop(channel, None)
                if refused is not None and not refused.done():
                    refused.set_exception(BusUnavailable(reason_of(error)))
                    refused.exception()

    def _answered(
        self, connection: MultiplexedConnection, sent: Subscribe, answer: asyncio.Future[Refusals]
    ) -> None:
        self._unanswered.discard(answer)
        if answer.cancelled() or answer.exception() is not None or not connection.up:
            return  # lost with the connection
        self._perform(connection, self._subscriptions.answered(sent, answer.result()))

    def _retry(self, channels: frozenset[str]) -> None:
        self._subscriptions.retry(channels)
        self._flush_soon()

    # The connection

    async def _use(self, connection: MultiplexedConnection) -> None:
        self._connection = connection
        async with asyncio.timeout(_SETUP):
            self.run_id = await self.primary.check_server(connection) or _UNKNOWN
            await self.heartbeats.register(connection)
            self._perform(connection, self._subscriptions.opened())
            while self._unanswered:
                await asyncio.gather(*self._unanswered)
        connection.check()
        self.connections += 1
        self._perform(connection, self._subscriptions.establish())
        await self.heartbeats.run(connection)

    def _lost(self, error: Exception | None) -> None:
        self._connection = None
        self._unanswered.clear()
        self.heartbeats.lost()
        for action in self._subscriptions.lost(None if error is None else reason_of(error)):
            self._report(action)

    def _pushed(self, kind: bytes, channel: bytes, payload: Any) -> None:
        connection = self._connection
        assert connection is not None
        name = channel.decode()
        if kind not in (b"message", b"smessage"):
            self._perform(connection, self._subscriptions.ended(name))
            return
        self.received += 1
        try:
            self._listener.message(name, payload)
        except Exception:
            # It was not processed, and may have been an invalidation: that is a gap.
            logger.exception("a message of the bus could not be processed: connecting anew")
            connection.abort("a message could not be processed")

    def __repr__(self) -> str:
        state = "connected" if self.connected else "down"
        return f"<Subscriber {self.primary.name} {state}, {len(self._subscriptions)} channels>"
