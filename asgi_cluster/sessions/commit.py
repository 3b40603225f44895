"""What a request changed, brought to the store: written, created or ended.

Each operation is sent inside of ``SessionCache.changing``, so that this node serves nothing older than what
it has written itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from hmac import compare_digest

import msgspec

from asgi_cluster.bus.messages import Changed, Ended, encode
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import SessionConflict, StoreUnavailable
from asgi_cluster.ids import Handle, new_secret, new_token, secret_hash
from asgi_cluster.node import Node
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.changes import Changes
from asgi_cluster.sessions.config import SessionConfig
from asgi_cluster.sessions.cookies import Cookie
from asgi_cluster.sessions.creation import new_session, record_of
from asgi_cluster.sessions.data import SessionData
from asgi_cluster.sessions.logouts import Logouts
from asgi_cluster.sessions.reads import SessionReader
from asgi_cluster.sessions.store import Change, Record

__all__ = ["Committer"]

logger = logging.getLogger("asgi_cluster.sessions")

_UNCHANGED: Changes = ({}, [])
_LOGGED_OUT = "logged out"


class Committer:
    """Shared by all sessions of one cluster object."""

    def __init__(
        self,
        reader: SessionReader,
        cache: SessionCache,
        logouts: Logouts,
        cookie: Cookie,
        config: SessionConfig,
        node: Node,
    ) -> None:
        self._reader = reader
        self.store = reader.store
        self._cache = cache
        self._logouts = logouts
        self._cookie = cookie
        self._config = config
        self._node = node

    def due(self, session: SessionData) -> bool:
        """Whether ``commit`` has anything to do: something may have changed, or it is time to extend the idle
        time.
        """
        work = session.work
        if session.modified or work.exposed:
            return True
        return work.record is not None and work.touch_due(self._node.clock(), accessed=session.accessed)

    async def commit(self, session: SessionData, *, renew_cookie: bool = True) -> bool:
        """Save what has changed, in as few round trips as possible: none when nothing is due. False when the
        session was ended meanwhile: nothing was written, and nothing will be.

        Raises:
            TypeError, ValueError: see ``UnitOfWork.changes``.
            StoreUnavailable: not stored, unless ``outcome_unknown``.
            SessionConflict: ``conflict="error"`` and another request wrote it first.
        """
        work, now = session.work, self._node.clock()
        renew_cookie = renew_cookie and work.renewal_due(now, accessed=session.accessed)
        if work.pending_end is not None:
            with work.noting():
                await self._logouts.end(
                    work.pending_end,
                    code=CloseCode.SESSION_ENDED,
                    reason=_LOGGED_OUT,
                    timeout=1.0,
                    deadline=work.deadline(self._node),
                )
            work.pending_end = None  # only now: an end that was not confirmed is tried again
        if work.state in ("lost", "degraded"):
            return False
        # A session that the app has not read is as the record has it.
        changes = work.changes(session) if session.modified or work.exposed else _UNCHANGED
        record = work.record
        if record is None:
            if changes[0]:
                await self._create(session, changes[0])
            return True
        if changes[0] or changes[1]:
            exists = await self._write(session, record, changes)
        else:
            exists = not work.touch_due(now, accessed=session.accessed) or await self._touch(session, record)
        if renew_cookie and exists:
            await self._renew_cookie(session)
        return exists

    async def _write(self, session: SessionData, record: Record, changes: Changes) -> bool:
        work, handle, (changed, removed) = session.work, record.handle, changes
        # The store decides whether that leaves the session empty: it may hold what this request has not read.
        may_end = not changed and record.user is None
        ended = Ended(handle, CloseCode.SESSION_ENDED, _LOGGED_OUT, self._node.id) if may_end else None
        run_id = self.store.run_id(int(handle[:2], 16)) if may_end else None
        expected = record.write_id if self._config.conflict == "error" else None
        change = Change(changed=changed, removed=removed, write_id=new_token(), expected=expected)
        sent_at = self._node.clock()
        with work.sending():
            with work.spending(self._node) as timeout, self._cache.changing(handle):
                outcome = await self.store.write(
                    handle,
                    change,
                    message=self._changed(handle),
                    ended=b"" if ended is None else encode(ended),
                    timeout=timeout,
                )
            if outcome == "conflict":
                work.raised = SessionConflict(handle)
                raise work.raised
        if outcome == "ended":
            self._logouts.was_ended(handle, _LOGGED_OUT, run_id)
        if not work.holds(handle):
            return await self._save_elsewhere(session, changes) if outcome == "gone" else True
        if outcome == "gone":
            work.lose()
            return False
        if outcome == "ended":
            dict.clear(session)
            work.unbind()
            return True
        work.saved(changes, change.write_id if outcome == "written" else None, sent_at)
        return True

    async def _save_elsewhere(self, session: SessionData, changes: Changes) -> bool:
        """What was not written, because another task of this request has ended the session: a login's new
        session gets it.
        """
        if session.work.record is None:
            return False
        for keys in changes:
            session.work.touch(keys)
        session.modified = True
        return await self.commit(session, renew_cookie=False)

    async def _touch(self, session: SessionData, record: Record) -> bool:
        work, sent_at = session.work, self._node.clock()
        try:
            with work.deadline(self._node).spending() as timeout:
                exists = await self.store.touch(record.handle, timeout=timeout)
        except StoreUnavailable as error:
            # Nothing of the app's is lost, and a request that only reads is answered without the store for as
            # long as the cache may be. The next one tries again.
            logger.debug("the idle time of session %s was not extended: %s", record.handle, error.reason)
            return True
        # Only now: without an answer what is cached is still right, up to the time that is left.
        self._cache.drop(record.handle)
        if work.holds(record.handle):
            if exists:
                work.extended(sent_at)
            else:
                work.lose()
        return exists

    async def _renew_cookie(self, session: SessionData) -> None:
        # The only Set-Cookie by a request that did not make the session. The store is read now: a login, a
        # logout or a rotation since this request was read must not be undone in the browser. What remains is
        # a response that is overtaken on its way.
        work, record = session.work, session.work.record
        if record is None or work.cookie is not None or self._cookie.max_age(record) is None:
            return
        try:
            with work.deadline(self._node).spending() as timeout:
                fresh = await self._reader.read_fresh(record.handle, timeout=timeout)
        except StoreUnavailable as error:
            logger.debug("the cookie of session %s was not renewed: %s", record.handle, error.reason)
            return
        record = work.record  # another task of the request may have saved meanwhile
        if record is None or fresh is None or record.handle != fresh.handle:
            return
        if compare_digest(fresh.secret, secret_hash(work.secret.encode())):
            work.record = msgspec.structs.replace(record, absolute_in=fresh.absolute_in)
            work.cookie = "set"

    async def rotate(self, session: SessionData, record: Record) -> None:
        """Replace the secret of a stored session. Raises as ``commit``."""
        work, secret, write_id = session.work, new_secret(), new_token()
        with work.spending(self._node) as timeout, self._cache.changing(record.handle):
            outcome = await self.store.rotate(
                record.handle,
                secret=secret_hash(secret.encode()),
                current=record.secret,
                grace=self._config.rotate_grace,
                write_id=write_id,
                message=self._changed(record.handle),
                timeout=timeout,
            )
        if not work.holds(record.handle):
            return
        if outcome == "written":
            work.rotated(secret, write_id)
        elif outcome == "gone":
            work.lose()

    async def _create(self, session: SessionData, changed: Mapping[str, bytes]) -> None:
        work, config, sent_at = session.work, self._config, self._node.clock()
        work.check_cookie("a new session")
        new, secret = new_session(
            work.scope, None, changed, idle=config.idle_timeout, absolute=config.absolute_timeout
        )
        with work.sending(), work.spending(self._node) as timeout, self._cache.changing(new.handle):
            created_at = await self.store.create(new, timeout=timeout)
        work.created_as(record_of(new, created_at), secret, sent_at)
        session.modified = bool(work.touched)

    def _changed(self, handle: Handle) -> bytes:
        return encode(Changed(handle, self._node.id))
