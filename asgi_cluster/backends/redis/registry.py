"""Which nodes there are, and which have died.

A node's beat key carries no value: its *expiry time* is the beat. Every heartbeat pushes it into the future,
so if an observer sees no change of it for four seconds, while the observer's own lease was live without a
break, the server answered for four seconds and that node did not write. To go by the key's expiry itself
would remove running nodes after a stall. A node that may serve sessions for longer than that after its last
beat (its lease, and then ``stale_for``) says so in its entry, and is given that time: a logout does not wait
for a node that was removed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec
from redis.exceptions import ResponseError

from asgi_cluster.backends.redis.errors import NOT_EXECUTED, first_word
from asgi_cluster.backends.redis.listener import Command
from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.single import Topology
from asgi_cluster.bus.bus import NodeInfo
from asgi_cluster.bus.lease import Lease
from asgi_cluster.bus.messages import Ack, encode
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import NodeId, new_token

__all__ = ["BEAT_TTL", "InboxBeat", "Registry", "SideBeat"]

logger = logging.getLogger("asgi_cluster.registry")

BEAT_TTL = 300_000
"""Milliseconds a registration outlives its last beat: long, so that a stopped server does not expire the
living.
"""

_OBSERVE_EVERY = 1.0
_REFRESH_EVERY = 5.0
_DEAD_AFTER = 4.0
_SAME_MS = 5  # Redis 6.2 reads TIME and PTTL of one script a moment apart


class _Seen(msgspec.Struct):
    expiry: int
    since: float


class _Info(msgspec.Struct, array_like=True):
    started_at: float
    sockets: int
    rooms: int
    incarnation: str
    lease: float = -1.0
    """-1: not registered. That node is taken to be configured as the observer."""
    stale_for: float = 0.0


class Registry:
    """This node's entry, and its view of the others.

    The heartbeat of the subscriber at the primary that has the registry. ``lease`` and ``stale_for``: seconds
    for which this node may serve sessions from its cache after a beat; 0 when it carries none.
    """

    def __init__(
        self,
        topology: Topology,
        names: Names,
        node: NodeId,
        load_of: Callable[[], tuple[int, int]],
        *,
        lease: float,
        stale_for: float,
    ) -> None:
        self._topology = topology
        self._names = names
        self.node = node
        self._load_of = load_of
        self._lease = lease
        self._stale_for = stale_for
        self._started_at = time.time()
        self._seen: dict[str, _Seen] = {}
        self._written: bytes | None = None
        self._warned: set[str] = set()
        self.incarnation = new_token()
        self.on_dead: Callable[[str, str], None] | None = None
        """Called with the id and the incarnation of a node that this observer removed, and no other did."""

    # The heartbeat

    def registration(self) -> Command:
        """Enters this node under a new incarnation."""
        self.incarnation = new_token()
        script = load("node_register")
        keys = (self._names.nodes(), self._names.beat(self.node))
        return ("EVAL", script.source, 2, *keys, self.node, self._info(), BEAT_TTL)

    def beat(self) -> Command:
        """A write, because a read or a PUBLISH still succeeds on an isolated or read-only server, and a
        PEXPIRE, because it passes when memory is full. Answers 0 when the registration is gone.
        """
        return ("PEXPIRE", self._names.beat(self.node), BEAT_TTL)

    def interrupted(self) -> None:
        """Our lease had lapsed: a beat that did not move may have been unable to."""
        self._seen.clear()

    def _info(self) -> bytes:
        sockets, rooms = self._load_of()
        return msgspec.msgpack.encode(
            _Info(self._started_at, sockets, rooms, self.incarnation, self._lease, self._stale_for)
        )

    async def leave(self) -> None:
        """Take this node off, best effort."""
        keys = [self._names.nodes(), self._names.beat(self.node)]
        try:
            await self._topology.run(load("node_leave"), keys, [self.node], timeout=0.5)
        except StoreUnavailable as error:
            logger.info("node %s could not sign off: %s", self.node, error.reason)

    # Other nodes

    async def run(self, lease: Callable[[], Lease]) -> None:
        """Observe, and refresh this node's own entry, until cancelled.

        ``lease()`` is the lease of our own heartbeat.
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
                info = self._info()
                if loop.time() - refreshed_at >= _REFRESH_EVERY and info != self._written:
                    await self._topology.run(
                        load("node_refresh"), [self._names.nodes()], [self.node, info], timeout=1.0
                    )
                    self._written, refreshed_at = info, loop.time()
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
                *(self.node, error.reason),
            )
        else:
            logger.debug("the registry did not answer: %s", error.reason)

    async def observe(self, lease: Lease | None, *, timeout: float = 1.0) -> dict[NodeId, NodeInfo]:
        """All registered nodes; with a live ``lease``, those that have died are removed first.

        Raises ``StoreUnavailable``.
        """
        prefix = self._names.beat("")
        now_ms, rows = await self._topology.run(
            load("nodes_observe"), [self._names.nodes()], [prefix], timeout=timeout
        )
        found: dict[NodeId, NodeInfo] = {}
        for raw_id, raw_info, pttl in rows:
            node = NodeId(raw_id.decode("utf-8", "replace"))
            expiry = now_ms + pttl if pttl >= 0 else 0
            try:
                info = msgspec.msgpack.decode(raw_info, type=_Info)
            except (ValueError, RecursionError):
                info = _Info(0.0, 0, 0, "")
            if info.lease < 0:
                info.lease, info.stale_for = self._lease, self._stale_for
            if lease is not None and node != self.node and self._is_dead(node, expiry, lease, info):
                await self._reap(node, expiry, info.incarnation)
                continue
            found[node] = NodeInfo(
                id=node,
                started_at=info.started_at,
                sockets=info.sockets,
                rooms=info.rooms,
                lag=max(0, BEAT_TTL - pttl) / 1000,
                incarnation=info.incarnation,
                serves_for=max(info.lease, info.stale_for),
            )
        if lease is not None:
            self._seen = {node: seen for node, seen in self._seen.items() if node in found}
        return found

    def _is_dead(self, node: str, expiry: int, lease: Lease, info: _Info) -> bool:
        now = lease.clock()
        seen = self._seen.get(node)
        if seen is None or abs(seen.expiry - expiry) > _SAME_MS:
            self._seen[node] = _Seen(expiry, now)
            return False
        # What it read last was read under its lease, and may be served stale for that long after.
        last_service = max(info.lease + info.stale_for, self._lease + self._stale_for)
        return lease.live and now - seen.since >= max(_DEAD_AFTER, last_service)

    async def _reap(self, node: str, expiry: int, incarnation: str) -> None:
        keys = [self._names.nodes(), self._names.beat(node)]
        if await self._topology.run(load("node_reap"), keys, [node, expiry, _SAME_MS], timeout=1.0):
            logger.warning("node %s is dead: removed", node)
            if self.on_dead is not None:
                self.on_dead(node, incarnation)


