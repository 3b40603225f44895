"""The session bus on Redis Pub/Sub: buckets are channels, and so is each node's inbox."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from asgi_cluster.backends.redis.inbox import Inbox
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.publishing import check_right, publish
from asgi_cluster.backends.redis.registry import Registry
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.messages import Ack, encode
from asgi_cluster.bus.session_bus import SUBSCRIBED_AGAIN, SessionReceiver
from asgi_cluster.bus.stats import NodeInfo
from asgi_cluster.ids import BUCKETS, NodeId

__all__ = ["RedisSessionBus"]


class RedisSessionBus:
    """``bus.session_bus.SessionBus``, and the listener of its channels. On a Redis Cluster each bucket has a
    channel; elsewhere all share one.
    """

    def __init__(self, subscribers: SubscriberSet, names: Names, registry: Registry, inbox: Inbox) -> None:
        self._subscribers = subscribers
        self._topology = subscribers.topology
        self._names = names
        self._registry = registry
        self._inbox = inbox
        self._receiver: SessionReceiver | None = None
        self._channels = [names.sessions_channel(f"{bucket:02x}") for bucket in range(BUCKETS)]
        self._buckets = {channel: bucket for bucket, channel in enumerate(self._channels)}

    # Lifetime

    def channels(self, node: NodeId) -> Sequence[str]:
        """What a node subscribes to."""
        return [*self._buckets, self._names.node_channel(node)]

    async def check_rights(self, node: NodeId) -> None:
        """Raises ``StoreUnavailable`` when a right to publish is missing."""
        harmless = encode(Ack("", node, 0))  # to no request
        topology, names = self._topology, self._names
        await check_right(topology, names, self._channels[0], harmless, "session messages")
        await check_right(topology, names, names.node_channel(node), harmless, "acknowledgements")

    @contextmanager
    def receiving(self, receiver: SessionReceiver) -> Iterator[None]:
        """``receiver`` gets what arrives while entered."""
        self._receiver = receiver
        try:
            yield
        finally:
            self._receiver = None

    # The port

    def lease(self, bucket: int) -> Lease:
        """See ``SessionBus.lease``."""
        return self._subscribers.lease(self._channels[bucket])

    def run_id(self, bucket: int) -> str:
        """See ``SessionBus.run_id``."""
        return self._subscribers.run_id(self._channels[bucket])

    async def publish(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        """See ``SessionBus.publish``."""
        await publish(self._topology, self._names, self._channels[bucket], payload, timeout)

    def post(self, node: str, payload: bytes) -> None:
        """See ``SessionBus.post``."""
        channel = self._names.node_channel(node)
        self._topology.post(channel, self._names.publish, channel, payload)

    async def reachable(self, *, timeout: float) -> None:
        """See ``SessionBus.reachable``."""
        await self._inbox.reachable(timeout=timeout)

    async def nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        """See ``SessionBus.nodes``."""
        return await self._registry.nodes(timeout=timeout)

    # Events of the channels

    def message(self, channel: str, payload: bytes) -> None:
        """See ``ChannelListener.message``."""
        if self._receiver is not None:
            self._receiver.session_message(payload)

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        """See ``ChannelListener.gap``."""
        buckets = frozenset(self._buckets[channel] for channel in channels if channel in self._buckets)
        if self._receiver is not None and buckets:
            self._receiver.sessions_gap(reason, buckets if self._names.sharded else None)

    def restored(self, channels: frozenset[str]) -> None:
        """See ``ChannelListener.restored``."""
        # What was read between the gap and now may have changed without a message: it must not be kept.
        self.gap(SUBSCRIBED_AGAIN, channels)
