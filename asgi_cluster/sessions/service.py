"""What a session needs of its node, in one place, and the reads that a session begins with."""

from __future__ import annotations

from hmac import compare_digest
from typing import Protocol

import msgspec

from asgi_cluster.bus.session_bus import SessionBus
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, secret_hash
from asgi_cluster.node import Node
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.commit import Committer
from asgi_cluster.sessions.config import SessionConfig
from asgi_cluster.sessions.cookies import Cookie
from asgi_cluster.sessions.corrupt import CorruptRecords
from asgi_cluster.sessions.data import SessionData
from asgi_cluster.sessions.ended import SessionEnded
from asgi_cluster.sessions.entry import Entry
from asgi_cluster.sessions.login import Logins
from asgi_cluster.sessions.logouts import LocalSockets, Logouts
from asgi_cluster.sessions.reads import SessionReader
from asgi_cluster.sessions.store import Record, SessionStore

__all__ = ["SessionService", "WatchedSockets"]


class WatchedSockets(LocalSockets, Protocol):
    """This node's sockets, as far as sessions are concerned."""

    def watch(self, watcher: SessionEnded) -> None:
        """Let it end with its session, as the session's sockets do."""
        ...

    def unwatch(self, watcher: SessionEnded) -> None:
        """No more of that. Harmless when it was never watched."""
        ...


class SessionService:
    """Shared by all sessions of one cluster object."""

    def __init__(
        self,
        store: SessionStore,
        cache: SessionCache,
        config: SessionConfig,
        *,
        node: Node,
        bus: SessionBus,
        sockets: WatchedSockets,
    ) -> None:
        self.store = store
        self.cache = cache
        self.config = config
        self.node = node
        self.cookie = Cookie(config.cookie)
        self.corrupt = CorruptRecords()
        """Sessions with a value that could not be read."""
        self.logouts = Logouts(store, cache, config, node=node, bus=bus, sockets=sockets)
        self.reader = SessionReader(store, cache, ended=self.logouts.tombstones)
        self.committer = Committer(self.reader, cache, self.logouts, self.cookie, config, node)
        self.logins = Logins(store, cache, self.logouts, config, node)
        self._rolling = config.cookie.rolling
        self._sockets = sockets

    # For the middleware

    def open(self, session: SessionData, entry: Entry, secret: bytes) -> None:
        """Make ``session`` the one in ``entry``, if there is one and ``secret`` opens it.

        A wrong secret is an unknown session. Unknown ids are never adopted: that would be session fixation.
        """
        record = entry.record
        if record is None:
            return
        digest = secret_hash(secret)
        if compare_digest(digest, record.secret) or (
            record.previous is not None
            and compare_digest(digest, record.previous)
            and self.node.clock() < entry.read_at + record.previous_for
        ):
            self._bind(session, entry, record)
            if self._rolling and session.work.record is not None:
                session.work.secret = secret.decode()

    async def fetch(self, session: SessionData, handle: Handle, secret: bytes) -> None:
        """Make ``session`` the one that the cookie names, which the cache does not have.

        A store that does not answer is no error here: the first access raises, or the session is empty and
        read-only, or the last confirmed state, as ``on_store_error`` says.
        """
        work = session.work
        try:
            with work.deadline(self.node).spending() as timeout:
                entry = await self.reader.fetch(handle, timeout=timeout)
        except StoreUnavailable as error:
            policy = self.config.on_store_error
            stale = self.cache.stale(handle) if policy == "stale" else None
            if stale is None:
                work.not_read((handle, secret), error, degraded=policy == "anonymous")
                return
            entry = stale
        self.open(session, entry, secret)

    async def verify(self, session: SessionData) -> float | None:
        """Whether the store still has this session for this user: the seconds it has left, or ``None``. Never
        cached.

        Raises:
            StoreUnavailable: it could not be read.
        """
        record = session.work.record
        if record is None:
            return None
        with session.work.spending(self.node) as timeout:
            fresh = await self.reader.read_fresh(record.handle, timeout=timeout)
        if fresh is None or fresh.user != record.user or record.secret not in (fresh.secret, fresh.previous):
            return None
        return float(fresh.expires_in)

    # For the session

    async def read_degraded(self, session: SessionData) -> None:
        """Read again where an empty session stands for a failed read.

        Raises:
            StoreUnavailable: it cannot be read now either.
        """
        work = session.work
        if work.state == "degraded" and work.credentials is not None:
            handle, secret = work.credentials
            with work.spending(self.node) as timeout:
                entry = await self.reader.read(handle, timeout=timeout)
            work.state, work.failure, work.credentials = "anonymous", None, None
            self.open(session, entry, secret)

    async def reload(self, session: SessionData, record: Record) -> bool:
        """See ``Session.reload``."""
        work, sent_at = session.work, self.node.clock()
        with work.spending(self.node) as timeout:
            fresh = await self.reader.read_fresh(record.handle, timeout=timeout)
        if not work.holds(record.handle):
            return work.record is not None
        if fresh is None:
            work.lose()
            return False
        lease = self.cache.lease(record.handle)
        self._bind(session, Entry(fresh, sent_at, fresh.expires_in, lease), fresh)
        return True

    def _bind(self, session: SessionData, entry: Entry, record: Record) -> None:
        work = session.work
        work.bind(record, entry.expires_at)
        dict.clear(session)
        try:
            entry.fill(session)
        except msgspec.DecodeError:
            # A corrupt record concerns this session only: it is treated as missing.
            self.corrupt.found(record.handle, "holds a value that cannot be read")
            work.lose()

    def watch(self, record: Record) -> SessionEnded:
        """The end of this session, until ``unwatch``."""
        self.node.ensure_started("waiting for the end of a session")

        async def left() -> float | None:
            fresh = await self.reader.read_fresh(record.handle, timeout=self.node.deadline)
            return None if fresh is None else fresh.expires_in

        ended = SessionEnded(record.handle, record.user, left)
        self._sockets.watch(ended)
        return ended

    def unwatch(self, session: SessionData) -> None:
        """The request is over: the session's end is not waited for any more."""
        if session.work.watched is not None:
            self._sockets.unwatch(session.work.watched)
