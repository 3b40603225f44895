"""A session as the middleware sees it: read, compared, saved, and never more than it was.

It keeps the record it was read from, and at save time sends what differs, key by key. It never writes a
record that it did not read or create itself, so a request that was under way during a logout cannot bring the
session back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from hmac import compare_digest
from typing import Any, Literal

import msgspec

from asgi_cluster.bus.lease import boot_clock
from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import SessionConflict, StoreUnavailable
from asgi_cluster.ids import Handle, UserId, new_handle, new_secret, new_token, secret_hash
from asgi_cluster.sessions.cache import Entry
from asgi_cluster.sessions.codec import Decoded, encode_value
from asgi_cluster.sessions.data import SessionData
from asgi_cluster.sessions.device import device_of
from asgi_cluster.sessions.ended import SessionEnded
from asgi_cluster.sessions.service import Budget, Overtaken, SessionService
from asgi_cluster.sessions.store import NewSession, Record

__all__ = ["StoredSession"]

logger = logging.getLogger("asgi_cluster.sessions")

_NO_FIELDS: Mapping[str, bytes] = {}
_LOGGED_OUT = "logged out"
_TRIES = 5  # of a login to end a session that others go on writing
_TOUCH_AFTER = (
    0.1  # of the idle timeout: a session in steady use costs one write per tenth, not one per request
)


class StoredSession(SessionData):
    """The contents of one request's session, and what became of it. ``Session`` adds what an app does with
    it.
    """

    # What every session has. A session that the app does not use, as an idle socket's, needs no __dict__
    # then.
    __slots__ = ("_headers_sent", "_scope", "_service")

    # Class-level defaults in place of more slots: most requests change none of them, and setting fourteen
    # costs more than the lookup.
    _record: Record | None = None
    _expires_at: float = 0.0
    _touch_at: float = 0.0
    _secret: str = ""
    _cookie: Literal["set", "clear"] | None = None
    _pending_end: Handle | None = None
    _failure: StoreUnavailable | None = None
    _degraded: bool = False
    _unread: tuple[Handle, bytes] | None = None
    """What the cookie says, when the session could not be read and is shown as an empty one."""
    _created: bool = False
    _lost: bool = False
    sealed: bool = False
    """The response has started: from now on a change is an error."""
    _budget: Budget | None = None
    watched: SessionEnded | None = None
    """What the app was given to wait for the session's end; ``None`` when it never asked."""
    raised: StoreUnavailable | SessionConflict | None = None
    """The last error of ours that the app got from this session: what a 500 of the app's is really about."""

    def __init__(self, service: SessionService, scope: Mapping[str, Any]) -> None:
        self._service = service
        self._scope = scope
        self._headers_sent = False

    def mark_accessed(self) -> None:
        """Raises ``StoreUnavailable`` when the session could not be read."""
        self.accessed = True
        if self._failure is not None:
            self.raised = StoreUnavailable(self._failure.reason, retry_after=self._failure.retry_after)
            raise self.raised from self._failure

    def mark_modified(self) -> None:
        """Raises ``RuntimeError`` after the response has started, ``StoreUnavailable`` when the session could
        not be read.
        """
        self.mark_accessed()
        if self.sealed:
            raise RuntimeError(
                "the session was changed after the response started: this change would be lost"
            )
        if self._degraded:
            # Saving would give the visitor a new anonymous session in place of the one that could not be
            # read.
            self.raised = StoreUnavailable("the session could not be read, so it cannot be changed")
            raise self.raised
        self.modified = True

    def clear(self) -> None:
        """Log out, at save time: data and user are gone, and with them the stored session."""
        super().clear()
        self.touched = frozenset()
        if self._record is not None:
            self._pending_end = self._pending_end or self._record.handle
            self._unbind()

    # For the middleware

    async def fetch(self, handle: Handle, secret: bytes) -> None:
        """Become the session that the cookie names, which the cache does not have.

        A store that does not answer is no error here: the first access raises, or the session is empty and
        read-only, or the last confirmed state, as ``on_store_error`` says.
        """
        store = self._service.store
        entry: Entry | None
        try:
            entry = await self._allowance().spend(lambda left: store.fetch(handle, timeout=left))
        except StoreUnavailable as error:
            policy = self._service.config.on_store_error
            entry = store.cache.stale(handle) if policy == "stale" else None
            if entry is None:
                self._degraded = policy == "anonymous"
                self._unread = handle, secret
                self._failure = None if self._degraded else error
                return
        self.open(entry, secret)

    def open(self, entry: Entry, secret: bytes) -> None:
        """Become the session in ``entry``, if there is one and ``secret`` opens it.

        A wrong secret is an unknown session. Unknown ids are never adopted: that would be session fixation.
        """
        record = entry.record
        if record is None:
            return
        digest = secret_hash(secret)
        if compare_digest(digest, record.secret) or (
            record.previous is not None
            and compare_digest(digest, record.previous)
            and boot_clock() < entry.read_at + record.previous_for
        ):
            self._bind(entry, record)
            if self._service.rolling:
                self._secret = secret.decode()

    def unwatch(self) -> None:
        """The request is over: the session's end is not waited for any more."""
        if self.watched is not None:
            self._service.unwatch(self.watched)

    async def verify(self) -> float | None:
        """Whether the store still has this session for this user: the seconds it has left, or ``None``. Never
        cached.

        Raises:
            StoreUnavailable: it could not be asked.
        """
        record = self._record
        if record is None:
            return None
        fresh = await self._spend(lambda left: self._service.store.read_fresh(record.handle, timeout=left))
        if fresh is None or fresh.user != record.user or record.secret not in (fresh.secret, fresh.previous):
            return None
        return float(fresh.expires_in)

    @property
    def stored(self) -> Record | None:
        """The record, without counting as an access and without raising."""
        return self._record

    @property
    def unsaved(self) -> bool:
        """Whether a stored session holds changes that were not saved. Free when the app never looked."""
        if not (self.modified or self.exposed) or self._record is None:
            return False
        try:
            return any(self._differences())
        except (TypeError, ValueError):
            return True

    @property
    def failure(self) -> StoreUnavailable | None:
        """Why it could not be read; ``None`` when it could."""
        return self._failure

    @property
    def unread(self) -> bool:
        """Whether the store did not answer, whatever ``on_store_error`` makes of that."""
        return self._failure is not None or self._degraded

    def replace(self, values: Mapping[str, Any]) -> None:
        """The app put a plain dict in our place: those are the contents now."""
        for key, value in values.items():
            encode_value(key, value)
        self.mark_modified()
        self.exposed = True
        self._touch(dict.keys(self))
        dict.clear(self)
        dict.update(self, values)
        self._touch(values)

    @property
    def due(self) -> bool:
        """Whether ``commit`` has anything to do: something may have changed, or it is time to extend the idle
        time.
        """
        if self.modified or self.exposed:
            return True
        record = self._record
        return record is not None and boot_clock() >= self._touch_at and self._touch_due(record)

    async def commit(self) -> None:
        """Save before the headers go out, in as few round trips as possible: none when nothing is ``due``."""
        renewal = self._secret != "" and self.accessed and boot_clock() >= self._touch_at
        if self.modified or self.exposed:
            await self.save()
        elif self._record is not None:
            await self._touch_when_due(self._record)
        if renewal and self._record is not None and self._cookie is None:
            await self._renew_cookie(self._record)

    def cookie_header(self) -> tuple[bytes, bytes] | None:
        """The ``Set-Cookie`` header to send, or ``None``. From now on no cookie can be set."""
        self._headers_sent = True
        if self._cookie == "clear" and self._pending_end is None:
            return self._service.cookie.clear()
        if self._cookie == "set" and self._record is not None:
            max_age = self._max_age(self._record)
            return self._service.cookie.set(self._record.handle, self._secret, max_age=max_age)
        return None

    async def withdraw(self) -> None:
        """The response that was to bring the cookie of a new sign-in is not sent: no client can use that
        session, so it is ended.
        """
        record = self._record
        if record is not None and record.user is not None and self._created and not self._headers_sent:
            self._lose()
            await self._service.abandon(record.handle, self._allowance())

    def check_sealed(self) -> None:
        """Raises ``RuntimeError`` when a nested value was changed after the response started."""
        if self.exposed and self._record is not None and not self._lost:
            changed, removed = self._differences()
            if changed or removed:
                names = ", ".join(repr(key) for key in (*changed, *removed))
                raise RuntimeError(f"the session was changed after the response started; lost: {names}")

    # Saving

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
        if self._pending_end is not None:
            with self._noting():
                await self._service.end(
                    self._pending_end,
                    code=CloseCode.SESSION_ENDED,
                    reason=_LOGGED_OUT,
                    timeout=1.0,
                    budget=self._allowance(),
                )
            self._pending_end = None  # only now: an end that was not confirmed is tried again
        if self._lost or self._degraded:
            return False
        record = self._record
        changed, removed = self._differences()
        if record is None:
            if changed:
                config = self._service.config
                await self._create(None, idle=config.idle_timeout, absolute=config.absolute_timeout)
            return True
        if not changed and not removed:
            return await self._touch_when_due(record)
        return await self._write(record, changed, removed)

    # Internals

    def _bind(self, entry: Entry, record: Record) -> None:
        self._record = record
        self._lost = False  # an earlier cookie of this request may have named a corrupt record
        self._set_expiry(entry.expires_at, record)
        if self.touched:
            self.touched = frozenset()
        dict.clear(self)
        try:
            entry.fill(self)
        except msgspec.DecodeError:
            # A damaged record concerns this session only: it is treated as missing.
            self._service.store.damage.found(record.handle, "holds a value that cannot be read")
            self._lose()

    def _set_expiry(self, expires_at: float, record: Record) -> None:
        self._expires_at = expires_at
        # Near the absolute timeout touching gains nothing.
        extensible = record.absolute_in > record.expires_in
        self._touch_at = expires_at - record.idle * (1 - _TOUCH_AFTER) if extensible else math.inf
        if extensible and self._service.rolling:
            # The first use in each tenth of the clock, also by a request that writes and so extends the
            # session itself: else a session that every request writes would never have its cookie renewed.
            # The time of the last use is right to one round trip: near a border there may be one renewal too
            # many.
            self._touch_at -= self._touch_at % (record.idle * _TOUCH_AFTER)

    def _unbind(self) -> None:
        self._record = None
        self._secret = ""
        self._cookie = "clear"

    def _lose(self) -> None:
        # Ended elsewhere while this request was under way. No cookie either: it could overwrite that of a
        # newer login.
        self._record = None
        self._secret = ""
        self._cookie = None
        self._lost = True

    def _refuse_late(self, what: str) -> None:
        if self._headers_sent:
            raise RuntimeError(f"{what} needs a cookie to be set, and the response headers have been sent")

    async def _read_again(self) -> None:
        """Read again where an empty session stands for a failed read.

        Raises:
            StoreUnavailable: it cannot be read now either.
        """
        if self._degraded and self._unread is not None:
            handle, secret = self._unread
            entry = await self._spend(lambda left: self._service.store.read(handle, timeout=left))
            self._degraded, self._unread = False, None
            self.open(entry, secret)

    def _allowance(self) -> Budget:
        # A request's until its response starts. After that the session lives on, for hours on a WebSocket,
        # and each call has a deadline of its own.
        if self._budget is None or self._headers_sent:
            self._service.node.ensure_started("using a session")
            self._budget = Budget(self._service.node.deadline)
        return self._budget

    async def _spend(self, work: Any) -> Any:
        with self._noting():
            return await self._allowance().spend(work)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable as error:
            self.raised = error
            raise
        self.raised = None  # what went wrong before has been made good

    def _differences(self) -> tuple[dict[str, bytes], list[str]]:
        """What this request changed, by its assignments or in place: new values, and removed keys."""
        known = _NO_FIELDS if self._record is None else self._record.fields
        changed = {}
        for key, value in dict.items(self):
            before = known.get(key)
            data = encode_value(key, value, before)
            if data is not before or key in self.touched:
                changed[key] = data
        removed = [key for key in {*known, *self.touched} if not dict.__contains__(self, key)]
        if changed:
            size = sum(map(len, changed.values())) + sum(len(v) for k, v in known.items() if k not in changed)
            if size > self._service.config.max_bytes:
                raise ValueError(
                    f"the session holds {size} bytes; max_bytes is {self._service.config.max_bytes}"
                )
        return changed, removed

    async def _create(
        self,
        user: UserId | None,
        *,
        idle: float,
        absolute: float,
        persistent: bool = False,
        replaces: Handle | None = None,
        carries: bool = False,
    ) -> None:
        """Store a new session. ``replaces`` is ended then; ``carries``: the new one gets what it held."""
        if self._headers_sent:
            raise RuntimeError(
                "a new session needs a cookie to be set, and the response headers have been sent"
            )
        handle, secret, write_id = new_handle(user), new_secret(), new_token()
        known = self._record.fields if carries and self._record is not None else _NO_FIELDS
        own: set[str] = set().union(*self._differences()) if carries else set()
        fields = {key: encode_value(key, value, known.get(key)) for key, value in dict.items(self)}
        agent, address = device_of(self._scope)
        draft = NewSession(
            handle=handle,
            secret=secret_hash(secret.encode()),
            user=user,
            fields=fields,
            write_id=write_id,
            idle=idle,
            absolute=absolute,
            persistent=persistent,
            epoch=new_token() if user is not None else "",
            agent=agent,
            address=address,
        )
        touched, self.touched = self.touched, frozenset()
        sent_at = boot_clock()
        stored = False
        try:
            created_at = await self._spend(lambda left: self._service.store.create(draft, timeout=left))
            stored = True
            record = self._new_record(draft, created_at)
            if replaces is not None:
                record = await self._replace(replaces, record, known if carries else None, own)
        except (StoreUnavailable, asyncio.CancelledError) as error:
            self._touch(touched)
            in_doubt = not isinstance(error, StoreUnavailable) or error.outcome_unknown
            if user is not None and (stored or in_doubt):
                await self._service.abandon(handle, self._allowance())
            raise
        self._record = record
        self._set_expiry(sent_at + min(idle, absolute), self._record)
        self.modified = False
        self._secret = secret
        self._cookie = "set"
        self._created = True
        self._lost = False

    def _new_record(self, draft: NewSession, created_at: float) -> Record:
        return Record(
            handle=draft.handle,
            secret=draft.secret,
            previous=None,
            previous_for=0.0,
            user=draft.user,
            version=1,
            write_id=draft.write_id,
            created_at=created_at,
            expires_in=min(draft.idle, draft.absolute),
            absolute_in=draft.absolute,
            idle=draft.idle,
            persistent=draft.persistent,
            fields=draft.fields,
        )

    async def _replace(
        self, handle: Handle, record: Record, known: Mapping[str, bytes] | None, own: Set[str]
    ) -> Record:
        """End the session that ``record`` replaces. ``known`` is what of it went into ``record``, besides the
        request's ``own`` keys. What other requests have written meanwhile goes there first: the session is
        ended only if it has not changed since, so that nothing is lost when this fails. ``None``: nothing is
        carried over.
        """
        old = self._record
        # An anonymous session gives no rights: nodes may serve it until their lease lapses.
        anonymous = old is not None and old.user is None
        expected = None if known is None or old is None else old.write_id
        for _ in range(_TRIES):
            try:
                with self._noting():
                    receipt = await self._service.end(
                        handle,
                        code=CloseCode.FORCE_RECONNECT,
                        reason="signed in",
                        timeout=0.0 if anonymous else self._service.node.deadline,
                        budget=self._allowance(),
                        expected=expected,
                    )
            except Overtaken as now:
                assert known is not None
                record = await self._carry(handle, record, known, now.fields, own)
                known, expected = now.fields, now.write_id
            else:
                if known is not None and not receipt.sessions:
                    # It was over before: what it held is not handed on.
                    record = await self._carry(handle, record, known, _NO_FIELDS, own)
                return record
        raise StoreUnavailable("other requests went on writing the session that is signed in")

    async def _carry(
        self,
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
        changed = {key: data for key, data in held.items() if key not in own and data != known.get(key)}
        removed = [key for key in known if key not in own and key not in held]
        if not changed and not removed:
            return record
        try:
            values = Decoded(changed)
        except msgspec.DecodeError:
            logger.error("session %s holds a value that is not msgpack: not carried over", handle)
            return record
        write_id = new_token()
        outcome = await self._spend(
            lambda left: self._service.store.write(
                record.handle,
                changed=changed,
                removed=removed,
                write_id=write_id,
                expected=None,
                message=self._service.changed(record.handle),
                ended=b"",
                timeout=left,
            )
        )
        if outcome == "gone":
            raise StoreUnavailable("the user was logged out meanwhile")
        # A value that the app may hold stays the one that it sees, and counts as changed only when the app
        # changes it.
        kept = {key: dict.__getitem__(self, key) for key in (*changed, *removed) if self._held_by_app(key)}
        values.into(self)
        fields = {**record.fields, **changed}
        for key in removed:
            dict.pop(self, key, None)
            fields.pop(key, None)
        dict.update(self, kept)
        fields.update({key: record.fields[key] for key in kept})
        return msgspec.structs.replace(record, fields=fields, write_id=write_id, version=record.version + 1)

    async def _write(self, record: Record, changed: dict[str, bytes], removed: list[str]) -> bool:
        handle, write_id = record.handle, new_token()
        service = self._service
        # The store decides whether that leaves the session empty: it may hold what this request has not read.
        may_end = not changed and record.user is None
        run_id = service.store.run_id(int(handle[:2], 16)) if may_end else None
        touched, self.touched = self.touched, frozenset()
        sent_at = boot_clock()
        try:
            outcome = await self._spend(
                lambda left: service.store.write(
                    handle,
                    changed=changed,
                    removed=removed,
                    write_id=write_id,
                    expected=record.write_id if service.config.conflict == "error" else None,
                    message=service.changed(handle),
                    ended=service.ended(handle, _LOGGED_OUT) if may_end else b"",
                    timeout=left,
                )
            )
            if outcome == "conflict":
                self.raised = SessionConflict(handle)
                raise self.raised
        except BaseException:
            self._touch(touched)
            raise
        if outcome == "gone":
            self._lose()
            return False
        if outcome == "ended":
            service.was_ended(handle, _LOGGED_OUT, run_id)
            dict.clear(self)
            self._unbind()
            return True
        fields = {key: value for key, value in {**record.fields, **changed}.items() if key not in removed}
        self._record = msgspec.structs.replace(record, fields=fields)
        if outcome == "written":
            self._record = msgspec.structs.replace(
                self._record, write_id=write_id, version=record.version + 1
            )
        self._set_expiry(max(self._expires_at, sent_at + min(record.idle, record.absolute_in)), record)
        return True

    def _touch_due(self, record: Record) -> bool:
        # A request that does not use the session leaves the renewal of the cookie to one that does, for a
        # while: its response may be cached for everyone.
        wait = record.idle * _TOUCH_AFTER if self._service.rolling and not self.accessed else 0.0
        return boot_clock() >= self._touch_at + wait

    def _max_age(self, record: Record) -> int | None:
        if record.persistent:
            return int(min(record.idle, record.absolute_in))
        most = self._service.config.cookie.max_age
        return None if most is None else int(min(most, record.absolute_in))

    async def _renew_cookie(self, record: Record) -> None:
        # The only Set-Cookie by a request that did not make the session. The store is asked now: a login, a
        # logout or a rotation since this request was read must not be undone in the browser. What remains is
        # a response that is overtaken on its way.
        if self._max_age(record) is None:
            return
        store = self._service.store
        try:
            fresh = await self._allowance().spend(lambda left: store.read_fresh(record.handle, timeout=left))
        except StoreUnavailable as error:
            logger.debug("the cookie of session %s was not renewed: %s", record.handle, error.reason)
            return
        if fresh is not None and compare_digest(fresh.secret, secret_hash(self._secret.encode())):
            self._record = msgspec.structs.replace(record, absolute_in=fresh.absolute_in)
            self._cookie = "set"

    async def _touch_when_due(self, record: Record) -> bool:
        if not self._touch_due(record):
            return True
        store = self._service.store
        sent_at = boot_clock()
        try:
            alive = await self._allowance().spend(lambda left: store.touch(record.handle, timeout=left))
        except StoreUnavailable as error:
            # Nothing of the app's is lost, and a request that only reads is answered without the store for as
            # long as the cache may be. The next one tries again.
            logger.debug("the idle time of session %s was not extended: %s", record.handle, error.reason)
            return True
        if not alive:
            self._lose()
            return False
        self._set_expiry(sent_at + min(record.idle, record.absolute_in), record)
        return True
