"""Which nodes are registered.

A node's heartbeat key has no value: what counts is its *expiry time*, which every heartbeat moves on. The
entry of the node, a field of the hash of all nodes, says what the node carries and for how long it may
serve sessions after its last heartbeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.topology import Topology
from asgi_cluster.bus.stats import NodeInfo
from asgi_cluster.exceptions import NotStarted
from asgi_cluster.ids import NodeId

__all__ = ["BEAT_TTL", "Entry", "Listed", "Registry"]

BEAT_TTL = 300_000
"""Milliseconds by which a registration outlives its last heartbeat: long, so that running nodes do not expire
while the server is stopped.
"""


class Entry(msgspec.Struct, array_like=True):
    """What a node writes of itself."""

    started_at: float
    sockets: int
    rooms: int
    incarnation: str
    lease: float = -1.0
    """-1: not registered. That node is taken to be configured as the reader."""
    stale_for: float = 0.0


@dataclass(frozen=True, slots=True)
class Listed:
    """A node in the list, as it was read."""

    info: NodeInfo
    expiry: int
    """When its heartbeat key expires, by the server's clock in milliseconds; 0: it has none."""
    serves_after_beat: float
    """Seconds for which it may serve after its last heartbeat, what it serves stale included."""


class Registry:
    """The list of nodes at the servers of one topology.

    ``lease`` and ``stale_for``: seconds for which this node may serve sessions from its cache after a
    heartbeat; 0 where only rooms are, because no logout waits there.
    """

    def __init__(self, topology: Topology, names: Names, *, lease: float, stale_for: float) -> None:
        self.topology = topology
        self.names = names
        self.lease = lease
        self.stale_for = stale_for
        self._identity: tuple[NodeId, str] | None = None

    @property
    def incarnation(self) -> str:
        """Changes when this node had to register again; ``""`` while it is not registered."""
        return "" if self._identity is None else self._identity[1]

    def identity(self) -> tuple[NodeId, str]:
        """This node and its incarnation. Raises ``NotStarted``."""
        if self._identity is None:
            raise NotStarted("presence")
        return self._identity

    def identify(self, identity: tuple[NodeId, str] | None) -> None:
        """This node is registered as this; ``None``: not any more."""
        self._identity = identity

    async def nodes(self, *, timeout: float) -> dict[NodeId, NodeInfo]:
        """All registered nodes. Raises ``StoreUnavailable``."""
        return {each.info.id: each.info for each in await self.read(timeout=timeout)}

    async def read(self, *, timeout: float) -> list[Listed]:
        """All registered nodes, with their last heartbeats. Raises ``StoreUnavailable``."""
        now_ms, rows = await self.topology.run(
            load("nodes_observe"), [self.names.nodes()], [self.names.beat("")], timeout=timeout
        )
        return [self._listed(now_ms, *row) for row in rows]

    def _listed(self, now_ms: int, node: bytes, written: bytes, pttl: int) -> Listed:
        try:
            entry = msgspec.msgpack.decode(written, type=Entry)
        except (ValueError, RecursionError):
            entry = Entry(0.0, 0, 0, "")
        if entry.lease < 0:
            entry.lease, entry.stale_for = self.lease, self.stale_for
        info = NodeInfo(
            id=NodeId(node.decode("utf-8", "replace")),
            started_at=entry.started_at,
            sockets=entry.sockets,
            rooms=entry.rooms,
            lag=max(0, BEAT_TTL - pttl) / 1000,
            incarnation=entry.incarnation,
            serves_for=max(entry.lease, entry.stale_for),
        )
        return Listed(info, now_ms + pttl if pttl >= 0 else 0, entry.lease + entry.stale_for)
