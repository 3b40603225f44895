"""Where a publisher (``listen=False``) receives the answers to its logouts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from asgi_cluster.backends.redis.lifetime import background
from asgi_cluster.backends.redis.listener import Command, Heartbeat
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.backends.redis.topology import Topology
from asgi_cluster.bus.messages import Ack, encode
from asgi_cluster.bus.session_bus import SessionReceiver
from asgi_cluster.exceptions import BusUnavailable
from asgi_cluster.ids import NodeId
from asgi_cluster.node import Node

__all__ = ["Inbox"]

logger = logging.getLogger("asgi_cluster.bus")

_RETRY = 1.0


class Inbox:
    """Subscribed to the channel of one node, which is not registered, from the first ``reachable`` on."""

    def __init__(self, topology: Topology, names: Names, *, lease_duration: float) -> None:
        self._names = names
        self._subscribers = SubscriberSet(topology, lease_duration=lease_duration)
        self._wanted: asyncio.Event | None = None
        self._open = asyncio.Event()

    @asynccontextmanager
    async def opened(self, node: Node, receiver: SessionReceiver) -> AsyncIterator[None]:
        """Receives while entered."""
        self._wanted, self._open = asyncio.Event(), asyncio.Event()
        try:
            async with background(node.failing) as tasks:
                tasks.keep(partial(self._run, node, receiver, self._wanted), name="inbox")
                yield
        finally:
            self._wanted = None

    async def _run(self, node: Node, receiver: SessionReceiver, wanted: asyncio.Event) -> None:
        await wanted.wait()
        answers = _Answers(self._subscribers.topology, self._names, node.id, receiver)
        while True:
            try:
                async with self._subscribers.opened(answers, [(answers, [answers.channel])], node.failing):
                    self._open.set()
                    await asyncio.Event().wait()
            except BusUnavailable as error:
                logger.warning("this publisher cannot receive the answers to its logouts: %s", error.reason)
            finally:
                self._open.clear()
            await asyncio.sleep(_RETRY)

    async def reachable(self, *, timeout: float) -> None:
        if self._wanted is None:
            return  # this node listens: it is
        self._wanted.set()
        try:
            async with asyncio.timeout(timeout):
                await self._open.wait()
        except TimeoutError:
            return  # the receipt says that the nodes did not answer


class _Answers:
    """A publisher's own channel: its listener, and its heartbeat, which is a message to this channel. It
    answers 1 while the channel is subscribed. The publisher is not registered; no key is written.
    """

    def __init__(self, topology: Topology, names: Names, node: NodeId, receiver: SessionReceiver) -> None:
        self.channel = names.node_channel(node)
        self._topology = topology
        self._receiver = receiver
        # An answer to no request is ignored by its receiver.
        self._command = (names.publish, self.channel, encode(Ack("", node, 0)))

    def message(self, channel: str, payload: bytes) -> None:
        self._receiver.session_message(payload)

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        """See ``ChannelListener.gap``: the logout's receipt names the answers that did not come."""

    def restored(self, channels: frozenset[str]) -> None:
        pass

    def primaries(self) -> Sequence[Primary]:
        """See ``HeartbeatSource.primaries``: the one that has the channel."""
        home = self._topology.home(self.channel)
        return [] if home is None else [home]

    def heartbeat(self, primary: Primary) -> Heartbeat:
        return self

    def registration(self) -> Command:
        """See ``Heartbeat.registration``: there is nothing to register."""
        return ("PING",)

    def beat(self) -> Command:
        return self._command

    def interrupted(self) -> None:
        """See ``Heartbeat.interrupted``: no node is observed here."""
