"""What a session needs of its cluster, in one place: the store, and the messages that go over the bus."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from time import monotonic
from typing import Protocol, TypeVar

from asgi_cluster.bus.messages import Changed, Ended, UserEnded, encode
from asgi_cluster.bus.session_bus import SessionBus
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, NodeId, UserId, bucket_of
from asgi_cluster.node import Node
from asgi_cluster.sessions.config import SessionConfig
from asgi_cluster.sessions.cookies import Cookie
from asgi_cluster.sessions.ended import SessionEnded
from asgi_cluster.sessions.reads import CachedStore
from asgi_cluster.sessions.receipts import Acknowledgements, LogoutReceipt, PendingAck
from asgi_cluster.sessions.store import UNKNOWN_NODES, EndResult, Record
from asgi_cluster.sessions.tombstones import Tombstones

__all__ = ["LocalSockets", "Overtaken", "SessionService"]

logger = logging.getLogger("asgi_cluster.sessions")

T = TypeVar("T")

_LONGEST_ROLLING = 365 * 86400.0
"""Seconds: a cookie that was stolen is not renewed for ever."""


class LocalSockets(Protocol):
    """This node's sockets, as far as sessions are concerned."""

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

    def watch(self, watcher: SessionEnded) -> None:
        """Let it end with its session, as the session's sockets do."""
        ...

    def unwatch(self, watcher: SessionEnded) -> None:
        """No more of that. Harmless when it was never watched."""
        ...


class Overtaken(Exception):
    """A session was written since it was read, and has not been ended.

    ``write_id`` and ``fields`` are what it has now.
    """

    def __init__(self, write_id: str, fields: Mapping[str, bytes]) -> None:
        self.write_id = write_id
        self.fields = fields
        super().__init__(write_id)


