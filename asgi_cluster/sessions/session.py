"""The session of one request: a dict to the app, and what one can do with it.

Every session object belongs to one request or one WebSocket.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from asgi_cluster.arguments import seconds
from asgi_cluster.bus.lease import boot_clock
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, UserId, check_user, new_secret, new_token, secret_hash
from asgi_cluster.sessions.cache import Entry
from asgi_cluster.sessions.ended import SessionEnded
from asgi_cluster.sessions.receipts import LogoutReceipt
from asgi_cluster.sessions.stored import StoredSession

__all__ = ["Session"]

logger = logging.getLogger("asgi_cluster.sessions")


class Session(StoredSession):
    """A server-side session, used like a dict.

    Changes, nested ones included, are saved before the response starts, and only when there are any; on a
    WebSocket call ``save()``. An empty session (no data, no user) is not stored and sets no cookie.
    ``clear()`` is a logout; what is written after it starts a new anonymous session.
    """

    # State

    @property
    def handle(self) -> Handle | None:
        """The public name of the stored session, safe to show and to log; ``None`` while there is none."""
        self.mark_accessed()
        return None if self._record is None else self._record.handle

    @property
    def user_id(self) -> UserId | None:
        """Who is signed in, or ``None``."""
        self.mark_accessed()
        return None if self._record is None else self._record.user

    @property
    def is_new(self) -> bool:
        """True when the request brought no session that exists."""
        self.mark_accessed()
        return self._record is None or self._created

    @property
    def version(self) -> int:
        """How often it was written when this request read or saved it; 0 while it is not stored."""
        self.mark_accessed()
        return 0 if self._record is None else self._record.version

    @property
    def created_at(self) -> datetime | None:
        """When it was stored first, by the store's clock; ``None`` while it is not stored."""
        self.mark_accessed()
        return None if self._record is None else datetime.fromtimestamp(self._record.created_at, UTC)

    @property
    def expires_at(self) -> datetime | None:
        """When it ends unless it is used: this node's wall clock plus the remaining time. ``None`` while it
        is not stored.
        """
        self.mark_accessed()
        if self._record is None:
            return None
        return datetime.now(UTC) + timedelta(seconds=self._expires_at - boot_clock())

    @property
    def ended(self) -> SessionEnded:
        """The end of this session, wherever and however it ends, to be awaited during this request: ``await
        session.ended.wait()``.

        For responses that go on for long (SSE, streaming); sockets are closed without it. Requests that do
        not use it pay nothing. After ``login`` it is that of the new session.
        """
        self.mark_accessed()
        record, watched = self._record, self.watched
        if record is None:
            if watched is None:
                over = self._lost or self._cookie == "clear"
                watched = self.watched = SessionEnded("", None, None, over=over)
        elif watched is None or watched.handle != record.handle:
            self.unwatch()
            watched = self.watched = self._service.watch(record)
        return watched

    # Login and logout

    async def login(self, user_id: str, lifetime: float | timedelta | None = None) -> None:
        """Sign ``user_id`` in: a new handle and a new secret; the old ones are dead when this returns. Those
        of an anonymous session are dead in the store, and on every node within the lease: a login does not
        wait for other nodes to acknowledge it.

        Data of an anonymous session, or of the same user, is kept, as the store has it at that moment; what
        this request assigned before wins. Another user's data is dropped. ``lifetime``, seconds or a
        ``timedelta``, replaces both timeouts and makes the cookie survive the browser ("remember me");
        ``None``: as configured. Open sockets of the old session are closed with 3011, which makes clients
        reconnect with the new cookie.

        Raises:
            StoreUnavailable: the user is not signed in. The old session goes on, unless ``outcome_unknown``:
            then it may be over. RuntimeError: the response has started, or the WebSocket is accepted: no
            cookie can be set any more.
        """
        check_user(user_id)
        if lifetime is not None:
            lifetime = seconds("lifetime", lifetime)
            if not lifetime > 0:
                raise ValueError(f"lifetime must be above 0 seconds, not {lifetime!r}")
        self._refuse_late("login")
        await self._read_again()
        if self.user_id not in (None, user_id):
            dict.clear(self)
            self.touched = frozenset()
        elif self._lost:
            # The session is over: what this request has put here since stays, what the session held is
            # dropped.
            for key in [key for key in dict.keys(self) if key not in self.touched]:
                dict.pop(self, key)
        config = self._service.config
        record = self._record
        await self._create(
            UserId(user_id),
            idle=lifetime or config.idle_timeout,
            absolute=self._service.longest(lifetime),
            persistent=lifetime is not None,
            replaces=self._pending_end or (None if record is None else record.handle),
            carries=record is not None and record.user in (None, user_id),
        )
        self._pending_end = None

    async def rotate(self) -> None:
        """Replace the secret, for the same session; the old one stays good for ``rotate_grace`` seconds.

        Does nothing when the session is not stored, or when a parallel request has just rotated it.

        Raises:
            StoreUnavailable, RuntimeError: as ``login``.
        """
        self._refuse_late("rotate")
        await self._read_again()
        self.mark_accessed()
        record = self._record
        if record is None:
            return
        secret = new_secret()
        write_id = new_token()
        outcome = await self._spend(
            lambda left: self._service.store.rotate(
                record.handle,
                secret=secret_hash(secret.encode()),
                current=record.secret,
                grace=self._service.config.rotate_grace,
                write_id=write_id,
                message=self._service.changed(record.handle),
                timeout=left,
            )
        )
        if outcome == "written":
            self._record = msgspec.structs.replace(
                record, secret=secret_hash(secret.encode()), write_id=write_id, version=record.version + 1
            )
            self._secret = secret
            self._cookie = "set"
        elif outcome == "gone":
            self._lose()

    async def logout(self, reason: str = "logged out", timeout: float | timedelta = 1.0) -> LogoutReceipt:
        """End this session on every node and close its sockets with 4501 and ``reason``.

        Returns when every registered node has acknowledged, or after ``timeout`` (seconds or a
        ``timedelta``); the receipt says which. A node that did not answer an earlier logout in time is
        given 0.1 s, until it answers again. Without a stored session there is nothing to end.

        Raises:
            StoreUnavailable: it could not be stored; the session goes on, unless ``outcome_unknown``.
        """
        timeout = seconds("timeout", timeout)
        await self._read_again()
        self.mark_accessed()
        handle = self._pending_end or (None if self._record is None else self._record.handle)
        if handle is None:
            dict.clear(self)
            self.touched = frozenset()
            return LogoutReceipt(
                sessions=0, nodes_acked=(), nodes_missing=(), complete=True, sockets_closed=0, elapsed=0.0
            )
        with self._noting():
            receipt = await self._service.end(
                handle, code=CloseCode.SESSION_ENDED, reason=reason, timeout=timeout, budget=self._allowance()
            )
        dict.clear(self)
        self.touched = frozenset()
        self._pending_end = None
        self._unbind()
        return receipt

    # Reloading and locking

    async def reload(self) -> bool:
        """Read it again from the store, past the cache; unsaved changes are dropped. False when it is over.

        Raises:
            StoreUnavailable: it could not be read; nothing has changed.
        """
        await self._read_again()
        self.mark_accessed()
        record = self._record
        if record is None:
            return False
        store = self._service.store
        sent_at = boot_clock()
        fresh = await self._spend(lambda left: store.read_fresh(record.handle, timeout=left))
        if fresh is None:
            self._lose()
            return False
        self._bind(Entry(fresh, sent_at, fresh.expires_in, store.cache.lease(record.handle)), fresh)
        return True

    @asynccontextmanager
    async def lock(self, *, wait: float = 5.0, hold: float = 10.0) -> AsyncIterator[None]:
        """One request at a time: hold the session's lock, with fresh data, and save before giving it back.

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
        self.mark_accessed()
        if self._record is None:
            yield
            return
        store, handle, token = self._service.store, self._record.handle, new_token()
        give_up_at = boot_clock() + wait
        pause = 0.005
        while not await self._step(lambda left: store.lock(handle, token=token, hold=hold, timeout=left)):
            if boot_clock() >= give_up_at:
                raise TimeoutError(f"the lock of session {handle} was not free within {wait:g} s")
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 0.1)
        try:
            self._budget = None
            await self.reload()
            yield
            self._budget = None
            await self.save()
        finally:
            try:
                await self._step(lambda left: store.unlock(handle, token=token, timeout=left))
            except StoreUnavailable as error:
                logger.warning(
                    "the lock of session %s could not be given back, it expires within %g s: %s",
                    handle,
                    hold,
                    error.reason,
                )

    async def _step(self, work: Any) -> Any:
        self._budget = None
        return await self._spend(work)

    def __repr__(self) -> str:
        name = "failed" if self._failure else "unsaved" if self._record is None else self._record.handle
        return f"<Session {name}>"