class SideBeat:
    """The heartbeat at a primary of a Cluster that does not have the registry: a key of its own in a slot of
    that primary.
    """

    def __init__(self, names: Names, node: NodeId, tag: str) -> None:
        self._key = names.beat(node, tag)

    def registration(self) -> Command:
        """See ``Heartbeat.registration``."""
        return ("SET", self._key, "", "PX", BEAT_TTL)

    def beat(self) -> Command:
        """See ``Heartbeat.beat``."""
        return ("PEXPIRE", self._key, BEAT_TTL)

    def interrupted(self) -> None:
        """See ``Heartbeat.interrupted``: no node is observed here."""


class InboxBeat:
    """The heartbeat of a publisher, which is not registered and has nothing to cache: a message to its own
    inbox, which answers 1 while the inbox is subscribed. Writes no key.
    """

    def __init__(self, names: Names, node: NodeId) -> None:
        # An answer to no request is ignored by its receiver.
        self._command = (names.publish, names.node_channel(node), encode(Ack("", node, 0)))

    def registration(self) -> Command:
        """See ``Heartbeat.registration``: there is nothing to register."""
        return ("PING",)

    def beat(self) -> Command:
        """See ``Heartbeat.beat``."""
        return self._command

    def interrupted(self) -> None:
        """See ``Heartbeat.interrupted``: no node is observed here."""
