"""The session of one request: a dict to the app, and what one can do with it.

Every session object belongs to one request or one WebSocket.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any

from asgi_cluster.arguments import seconds
from asgi_cluster.codes import CloseCode
from asgi_cluster.ids import Handle, UserId, check_user
from asgi_cluster.sessions.data import SessionData
from asgi_cluster.sessions.ended import SessionEnded
from asgi_cluster.sessions.lock import locked
from asgi_cluster.sessions.receipts import LogoutReceipt
from asgi_cluster.sessions.service import SessionService
from asgi_cluster.sessions.unit_of_work import UnitOfWork

__all__ = ["Session"]


class Session(SessionData):
    """A server-side session, used like a dict.

    Changes, nested ones included, are saved before the response starts, and only when there are any; on a
    WebSocket call ``save()``. An empty session (no data, no user) is not stored and sets no cookie.
    ``clear()`` is a logout; what is written after it starts a new anonymous session.
    """

    __slots__ = ("service",)

    def __init__(self, service: SessionService, scope: Mapping[str, Any]) -> None:
        super().__init__(UnitOfWork(scope, service.config))
        self.service = service

    # State

    @property
    def handle(self) -> Handle | None:
        """The public name of the stored session, safe to show and to log; ``None`` while there is none."""
        self.mark_accessed()
        return None if self.work.record is None else self.work.record.handle

    @property
    def user_id(self) -> UserId | None:
        """Who is signed in, or ``None``."""
        self.mark_accessed()
        return None if self.work.record is None else self.work.record.user

    @property
    def is_new(self) -> bool:
        """True when the request brought no session that exists."""
        self.mark_accessed()
        return self.work.record is None or self.work.created

    @property
    def version(self) -> int:
        """How often it was written when this request read or saved it; 0 while it is not stored."""
        self.mark_accessed()
        return 0 if self.work.record is None else self.work.record.version

    @property
    def created_at(self) -> datetime | None:
        """When it was stored first, by the store's clock; ``None`` while it is not stored."""
        self.mark_accessed()
        return None if self.work.record is None else datetime.fromtimestamp(self.work.record.created_at, UTC)

    @property
    def expires_at(self) -> datetime | None:
        """When it ends unless it is used: this node's wall clock plus the remaining time. ``None`` while it
        is not stored.
        """
        self.mark_accessed()
        if self.work.record is None:
            return None
        return datetime.now(UTC) + timedelta(seconds=self.work.expires_at - self.service.node.clock())

    @property
    def ended(self) -> SessionEnded:
        """The end of this session, wherever and however it ends, to be awaited during this request: ``await
        session.ended.wait()``.

        For responses that go on for long (SSE, streaming); sockets are closed without it. Requests that do
        not use it pay nothing. After ``login`` it is that of the new session.
        """
        self.mark_accessed()
        work = self.work
        record, watched = work.record, work.watched
        if record is None:
            if watched is None:
                over = work.state == "lost" or work.cookie == "clear"
                watched = work.watched = SessionEnded("", None, None, over=over)
        elif watched is None or watched.handle != record.handle:
            self.service.unwatch(self)
            watched = work.watched = self.service.watch(record)
        return watched

    # Login and logout

    async def login(self, user_id: str, lifetime: float | timedelta | None = None) -> None:
        """Sign ``user_id`` in: a new handle and a new secret; the old ones are not valid any more when this
        returns. Those of an anonymous session are not valid in the store any more, and on no node after the
        lease: a login does not wait for other nodes to acknowledge it.

        Data of an anonymous session, or of the same user, is kept, as the store has it at that moment; what
        this request assigned before wins. Another user's data is dropped. ``lifetime``, seconds or a
        ``timedelta``, replaces both timeouts and makes the cookie survive the browser ("remember me");
        ``None``: as configured. Open sockets of the old session are closed with 3011, which makes clients
        reconnect with the new cookie.

        Raises:
            StoreUnavailable: the user is not signed in. The old session goes on, unless ``outcome_unknown``:
                then it may be over.
            RuntimeError: the response has started, or the WebSocket is accepted: no cookie can be set any
                more.
        """
        check_user(user_id)
        if lifetime is not None:
            lifetime = seconds("lifetime", lifetime)
            if not lifetime > 0:
                raise ValueError(f"lifetime must be above 0 seconds, not {lifetime!r}")
        self.work.check_cookie("login")
        await self.service.read_degraded(self)
        if self.user_id not in (None, user_id):
            self.work.empty(self)
        elif self.work.state == "lost":
            # The session is over: what this request has put here since stays, what the session held is
            # dropped.
            for key in [key for key in dict.keys(self) if key not in self.work.touched]:
                dict.pop(self, key)
        await self.service.logins.sign_in(self, UserId(user_id), lifetime)

    async def rotate(self) -> None:
        """Replace the secret, for the same session; the old one stays good for ``rotate_grace`` seconds.

        Does nothing when the session is not stored, or when a parallel request has just rotated it.

        Raises:
            StoreUnavailable, RuntimeError: as ``login``.
        """
        self.work.check_cookie("rotate")
        await self.service.read_degraded(self)
        self.mark_accessed()
        if self.work.record is not None:
            await self.service.committer.rotate(self, self.work.record)

    async def logout(self, reason: str = "logged out", timeout: float | timedelta = 1.0) -> LogoutReceipt:
        """End this session on every node and close its sockets with 4501 and ``reason``.

        Returns when every registered node has acknowledged, or after ``timeout`` (seconds or a
        ``timedelta``); the receipt says which. A node that did not answer an earlier logout in time is
        given 0.1 s, until it answers again. Without a stored session there is nothing to end.

        Raises:
            StoreUnavailable: it could not be stored; the session goes on, unless ``outcome_unknown``.
        """
        timeout = seconds("timeout", timeout)
        await self.service.read_degraded(self)
        self.mark_accessed()
        work = self.work
        handle = work.stored_handle
        if handle is None:
            work.empty(self)
            return LogoutReceipt(
                sessions=0, nodes_acked=(), nodes_missing=(), complete=True, sockets_closed=0, elapsed=0.0
            )
        with work.noting():
            receipt = await self.service.logouts.end(
                handle,
                code=CloseCode.SESSION_ENDED,
                reason=reason,
                timeout=timeout,
                deadline=work.deadline(self.service.node),
            )
        work.empty(self)
        work.pending_end = None
        work.unbind()
        return receipt

    async def save(self) -> bool:
        """Store what has changed. False when the session was ended meanwhile: nothing was written, and
        nothing will be.

        Raises:
            TypeError: a value would not come back equal; names the key.
            ValueError: it holds more than ``max_bytes``.
            StoreUnavailable: not stored, unless ``outcome_unknown``.
            SessionConflict: ``conflict="error"`` and another request wrote it first.
        """
        self.mark_accessed()
        return await self.service.committer.commit(self, renew_cookie=False)

    # Reloading and locking

    async def reload(self) -> bool:
        """Read it again from the store, past the cache; unsaved changes are dropped. False when it is over.

        Raises:
            StoreUnavailable: it could not be read; nothing has changed.
        """
        await self.service.read_degraded(self)
        self.mark_accessed()
        record = self.work.record
        return record is not None and await self.service.reload(self, record)

    def lock(self, *, wait: float = 5.0, hold: float = 10.0) -> AbstractAsyncContextManager[None]:
        """One request at a time: take the session's lock, with fresh data, and save before giving it back.

        ``wait`` is how many seconds to try, ``hold`` for how long at most the lock is held: work that takes
        longer is no longer alone. A session that is not stored needs no lock: no other request has it.

        Each step has the cluster's ``deadline`` for itself: each try to take the lock, reading, saving, and
        giving it back. So it is given back whatever became of the work; a store that cannot be reached then
        is logged, and the lock expires after ``hold``.

        Raises:
            TimeoutError: another request held it for all of ``wait``.
            StoreUnavailable: as ``save``. If the lock could not be taken and ``outcome_unknown`` is true, it
                may be held until ``hold`` is over.
        """
        return locked(self.service, self, wait=wait, hold=hold)

    def __repr__(self) -> str:
        record, state = self.work.record, self.work.state
        name = "failed" if state == "unread" else "unsaved" if record is None else record.handle
        return f"<Session {name}>"
