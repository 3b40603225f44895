"""Ending sessions on every node: committed by the store, acknowledged by the nodes, kept as tombstones."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from time import monotonic
from typing import Protocol

from asgi_cluster.bus.messages import Ended, UserEnded, encode
from asgi_cluster.bus.session_bus import SessionBus
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, NodeId, UserId, bucket_of
from asgi_cluster.node import Node
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.config import SessionConfig
from asgi_cluster.sessions.deadline import Deadline
from asgi_cluster.sessions.receipts import Acknowledgements, LogoutReceipt, PendingAck
from asgi_cluster.sessions.store import UNKNOWN_NODES, EndResult, SessionStore
from asgi_cluster.sessions.tombstones import Tombstones

__all__ = ["ConcurrentWrite", "LocalSockets", "Logouts"]

logger = logging.getLogger("asgi_cluster.sessions")


class LocalSockets(Protocol):
    """This node's sockets, as far as logouts are concerned."""

    def close_session(self, handle: str, code: int, reason: str) -> int:
        """Close the sockets of a session; how many there were."""
        ...

    def end_user(self, user: str, *, keep: str | None, ended: Container[str], code: int, reason: str) -> int:
        """Close the sockets of a user whose sessions ``ended`` are over, but those of the session ``keep``;
        how many there were.
        """
        ...

    async def failed_closes(self, since: float) -> int:
        """How many closes, begun and counted, the server has refused after ``since`` (``time.monotonic``)."""
        ...


class ConcurrentWrite(Exception):
    """A session was written since it was read, and has not been ended.

    ``write_id`` and ``fields`` are what it has now.
    """

    def __init__(self, write_id: str, fields: Mapping[str, bytes]) -> None:
        self.write_id = write_id
        self.fields = fields
        super().__init__(write_id)


