"""The bus on Redis Pub/Sub: what is received goes to the receiver, what is published goes over the command link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.registry import Registry
from asgi_cluster.backends.redis.subscriber import Subscriber
from asgi_cluster.backends.redis.topology import SingleServer
from asgi_cluster.bus.bus import BusStats, NodeInfo, Receiver
from asgi_cluster.bus.lease import Echo, Lease
from asgi_cluster.bus.messages import Ack, encode
from asgi_cluster.exceptions import BusUnavailable, NotStarted, StoreUnavailable
from asgi_cluster.ids import NodeId

__all__ = ["RedisBus"]


class RedisBus:
    """One subscriber for sessions and rooms; with a ``rooms`` server of their own, rooms get a second one.

    Two subscribers mean two connections, two echoes and two leases: a broadcast spike that costs the rooms their connection does
    not cost anybody a session.
    """

    def __init__(self, topology: SingleServer, names: Names, *, lease_duration: float) -> None:
        self._topology = topology
        self._names = names
        self._rooms_topology = topology
        self._rooms_names = names
        self._lease = Lease(lease_duration)
        self._rooms_lease = self._lease
        self._subscriber: Subscriber | None = None
        self._rooms_subscriber: Subscriber | None = None
        self._registry: Registry | None = None
        self._gaps = 0
        self._last_gap: str | None = None

    def use_rooms_server(self, topology: SingleServer, names: Names) -> None:
        """Rooms live on a server of their own."""
        self._rooms_topology = topology
        self._rooms_names = names
        self._rooms_lease = Lease(self._lease.duration)

    @property
    def _split(self) -> bool:
        return self._rooms_topology is not self._topology

    @asynccontextmanager
    async def opened(self, node: NodeId, receiver: Receiver) -> AsyncIterator[None]:
        """Registered and receiving while entered. Raises ``StoreUnavailable`` when a channel or a key is refused."""
        await self._probe_rights(node)
        registry = Registry(self._topology, self._names, node, receiver.load)
        fixed = [self._names.sessions_channel("00"), self._names.node_channel(node)]
        subscriber = self._make(self._topology, self._names, fixed, registry, self._lease, receiver, sessions=True)
        subscribers = [subscriber]
        if self._split:
            rooms_registry = Registry(self._rooms_topology, self._rooms_names, node, receiver.load)
            # A channel of its own keeps the subscribe-ack, and with it the echo, meaningful when there are no rooms yet.
            fixed = [self._rooms_names.node_channel(node)]
            subscribers.append(
                self._make(
                    self._rooms_topology, self._rooms_names, fixed, rooms_registry, self._rooms_lease, receiver
                )
            )
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            running = []
            try:
                for each in subscribers:
                    started: asyncio.Future[None] = loop.create_future()
                    running.append(tasks.create_task(each.run(started), name="asgi-cluster subscriber"))
                    try:
                        await started
                    except BusUnavailable as error:
                        reason = f"{self._topology.address.name}: cannot subscribe: {error.reason}"
                        raise StoreUnavailable(reason) from error
                running.append(tasks.create_task(registry.run(self._lease), name="asgi-cluster registry"))
                self._registry, self._subscriber, self._rooms_subscriber = registry, subscriber, subscribers[-1]
                yield
            finally:
                self._registry = self._subscriber = self._rooms_subscriber = None
                for task in running:
                    task.cancel()
                self._lease.revoke()
                self._rooms_lease.revoke()
                if self._topology.answering:
                    await registry.leave()

    def _make(
        self,
        topology: SingleServer,
        names: Names,
        fixed: list[str],
        registry: Registry,
        lease: Lease,
        receiver: Receiver,
        *,
        sessions: bool = False,
    ) -> Subscriber:
        carries_rooms = not (sessions and self._split)
        session_channels = frozenset(fixed)

        def message(channel: str, payload: bytes) -> None:
            if channel in session_channels:
                receiver.session_message(payload)
                return
            room = names.room_of_channel(channel)
            if room is not None:
                receiver.room_message(room, payload)

        def gap(reason: str, channels: frozenset[str] | None) -> None:
            self._gaps += 1
            self._last_gap = reason
            if sessions:
                receiver.gap(reason, None)
            if carries_rooms:
                receiver.rooms_gap(reason, None)

        def trusted() -> None:
            if carries_rooms:
                receiver.rooms_restored(None)

        return Subscriber(
            topology.subscriber_link,
            fixed=fixed,
            echo=Echo(lease),
            registry=registry,
            sharded=names.sharded,
            on_message=message,
            on_gap=gap,
            on_trusted=trusted,
        )

    async def _probe_rights(self, node: NodeId) -> None:
        # A right that is missing should stop the start, and not the first logout. An Ack that nobody waits for is harmless.
        harmless = encode(Ack("", node, 0))
        for topology, channel in (
            (self._topology, self._names.sessions_channel("00")),
            (self._topology, self._names.node_channel(node)),
            (self._rooms_topology, self._rooms_names.room_channel("")),
        ):
            try:
                await topology.call(channel, "PUBLISH", channel, harmless, timeout=1.0)
            except StoreUnavailable as error:
                raise StoreUnavailable(f"cannot publish to {channel}: {error.reason}") from error

    # The port

    def lease(self, bucket: int) -> Lease:
        """See ``Bus.lease``: one server, one lease."""
        return self._lease

    def room_lease(self, room: str) -> Lease:
        """See ``Bus.room_lease``."""
        return self._rooms_lease

    async def subscribe(self, room: str) -> None:
        """See ``Bus.subscribe``."""
        if self._rooms_subscriber is None:
            raise NotStarted("joining a room")
        await self._rooms_subscriber.subscribe(self._rooms_names.room_channel(room))

    def unsubscribe(self, room: str) -> None:
        """See ``Bus.unsubscribe``."""
        if self._rooms_subscriber is not None:
            self._rooms_subscriber.unsubscribe(self._rooms_names.room_channel(room))

    async def publish_room(self, room: str, payload: bytes, *, timeout: float) -> None:
        """See ``Bus.publish_room``."""
        await self._publish(self._rooms_topology, self._rooms_names.room_channel(room), payload, timeout)

    async def publish_bucket(self, bucket: int, payload: bytes, *, timeout: float) -> None:
        """See ``Bus.publish_bucket``."""
        await self._publish(self._topology, self._names.sessions_channel(f"{bucket:02x}"), payload, timeout)

    async def _publish(self, topology: SingleServer, channel: str, payload: bytes, timeout: float) -> None:
        try:
            await topology.call(channel, "PUBLISH", channel, payload, timeout=timeout)
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error

    def post(self, node: str, payload: bytes) -> None:
        """See ``Bus.post``."""
        channel = self._names.node_channel(node)
        self._topology.post(channel, "PUBLISH", channel, payload)

    async def nodes(self, *, timeout: float) -> Mapping[NodeId, NodeInfo]:
        """See ``Bus.nodes``."""
        registry = self._registry
        if registry is None:
            registry = Registry(self._topology, self._names, NodeId(""), lambda: (0, 0))
        return await registry.observe(None, timeout=timeout)

    def identity(self) -> tuple[str, str]:
        """This node's id and incarnation. Raises ``NotStarted`` when it is not registered."""
        if self._registry is None:
            raise NotStarted("entering a room")
        return self._registry.node, self._registry.incarnation

    @property
    def deaf(self) -> bool:
        """The store answers and the echo does not."""
        return self._subscriber is not None and not self._lease.live and self._topology.answering

    def stats(self) -> BusStats:
        """See ``BusStats``."""
        subscribers = {id(s): s for s in (self._subscriber, self._rooms_subscriber) if s is not None}.values()
        return BusStats(
            connected=bool(subscribers) and all(s.connected for s in subscribers),
            lease_remaining=min(self._lease.remaining, self._rooms_lease.remaining),
            gaps=self._gaps,
            reconnects=sum(max(0, s.connections - 1) for s in subscribers),
            received=sum(s.received for s in subscribers),
            malformed=0,
            last_gap=self._last_gap,
        )
