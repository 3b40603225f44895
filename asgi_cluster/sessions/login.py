"""A login: a new session in place of the one that the request has, with what the store has of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Set

import msgspec

from asgi_cluster.bus.messages import Changed, encode
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, UserId, new_token
from asgi_cluster.node import Node
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.changes import carried_over
from asgi_cluster.sessions.codec import Decoded, encode_value
from asgi_cluster.sessions.config import SessionConfig
from asgi_cluster.sessions.creation import new_session, record_of
from asgi_cluster.sessions.data import SessionData
from asgi_cluster.sessions.logouts import ConcurrentWrite, Logouts
from asgi_cluster.sessions.store import Change, Record, RecordStore

__all__ = ["Logins"]

logger = logging.getLogger("asgi_cluster.sessions")

_NO_FIELDS: Mapping[str, bytes] = {}
_LONGEST_ROLLING = 365 * 86400.0
"""Seconds: a cookie that was stolen is not renewed for ever."""
_TRIES = 5
"""Of a login to end a session that other requests go on writing."""


class Logins:
    """Shared by all sessions of one cluster object."""

    def __init__(
        self,
        store: RecordStore,
        cache: SessionCache,
        logouts: Logouts,
        config: SessionConfig,
        node: Node,
    ) -> None:
        self.store = store
        self._cache = cache
        self._logouts = logouts
        self._config = config
        self._node = node

    async def sign_in(self, session: SessionData, user: UserId, lifetime: float | None) -> None:
        """Store a new session of ``user``, and end the one that the request has. Data of an anonymous
        session, or of the same user, is carried over as the store has it.

        Raises:
            StoreUnavailable: the user is not signed in; see ``Session.login``.
        """
        work, old = session.work, session.work.record
        work.check_cookie("login")
        replaced = work.stored_handle
        known = old.fields if old is not None and old.user in (None, user) else None
        own: set[str] = set() if known is None else set().union(*work.changes(session))
        before = known or _NO_FIELDS
        fields = {key: encode_value(key, value, before.get(key)) for key, value in dict.items(session)}
        new, secret = new_session(
            work.scope,
            user,
            fields,
            idle=lifetime or self._config.idle_timeout,
            absolute=self._absolute(lifetime),
            persistent=lifetime is not None,
        )
        sent_at = self._node.clock()
        stored = False
        try:
            with work.sending():
                with work.spending(self._node) as timeout, self._cache.changing(new.handle):
                    created_at = await self.store.create(new, timeout=timeout)
                stored = True
                record = record_of(new, created_at)
                if replaced is not None:
                    record = await self._replace(session, replaced, record, known, own)
        except (StoreUnavailable, asyncio.CancelledError) as error:
            unknown = not isinstance(error, StoreUnavailable) or error.outcome_unknown
            if stored or unknown:
                await self._logouts.discard(new.handle, work.deadline(self._node))
            raise
        work.created_as(record, secret, sent_at)
        work.pending_end = None
        session.modified = bool(work.touched)

    def _absolute(self, lifetime: float | None) -> float:
        if lifetime is None:
            return self._config.absolute_timeout
        return max(lifetime, _LONGEST_ROLLING) if self._config.cookie.rolling else lifetime

    async def _replace(
        self,
        session: SessionData,
        handle: Handle,
        record: Record,
        known: Mapping[str, bytes] | None,
        own: Set[str],
    ) -> Record:
        """End the session that ``record`` replaces. ``known`` is what of it went into ``record``, besides the
        request's ``own`` keys. What other requests have written meanwhile goes there first: the session is
        ended only if it has not changed since, so that nothing is lost when this fails. ``None``: nothing is
        carried over.
        """
        work, old = session.work, session.work.record
        # An anonymous session gives no rights: nodes may serve it until their lease lapses.
        anonymous = old is not None and old.user is None
        expected = None if known is None or old is None else old.write_id
        for _ in range(_TRIES):
            try:
                with work.noting():
                    receipt = await self._logouts.end(
                        handle,
                        code=CloseCode.FORCE_RECONNECT,
                        reason="signed in",
                        timeout=0.0 if anonymous else self._node.deadline,
                        deadline=work.deadline(self._node),
                        expected=expected,
                    )
            except ConcurrentWrite as now:
                assert known is not None
                record = await self._carry(session, handle, record, known, now.fields, own)
                known, expected = now.fields, now.write_id
            else:
                if known is not None and not receipt.sessions:
                    # It was over before: what it held is not handed on.
                    record = await self._carry(session, handle, record, known, _NO_FIELDS, own)
                return record
        raise StoreUnavailable("other requests went on writing the session that is signed in")

    async def _carry(
        self,
        session: SessionData,
        handle: Handle,
        record: Record,
        known: Mapping[str, bytes],
        held: Mapping[str, bytes],
        own: Set[str],
    ) -> Record:
        """Bring ``record`` from ``known`` to ``held``, what the session ``handle`` has, but for ``own`` keys.

        Raises:
            StoreUnavailable: not stored, or the new session is over already.
        """
        work = session.work
        changed, removed = carried_over(known, held, own)
        if not changed and not removed:
            return record
        try:
            values = Decoded(changed)
        except msgspec.DecodeError:
            logger.error("session %s holds a value that is not msgpack: not carried over", handle)
            return record
        message = encode(Changed(record.handle, self._node.id))
        change = Change(changed=changed, removed=removed, write_id=new_token())
        with work.spending(self._node) as timeout, self._cache.changing(record.handle):
            outcome = await self.store.write(record.handle, change, message=message, timeout=timeout)
        if outcome == "gone":
            raise StoreUnavailable("the user was logged out meanwhile")
        # A value that the app may hold stays the one that it sees, and counts as changed only when the app
        # changes it. What another task of the request has assigned or removed meanwhile stays, too.
        kept = {
            key
            for key in (*changed, *removed)
            if key in work.touched or work.held_by_app(dict.get(session, key))
        }
        mine = {key: dict.__getitem__(session, key) for key in kept if dict.__contains__(session, key)}
        values.into(session)
        fields = {**record.fields, **changed}
        for key in removed:
            fields.pop(key, None)
        for key in (*removed, *kept):
            dict.pop(session, key, None)
        dict.update(session, mine)
        fields.update({key: record.fields[key] for key in mine if key in record.fields})
        return msgspec.structs.replace(
            record, fields=fields, write_id=change.write_id, version=record.version + 1
        )

    async def discard_unsent(self, session: SessionData) -> None:
        """The response that was to bring the cookie of a new sign-in is not sent: no client can use that
        session, so it is ended.
        """
        work, record = session.work, session.work.record
        if record is not None and record.user is not None and work.created and work.phase == "open":
            work.lose()
            await self._logouts.discard(record.handle, work.deadline(self._node))