class Logouts:
    """Shared by all sessions of one cluster object."""

    def __init__(
        self,
        store: SessionStore,
        cache: SessionCache,
        config: SessionConfig,
        *,
        node: Node,
        bus: SessionBus,
        sockets: LocalSockets,
    ) -> None:
        self.acks = Acknowledgements()
        self.tombstones = Tombstones(store, self._end_again, deadline=node.deadline, clock=node.clock)
        self.store = store
        self._cache = cache
        self._serves_for = config.serves_for
        self._node = node
        self._bus = bus
        self._sockets = sockets

    async def end(
        self,
        handle: Handle,
        *,
        code: int,
        reason: str,
        timeout: float,
        deadline: Deadline | None = None,
        expected: str | None = None,
    ) -> LogoutReceipt:
        """End one session everywhere; returns when every node has acknowledged, or after ``timeout`` seconds.
        0: when it is committed and published; nothing is waited for. With ``expected``, the write id that was
        read, only if nothing was written since.

        Raises:
            StoreUnavailable: not stored (or ``outcome_unknown``); the session goes on.
            ConcurrentWrite: something was written since; the session goes on.
        """
        began = monotonic()
        await self._before(timeout)
        with self.acks.opened() as pending:
            message = encode(Ended(handle, code, reason, self._node.id, pending.id))
            # Read before: whatever the server is replaced with afterwards, that is then another one.
            run_id = self.store.run_id(int(handle[:2], 16))
            with (deadline or self._deadline()).spending() as left, self._cache.changing(handle):
                result = await self.store.end(handle, message=message, expected=expected, timeout=left)
            if result.overtaken:
                raise ConcurrentWrite(result.overtaken, result.fields)
            self._remember([handle], run_id)
            closed = self._sockets.close_session(handle, code, reason)
            return await self._receipt(result, pending, closed, began, timeout)

    async def end_all(
        self, user: UserId, *, keep: Handle | None, code: int, reason: str, timeout: float
    ) -> LogoutReceipt:
        """End every session of a user but ``keep``. Returns and raises as ``end``."""
        began = monotonic()
        await self._before(timeout)
        with self.acks.opened() as pending:
            message = encode(UserEnded(user, keep, code, reason, self._node.id, pending.id))
            run_id = self.store.run_id(bucket_of(user))
            with self._deadline().spending() as left, self._cache.changing_user(user, keep=keep):
                result = await self.store.end_all(
                    user, keep=keep, epoch=pending.id, message=message, timeout=left
                )
            self._remember(result.handles, run_id)
            ended = frozenset(result.handles)
            closed = self._sockets.end_user(user, keep=keep, ended=ended, code=code, reason=reason)
            return await self._receipt(result, pending, closed, began, timeout)

    def was_ended(self, handle: Handle, reason: str, run_id: str | None) -> None:
        """A write has ended a session on the server ``run_id``, as it was read before the write: do what
        ``end`` does on this node.
        """
        self._remember([handle], run_id)
        self._sockets.close_session(handle, CloseCode.SESSION_ENDED, reason)

    async def discard(self, handle: Handle, deadline: Deadline) -> None:
        """End a session that was created, or may have been, and whose secret no client gets: at once if the
        store takes it within ``deadline``, else as soon as it answers.
        """
        self.tombstones.end_later(handle)
        run_id = self.store.run_id(int(handle[:2], 16))
        message = encode(Ended(handle, CloseCode.SESSION_ENDED, "session ended", self._node.id))
        try:
            with deadline.spending() as left, self._cache.changing(handle):
                await self.store.end(handle, message=message, timeout=left)
        except StoreUnavailable as error:
            logger.info("a session that no client has is ended later: %s", error.reason)
        else:
            self._remember([handle], run_id)

    async def _end_again(self, handle: Handle) -> None:
        message = encode(Ended(handle, CloseCode.SESSION_ENDED, "session ended", ""))
        with self._cache.changing(handle):
            await self.store.end(handle, message=message, timeout=self._node.deadline)
        self._sockets.close_session(handle, CloseCode.SESSION_ENDED, "session ended")

    def _remember(self, handles: Iterable[Handle], run_id: str | None) -> None:
        for handle in handles:
            self.tombstones.remember(handle, "?" if run_id is None else run_id)

    async def _before(self, timeout: float) -> None:
        self._node.ensure_started("logging out")
        if timeout > 0:
            await self._bus.reachable(timeout=min(timeout, self._node.deadline) / 2)

    def _deadline(self) -> Deadline:
        return Deadline(self._node.deadline, self._node.clock)

    async def _receipt(
        self, result: EndResult, pending: PendingAck, closed_here: int, began: float, timeout: float
    ) -> LogoutReceipt:
        """Wait for the acknowledgements of a logout that is committed."""
        clock = asyncio.get_running_loop().time
        committed = clock()
        if self._node.listens:
            # This node does not wait for its own message: its bus may be the one that is down.
            pending.add(self._node.id, closed_here)
        serves_for = self._serves_for
        complete = await self.acks.wait_for(pending, result.nodes, timeout=min(timeout, serves_for))
        if not complete and timeout >= serves_for:
            # The caller waits for so long that time alone may do it: when those missing cannot serve any
            # more.
            serves_for = await self._longest_service(
                [node for node in result.nodes if node not in pending.acked]
            )
            # The clocks of some loops have whole milliseconds, and their timers may come early by one.
            over = committed + serves_for
            while not complete and (rest := committed + min(timeout, serves_for) - clock()) > 0:
                complete = await pending.wait_for(result.nodes, timeout=max(rest, 0.001))
            complete = complete or clock() >= over
        elapsed = monotonic() - began
        if pending.sockets:
            pending.sockets = max(0, pending.sockets - await self._sockets.failed_closes(began))
        missing = [NodeId(node) for node in result.nodes if node not in pending.acked]
        if missing and timeout > 0:
            logger.warning(
                "%d of %d nodes did not acknowledge a logout in time", len(missing), len(result.nodes)
            )
        return LogoutReceipt(
            sessions=result.sessions,
            nodes_acked=tuple(sorted(NodeId(node) for node in pending.acked)),
            nodes_missing=tuple(missing),
            complete=complete,
            sockets_closed=pending.sockets,
            elapsed=elapsed,
            replicas=result.replicas,
        )

    async def _longest_service(self, missing: Sequence[str]) -> float:
        """Seconds after which none of these nodes serves a session whose end it has not received."""
        try:
            nodes = await self._bus.nodes(timeout=self._node.deadline)
        except StoreUnavailable:
            return math.inf
        known = [
            info.serves_for for node, info in nodes.items() if node in missing or UNKNOWN_NODES in missing
        ]
        return max(self._serves_for, *known, 0.0)
