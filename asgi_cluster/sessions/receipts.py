"""Which nodes have acknowledged the end of a session, and the receipt for the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from asgi_cluster.ids import NodeId, new_token

__all__ = ["Acknowledgements", "LogoutReceipt", "PendingAck"]

_MOMENT = 0.1
"""Seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogoutReceipt:
    """What ending one or more sessions did, as far as nodes answered within the timeout.

    "Closed" means that the close was handed to the socket, not that the browser has seen it.
    """

    sessions: int
    """Sessions that existed and are gone from the store."""
    nodes_acked: Sequence[NodeId]
    """Nodes that serve none of them any more, and have closed their sockets."""
    nodes_missing: Sequence[NodeId]
    """Registered nodes that did not answer in time. They stop serving them when their lease lapses, or
    ``stale_for`` seconds after their last read with ``on_store_error="stale"``.
    """
    complete: bool
    """No node serves any of them any more: all acknowledged, or so much time has passed since that those
    missing cannot serve them any more (``NodeInfo.serves_for``, which takes a ``timeout`` of at least that).
    When all acknowledged, every socket is closed as well: of these sessions, and after a user's logout of
    whatever else acted as the user.
    """
    sockets_closed: int
    """Sockets closed on the nodes that acknowledged."""
    elapsed: float
    """Seconds from the call to the last acknowledgement, or to giving up."""
    replicas: int | None = None
    """Replicas that had the change, by ``WAIT``; ``None`` when that was not called for."""


class PendingAck:
    """One request that nodes acknowledge."""

    __slots__ = ("_changed", "acked", "id", "sockets")

    def __init__(self) -> None:
        self.id = new_token()
        self.acked: set[str] = set()
        self.sockets = 0
        self._changed: asyncio.Event | None = None

    def add(self, node: str, sockets: int) -> None:
        """A node has done it, and closed that many sockets that no other answer counts.

        The node that logs out may answer twice: when it has committed, and when its own message comes back
        over the bus. Whichever is the first closes the sockets.
        """
        self.sockets += sockets
        if node not in self.acked:
            self.acked.add(node)
            if self._changed is not None:
                self._changed.set()

    async def wait_for(self, nodes: Collection[str], *, timeout: float) -> bool:
        """Whether all of ``nodes`` have answered within ``timeout`` seconds."""
        wanted = set(nodes)
        if timeout <= 0:
            return wanted <= self.acked
        self._changed = asyncio.Event()
        try:
            async with asyncio.timeout(timeout):
                while not wanted <= self.acked:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


class Acknowledgements:
    """The requests of this node that are waiting for answers; bounded by the callers that wait."""

    def __init__(self) -> None:
        self._pending: dict[str, PendingAck] = {}
        self._silent: set[str] = set()

    @contextmanager
    def opened(self) -> Iterator[PendingAck]:
        """A request, which is sent inside so that no answer can be missed, and waited for inside."""
        pending = PendingAck()
        self._pending[pending.id] = pending
        try:
            yield pending
        finally:
            self._pending.pop(pending.id, None)

    def answer(self, request: str, node: str, sockets: int) -> None:
        """An answer came. One that comes too late only shows that its node answers again."""
        self._silent.discard(node)
        pending = self._pending.get(request)
        if pending is not None:
            pending.add(node, sockets)

    async def wait_for(self, pending: PendingAck, nodes: Collection[str], *, timeout: float) -> bool:
        """Whether all of ``nodes`` have answered within ``timeout`` seconds.

        A node that did not answer an earlier request in time, and has answered none since, is given a
        moment: a node that crashed would cost every logout the whole timeout until it is taken off the
        registry.
        """
        self._silent.intersection_update(nodes)  # bounded: those that are gone are dropped
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + timeout
        answering = set(nodes) - self._silent
        if await pending.wait_for(answering, timeout=timeout):
            left = give_up_at - clock()
            if await pending.wait_for(nodes, timeout=min(left, _MOMENT) if self._silent else left):
                return True
        if timeout > 0:
            self._silent.update(node for node in nodes if node not in pending.acked)
        return False