class SessionService:
    """Shared by all sessions of one cluster object."""

    def __init__(
        self,
        store: CachedStore,
        config: SessionConfig,
        *,
        node: Node,
        bus: SessionBus,
        sockets: LocalSockets,
    ) -> None:
        self.store = store
        self.config = config
        self.node = node
        self.cookie = Cookie(config.cookie)
        self.rolling = config.cookie.rolling
        self.acks = Acknowledgements()
        self.tombstones = Tombstones(store, self._end_again, deadline=node.deadline, clock=node.clock)
        store.ended = self.tombstones
        self._bus = bus
        self._sockets = sockets

    def longest(self, lifetime: float | None) -> float:
        """The absolute timeout of a login with this ``lifetime``."""
        if lifetime is None:
            return self.config.absolute_timeout
        return max(lifetime, _LONGEST_ROLLING) if self.rolling else lifetime

    def changed(self, handle: Handle) -> bytes:
        """The message that a session's record changed."""
        return encode(Changed(handle, self.node.id))

    def ended(self, handle: Handle, reason: str) -> bytes:
        """The message that a session is over, when its end is not waited for."""
        return encode(Ended(handle, CloseCode.SESSION_ENDED, reason, self.node.id))

    def was_ended(self, handle: Handle, reason: str, run_id: str | None) -> None:
        """The store has ended a session on the server ``run_id``, which was asked for before: what ``end``
        does on this node.
        """
        self._remember([handle], run_id)
        self._sockets.close_session(handle, CloseCode.SESSION_ENDED, reason)

    async def abandon(self, handle: Handle, budget: Budget) -> None:
        """End a session that was created, or may have been, and whose secret no client gets: at once if the
        store takes it within ``budget``, else as soon as it answers.
        """
        self.tombstones.end_later(handle)
        run_id = self.store.run_id(int(handle[:2], 16))
        try:
            await budget.spend(
                lambda left: self.store.end(handle, message=self.ended(handle, "session ended"), timeout=left)
            )
        except StoreUnavailable as error:
            logger.info("a session that no client has is ended later: %s", error.reason)
        else:
            self._remember([handle], run_id)

    async def end(
        self,
        handle: Handle,
        *,
        code: int,
        reason: str,
        timeout: float,
        budget: Budget | None = None,
        expected: str | None = None,
    ) -> LogoutReceipt:
        """End one session everywhere; returns when every node has said so, or after ``timeout`` seconds. 0:
        when it is committed and published; nothing is waited for. With ``expected``, the write id that was
        read, only if nothing was written since.

        Raises:
            StoreUnavailable: not stored, as far as is known; the session goes on.
            Overtaken: something was written since; the session goes on.
        """

        async def commit(pending: PendingAck, budget: Budget) -> EndResult:
            message = encode(Ended(handle, code, reason, self.node.id, pending.id))
            # Asked before: whatever the server is replaced with afterwards, that is then another one.
            run_id = self.store.run_id(int(handle[:2], 16))
            ending = await budget.spend(
                lambda left: self.store.end(handle, message=message, expected=expected, timeout=left)
            )
            if ending.overtaken:
                raise Overtaken(ending.overtaken, ending.fields)
            self._remember([handle], run_id)
            return ending

        return await self._end(
            commit,
            lambda ending: self._sockets.close_session(handle, code, reason),
            timeout=timeout,
            budget=budget,
        )

    async def end_all(
        self,
        user: UserId,
        *,
        keep: Handle | None,
        code: int,
        reason: str,
        timeout: float,
        budget: Budget | None = None,
    ) -> LogoutReceipt:
        """End every session of a user but ``keep``. Returns and raises as ``end``."""

        async def commit(pending: PendingAck, budget: Budget) -> EndResult:
            message = encode(UserEnded(user, keep, code, reason, self.node.id, pending.id))
            run_id = self.store.run_id(bucket_of(user))
            ending = await budget.spend(
                lambda left: self.store.end_all(
                    user, keep=keep, epoch=pending.id, message=message, timeout=left
                )
            )
            self._remember(ending.handles, run_id)
            return ending

        return await self._end(
            commit,
            lambda ending: self._sockets.end_user(
                user, keep=keep, ended=frozenset(ending.handles), code=code, reason=reason
            ),
            timeout=timeout,
            budget=budget,
        )

    def watch(self, record: Record) -> SessionEnded:
        """The end of this session, until ``unwatch``."""
        self.node.ensure_started("waiting for the end of a session")

        async def left() -> float | None:
            fresh = await self.store.read_fresh(record.handle, timeout=self.node.deadline)
            return None if fresh is None else fresh.expires_in

        ended = SessionEnded(record.handle, record.user, left)
        self._sockets.watch(ended)
        return ended

    def unwatch(self, ended: SessionEnded) -> None:
        """Its request is over."""
        self._sockets.unwatch(ended)

    def _remember(self, handles: Iterable[Handle], run_id: str | None) -> None:
        for handle in handles:
            self.tombstones.remember(handle, "?" if run_id is None else run_id)

    async def _end_again(self, handle: Handle) -> None:
        message = encode(Ended(handle, CloseCode.SESSION_ENDED, "session ended", ""))
        await self.store.end(handle, message=message, timeout=self.node.deadline)
        self._sockets.close_session(handle, CloseCode.SESSION_ENDED, "session ended")

    async def _end(
        self,
        commit: Callable[[PendingAck, Budget], Awaitable[EndResult]],
        close_here: Callable[[EndResult], int],
        *,
        timeout: float,
        budget: Budget | None,
    ) -> LogoutReceipt:
        self.node.ensure_started("logging out")
        clock = asyncio.get_running_loop().time
        started, began = clock(), monotonic()
        if timeout > 0:
            await self._bus.reachable(timeout=min(timeout, self.node.deadline) / 2)
        pending = self.acks.open()
        try:
            ending = await commit(pending, budget or Budget(self.node.deadline))
            committed = clock()
            closed_here = close_here(ending)
            if self.node.listens:
                # This node does not wait for its own message: its bus may be the one that is down.
                pending.add(self.node.id, closed_here)
            serves_for = self.config.serves_for
            complete = await self.acks.wait_for(pending, ending.nodes, timeout=min(timeout, serves_for))
            if not complete and timeout >= serves_for:
                # The caller waits for so long that time alone may do it: when those missing cannot serve any
                # more.
                serves_for = await self._longest_service(
                    [node for node in ending.nodes if node not in pending.acked]
                )
                # The clocks of some loops have whole milliseconds, and their timers may come early by one.
                over = committed + serves_for
                while not complete and (rest := committed + min(timeout, serves_for) - clock()) > 0:
                    complete = await pending.wait_for(ending.nodes, timeout=max(rest, 0.001))
                complete = complete or clock() >= over
            finished = clock()
            if pending.sockets:
                pending.sockets = max(0, pending.sockets - await self._sockets.failed_closes(began))
        finally:
            self.acks.close(pending)
        missing = [NodeId(node) for node in ending.nodes if node not in pending.acked]
        if missing and timeout > 0:
            logger.warning(
                "%d of %d nodes did not acknowledge a logout in time", len(missing), len(ending.nodes)
            )
        return LogoutReceipt(
            sessions=ending.sessions,
            nodes_acked=tuple(sorted(NodeId(node) for node in pending.acked)),
            nodes_missing=tuple(missing),
            complete=complete,
            sockets_closed=pending.sockets,
            elapsed=finished - started,
            replicas=ending.replicas,
        )

    async def _longest_service(self, missing: Sequence[str]) -> float:
        """Seconds after which none of these nodes serves a session that was ended without its knowledge."""
        try:
            nodes = await self._bus.nodes(timeout=self.node.deadline)
        except StoreUnavailable:
            return math.inf
        known = [
            info.serves_for for node, info in nodes.items() if node in missing or UNKNOWN_NODES in missing
        ]
        return max(self.config.serves_for, *known, 0.0)


class Budget:
    """The seconds of Redis work that one operation may spend, however long it lasts otherwise: a request
    until its response starts, or one call on a session that goes on after that.
    """

    __slots__ = ("left", "total")

    def __init__(self, total: float) -> None:
        self.total = total
        self.left = total

    async def spend(self, work: Callable[[float], Awaitable[T]]) -> T:
        """Run ``work(timeout)`` and deduct what it took.

        Raises:
            StoreUnavailable: nothing is left, or as the work.
        """
        if self.left <= 0:
            raise StoreUnavailable(f"the {self.total:g} s for the session's Redis work are used up")
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            return await work(self.left)
        finally:
            self.left -= clock() - started
