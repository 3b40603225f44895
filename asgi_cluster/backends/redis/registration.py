"""This node's own place in the registry, and the removal of nodes that have died.

If the expiry time of a node's heartbeat key has not moved for four seconds, while the observer's own lease
was live without a break, the server answered for four seconds and that node did not write. To go by the
expiry itself would remove running nodes after a stall. A node that may serve sessions for longer than that
after its last heartbeat (its lease, and then ``stale_for``) has this time in its entry, and is removed only
after it: a logout does not wait for a node that was removed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
from redis.exceptions import ResponseError

from asgi_cluster.backends.redis.channels import Channels
from asgi_cluster.backends.redis.errors import NOT_EXECUTED, ConnectionBroken, first_word
from asgi_cluster.backends.redis.lifetime import background
from asgi_cluster.backends.redis.listener import Command, Heartbeat
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.primary import Primary
from asgi_cluster.backends.redis.registry import BEAT_TTL, Entry, Listed, Registry
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.subscribers import SubscriberSet
from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.stats import NodeInfo
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import NodeId, new_token
from asgi_cluster.node import Node

__all__ = ["Registration"]

logger = logging.getLogger("asgi_cluster.registry")

_OBSERVE_EVERY = 1.0
_REFRESH_EVERY = 5.0
_DEAD_AFTER = 4.0
_SAME_MS = 5  # Redis 6.2 reads TIME and PTTL of one script a moment apart


class _Seen(msgspec.Struct):
    expiry: int
    since: float


class Registration:
    """This node's entry, kept by the heartbeats of a ``SubscriberSet``, and its view of the others.

    ``load_of`` gives its sockets and rooms. ``removed`` is called with the id and the incarnation of a node
    that this one, and no other, has removed.
    """

    def __init__(
        self,
        registry: Registry,
        node: Node,
        load_of: Callable[[], tuple[int, int]],
        *,
        removed: Callable[[str, str], None] | None = None,
    ) -> None:
        self._registry = registry
        self._topology = registry.topology
        self._names = registry.names
        self._node = node.id
        self._failing = node.failing
        self._load_of = load_of
        self._removed = removed
        self._started_at = time.time()
        self._seen: dict[NodeId, _Seen] = {}
        self._written: bytes | None = None
        self._warned: set[str] = set()

    @asynccontextmanager
    async def opened(self, subscribers: SubscriberSet, channels: Channels) -> AsyncIterator[None]:
        """Registered, observing, and subscribed to ``channels`` while entered. Raises ``BusUnavailable``."""
        try:
            async with (
                subscribers.opened(self, channels, self._failing),
                background(self._failing) as tasks,
            ):
                lease = partial(subscribers.lease_of, self._names.nodes())
                tasks.keep(partial(self._run, lease), name="registry")
                yield
            # Only now: a heartbeat of this node must not find the registration gone and renew it.
            if self._topology.answering:
                await self._leave()
        finally:
            self._registry.identify(None)

    # The heartbeat

    def primaries(self) -> Sequence[Primary]:
        """See ``HeartbeatSource.primaries``: each has a lease of its own."""
        return self._topology.primaries()

    def heartbeat(self, primary: Primary) -> Heartbeat:
        if self._topology.home(self._names.nodes()) is primary:
            return self
        tag = self._topology.tag_at(primary)
        if tag is None:
            raise ConnectionBroken("this primary has no slots", sent=False)
        return _SideBeat(self._names, self._node, tag)

    def registration(self) -> Command:
        """Enters this node under a new incarnation."""
        self._registry.identify((self._node, new_token()))
        script = load("node_register")
        keys = (self._names.nodes(), self._names.beat(self._node))
        return ("EVAL", script.source, 2, *keys, self._node, self._entry(), BEAT_TTL)

    def beat(self) -> Command:
        """A write, because a read or a PUBLISH still succeeds on an isolated or read-only server, and a
        PEXPIRE, because it passes when memory is full. Answers 0 when the registration is gone.
        """
        return ("PEXPIRE", self._names.beat(self._node), BEAT_TTL)

    def interrupted(self) -> None:
        """This node's lease had lapsed: an expiry time that did not move may not have been able to."""
        self._seen.clear()

    def _entry(self) -> bytes:
        registry = self._registry
        sockets, rooms = self._load_of()
        return msgspec.msgpack.encode(
            Entry(self._started_at, sockets, rooms, registry.incarnation, registry.lease, registry.stale_for)
        )

    async def _leave(self) -> None:
        keys = [self._names.nodes(), self._names.beat(self._node)]
        try:
            await self._topology.run(load("node_leave"), keys, [self._node], timeout=0.5)
        except StoreUnavailable as error:
            logger.info("node %s could not sign off: %s", self._node, error.reason)

    # Other nodes

    async def _run(self, lease: Callable[[], Lease]) -> None:
        """Observe, and refresh this node's own entry, until cancelled.

        ``lease()`` is the lease of this node's own heartbeat.
        """
        loop = asyncio.get_running_loop()
        refreshed_at = loop.time()
        while True:
            await asyncio.sleep(_OBSERVE_EVERY)
            if not lease().live:
                self.interrupted()
                continue
            try:
                await self.observe(lease())
                entry = self._entry()
                if loop.time() - refreshed_at >= _REFRESH_EVERY and entry != self._written:
                    await self._topology.run(
                        load("node_refresh"), [self._names.nodes()], [self._node, entry], timeout=1.0
                    )
                    self._written, refreshed_at = entry, loop.time()
            except StoreUnavailable as error:
                self._log_failure(error)
                self.interrupted()

    def _log_failure(self, error: StoreUnavailable) -> None:
        cause = error.__cause__
        refused = isinstance(cause, ResponseError) and first_word(cause) not in NOT_EXECUTED
        if refused and error.reason not in self._warned:
            self._warned.add(error.reason)
            logger.warning(
                "node %s cannot observe other nodes or refresh its entry in the registry: %s. Check the "
                "rights of the Redis user (docs/security.md) and maxmemory",
                *(self._node, error.reason),
            )
        else:
            logger.debug("the registry did not answer: %s", error.reason)

    async def observe(self, lease: Lease) -> dict[NodeId, NodeInfo]:
        """All registered nodes; those that have died are removed first. Raises ``StoreUnavailable``."""
        found: dict[NodeId, NodeInfo] = {}
        for each in await self._registry.read(timeout=1.0):
            if each.info.id != self._node and self._is_dead(each, lease):
                await self._remove(each)
            else:
                found[each.info.id] = each.info
        self._seen = {node: seen for node, seen in self._seen.items() if node in found}
        return found

    def _is_dead(self, other: Listed, lease: Lease) -> bool:
        now = lease.clock()
        seen = self._seen.get(other.info.id)
        if seen is None or abs(seen.expiry - other.expiry) > _SAME_MS:
            self._seen[other.info.id] = _Seen(other.expiry, now)
            return False
        # What it read last was read under its lease, and may be served stale for that long after.
        own = self._registry.lease + self._registry.stale_for
        return lease.live and now - seen.since >= max(_DEAD_AFTER, other.serves_after_beat, own)

    async def _remove(self, other: Listed) -> None:
        node = other.info.id
        keys = [self._names.nodes(), self._names.beat(node)]
        if await self._topology.run(load("node_reap"), keys, [node, other.expiry, _SAME_MS], timeout=1.0):
            logger.warning("node %s is dead: removed", node)
            if self._removed is not None:
                self._removed(node, other.info.incarnation)


class _SideBeat:
    """The heartbeat at a primary of a Cluster that does not have the registry: a key of its own in a slot of
    that primary.
    """

    def __init__(self, names: Names, node: NodeId, tag: str) -> None:
        self._key = names.beat(node, tag)

    def registration(self) -> Command:
        return ("SET", self._key, "", "PX", BEAT_TTL)

    def beat(self) -> Command:
        return ("PEXPIRE", self._key, BEAT_TTL)

    def interrupted(self) -> None:
        """See ``Heartbeat.interrupted``: no node is observed here."""
