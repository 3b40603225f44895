"""The bus on Redis Pub/Sub: what is received goes to the receiver, what is published goes over the command
links.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from asgi_cluster.backends.redis.lifetime import background
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.registry import Registry
from asgi_cluster.backends.redis.single import Topology
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.bus.bus import BusStats, NodeInfo, Receiver
from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.messages import Ack, encode
from asgi_cluster.exceptions import BusUnavailable, NotStarted, StoreUnavailable
from asgi_cluster.ids import NodeId
from asgi_cluster.tasks import Failing

__all__ = ["RedisBus"]

logger = logging.getLogger("asgi_cluster.bus")

_INBOX_RETRY = 1.0


class RedisBus:
    """One feed for sessions and rooms; rooms get a feed of their own when they live on servers of their own.

    Two feeds mean two sets of connections, echoes and leases: a broadcast spike that costs the rooms their
    connection costs no session.
    """

    def __init__(
        self,
        topology: Topology,
        names: Names,
        *,
        lease_duration: float,
        stale_for: float = 0.0,
        rooms: tuple[Topology, Names] | None = None,
    ) -> None:
        self._sessions = SubscriberSet(
            topology,
            names,
            lease_duration=lease_duration,
            sessions=True,
            rooms=rooms is None,
            stale_for=stale_for,
        )
        self._rooms = self._sessions
        if rooms is not None:
            self._rooms = SubscriberSet(*rooms, lease_duration=lease_duration, sessions=False, rooms=True)
        self._feeds = [self._sessions] if rooms is None else [self._sessions, self._rooms]
        self._inbox = SubscriberSet(
            topology, names, lease_duration=lease_duration, sessions=False, rooms=False
        )
        self._inbox_wanted: asyncio.Event | None = None
        self._inbox_open = asyncio.Event()
        self._node: NodeId | None = None
        self._listening = False
        self.on_dead: Callable[[str, str], None] | None = None
        """Called with id and incarnation of a dead node that this one has removed: its presence is to be
        removed too.
        """

    @asynccontextmanager
    async def opened(
        self, node: NodeId, receiver: Receiver, failing: Failing | None = None
    ) -> AsyncIterator[None]:
        """Registered and receiving while entered.

        Raises ``StoreUnavailable`` when a channel or a key is refused.
        """
        self._node = node
        await self._probe_rights(node)
        async with AsyncExitStack() as stack:
            for feed in self._feeds:
                try:
                    await stack.enter_async_context(feed.opened(node, receiver, failing))
                except BusUnavailable as error:
                    raise StoreUnavailable(error.reason) from error
            registry = self._registry(self._rooms)
            registry.on_dead = self._died
            self._listening = True
            try:
                yield
            finally:
                self._listening = False

    @asynccontextmanager
    async def publishing(
        self, node: NodeId, receiver: Receiver, failing: Failing | None = None
    ) -> AsyncIterator[None]:
        """Not registered. Receives what is posted to ``node``, from the first ``reachable`` on."""
        self._node = node
        self._inbox_wanted, self._inbox_open = asyncio.Event(), asyncio.Event()
        try:
            async with background(failing) as tasks:
                keep = partial(self._keep_inbox, node, receiver, self._inbox_wanted, failing)
                tasks.keep(keep, name="inbox")
                yield
        finally:
            self._inbox_wanted = None

    async def _keep_inbox(
        self, node: NodeId, receiver: Receiver, wanted: asyncio.Event, failing: Failing | None
    ) -> None:
        await wanted.wait()
        while True:
            try:
                async with self._inbox.opened(node, receiver, failing):
                    self._inbox_open.set()
                    await asyncio.Event().wait()
            except BusUnavailable as error:
                logger.warning("this publisher cannot receive the answers to its logouts: %s", error.reason)
            finally:
                self._inbox_open.clear()
            await asyncio.sleep(_INBOX_RETRY)

    def _died(self, node: str, incarnation: str) -> None:
        if self.on_dead is not None:
            self.on_dead(node, incarnation)

    async def _probe_rights(self, node: NodeId) -> None:
        # A right that is missing should stop the start, and not the first logout. An Ack to no request
        # is harmless, and no room has an empty name.
        harmless = encode(Ack("", node, 0))
        sessions, rooms = self._sessions, self._rooms
        for feed, channel, what in (
            (sessions, sessions.names.sessions_channel("00"), "session messages"),
            (sessions, sessions.names.node_channel(node), "acknowledgements"),
            (rooms, rooms.names.room_channel(""), "room messages"),
        ):
            try:
                await self._publish(feed, channel, harmless, 1.0)
            except BusUnavailable as error:
                raise StoreUnavailable(f"cannot publish {what}: {error.reason}") from error

    # The port

    def lease(self, bucket: int) -> Lease:
        """See ``Bus.lease``."""
        return self._sessions.lease(self._sessions.names.sessions_channel(f"{bucket:02x}"))

    def run_id(self, bucket: int) -> str:
        """See ``Bus.run_id``."""
        return self._sessions.run_id(self._sessions.names.sessions_channel(f"{bucket:02x}"))

    def room_lease(self, room: str) -> Lease:
        """See ``Bus.room_lease``."""
        return self._rooms.lease(self._rooms.names.room_channel(room))

    async def subscribe(self, room: str) -> None:
        """See ``Bus.subscribe``."""
        await self._rooms.subscribe(room)

    def unsubscribe(self, room: str) -> None:
        """See ``Bus.unsubscribe``."""
        self._rooms.unsubscribe(room)

    async def publish_room(self, room: str, payload: bytes, *, timeout: float) -> None:
        """See ``Bus.publish_room``."""
        await self._publish(self._rooms, self._rooms.names.room_channel(room), payload, timeout)

    async def publish_bucket(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        """See ``Bus.publish_bucket``."""
        channel = self._sessions.names.sessions_channel(f"{bucket:02x}")
        await self._publish(self._sessions, channel, payload, timeout)

    async def _publish(self, feed: SubscriberSet, channel: str, payload: bytes, timeout: float) -> None:
        try:
            await feed.topology.call(channel, feed.names.publish, channel, payload, timeout=timeout)
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error

    def post(self, node: str, payload: bytes) -> None:
        """See ``Bus.post``."""
        names = self._sessions.names
        channel = names.node_channel(node)
        self._sessions.topology.post(channel, names.publish, channel, payload)

    async def reachable(self, *, timeout: float) -> None:
        """See ``Bus.reachable``."""
        if self._inbox_wanted is None:
            return
        self._inbox_wanted.set()
        try:
            async with asyncio.timeout(timeout):
                await self._inbox_open.wait()
        except TimeoutError:
            return  # the receipt says that the nodes did not answer

    async def nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        """See ``Bus.nodes``."""
        return await self._registry(self._sessions).observe(None, timeout=timeout)

    def _registry(self, feed: SubscriberSet) -> Registry:
        # A publisher that does not listen is not registered, and may look all the same.
        return feed.registry or feed.registry_for(self._node or NodeId(""), lambda: (0, 0))

    @property
    def incarnation(self) -> str:
        """See ``Bus.incarnation``."""
        registry = self._rooms.registry
        return "" if registry is None else registry.incarnation

    # For presence, which is stored with the rooms

    def identity(self) -> tuple[NodeId, str]:
        """This node and its incarnation. Raises ``NotStarted``."""
        registry = self._rooms.registry
        if registry is None:
            raise NotStarted("presence")
        return registry.node, registry.incarnation

    async def room_nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        """The nodes that are registered where the rooms are. Raises ``StoreUnavailable``."""
        return await self._registry(self._rooms).observe(None, timeout=timeout)

    # Figures

    @property
    def receiving_nothing(self) -> bool:
        """The store answers and the echo does not."""
        return self._listening and not self._sessions.trusted and self._sessions.topology.answering

    def stats(self) -> BusStats:
        """See ``Bus.stats``."""
        last = max((feed.last_gap for feed in self._feeds if feed.last_gap is not None), default=None)
        return BusStats(
            connected=all(feed.connected for feed in self._feeds),
            lease_remaining=self._sessions.lease_remaining,
            gaps=sum(feed.gaps for feed in self._feeds),
            reconnects=sum(feed.reconnects for feed in self._feeds),
            received=sum(feed.received for feed in self._feeds),
            malformed=0,
            last_gap=None if last is None else last[1],
        )
