"""What one request has read of its session, and what its commit has to do. It does no I/O.

It keeps the record that was read, and finds what differs from it, key by key. A record that this request has
neither read nor created is never written, so a request that was under way during a logout cannot bring the
session back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from asgi_cluster.exceptions import SessionConflict, StoreUnavailable
from asgi_cluster.ids import Handle, secret_hash
from asgi_cluster.node import Node
from asgi_cluster.sessions.changes import Changes, differences
from asgi_cluster.sessions.codec import UNCHANGEABLE
from asgi_cluster.sessions.config import SessionConfig
from asgi_cluster.sessions.cookies import Cookie, Credentials
from asgi_cluster.sessions.deadline import Deadline, Spending
from asgi_cluster.sessions.ended import SessionEnded
from asgi_cluster.sessions.store import Record

__all__ = ["Phase", "State", "UnitOfWork"]

State = Literal["anonymous", "bound", "unread", "degraded", "lost"]
"""``anonymous``: no stored session. ``bound``: ``record`` is the stored session. ``unread``: the store did
not answer, and every access raises. ``degraded``: the same with ``on_store_error="anonymous"``; the session
is shown empty and cannot be changed. ``lost``: it was ended elsewhere during the request; nothing is written.
"""

Phase = Literal["open", "answered", "sealed"]
"""``answered``: the response headers are out, no cookie can be set any more. ``sealed``: an HTTP response has
started, and a change is an error.
"""

_NO_FIELDS: Mapping[str, bytes] = {}
_TOUCH_AFTER = 0.1
"""Of the idle timeout: a session in steady use costs one write per tenth, and not one per request."""


class UnitOfWork:
    """The state of one request's session between its read and its commit. The times are the node's clock."""

    __slots__ = (
        "__dict__", "config", "expires_at", "exposed", "phase", "record", "scope", "secret", "state",
        "touch_at",
    )  # fmt: skip

    # Class-level defaults in place of more slots: most requests change none of these, and an idle socket
    # keeps its session for hours.
    cookie: Literal["set", "clear"] | None = None
    """What the response does with the browser's cookie."""
    pending_end: Handle | None = None
    """A session that ``clear`` ended for the app. It stays pending until the store has confirmed its end."""
    created: bool = False
    """Whether this request has created the session."""
    failure: StoreUnavailable | None = None
    """Why it is ``unread`` or ``degraded``."""
    credentials: Credentials | None = None
    """What the cookie of an ``unread`` or ``degraded`` session holds."""
    raised: StoreUnavailable | SessionConflict | None = None
    """The last error of this package that the app got from this session: what a 500 of the app's is really
    about.
    """
    watched: SessionEnded | None = None
    """What the app was given to wait for the session's end; ``None`` when it never used that."""
    touched: Set[str] = frozenset()
    """The keys that the app assigned or removed since the last save. They are sent even when the record that
    was read shows the same: the store may have another value by now.
    """
    _deadline: Deadline | None = None

    def __init__(self, scope: Mapping[str, Any], config: SessionConfig) -> None:
        self.scope = scope
        self.config = config
        self.state: State = "anonymous"
        self.phase: Phase = "open"
        self.exposed = False
        """Whether the app may hold a value that can be changed in place: one that it read, or assigned."""
        self.record: Record | None = None
        self.secret = ""
        self.expires_at = self.touch_at = 0.0

    # What was read

    def bind(self, record: Record, expires_at: float) -> None:
        """``record`` is the stored session, and lasts until ``expires_at``."""
        self.state = "bound"
        self.record = record
        if self.touched:
            self.touched = frozenset()
        self._extend(expires_at, record)

    def not_read(self, credentials: Credentials, error: StoreUnavailable, *, degraded: bool) -> None:
        """The store did not answer for the session that the cookie names."""
        self.state = "degraded" if degraded else "unread"
        self.failure, self.credentials = error, credentials

    def unbind(self) -> None:
        """The session is over by this request's own doing: its cookie is cleared."""
        self.state = "anonymous"
        self.record = None
        self.secret = ""
        self.cookie = "clear"

    def lose(self) -> None:
        """The session was ended elsewhere. No cookie is set: it could overwrite that of a newer login."""
        self.state = "lost"
        self.record = None
        self.secret = ""
        self.cookie = None

    def clear(self, contents: dict[str, Any]) -> None:
        """The app clears the session, which is a logout: the commit ends the stored session."""
        self.empty(contents)
        if self.record is not None:
            self.pending_end = self.pending_end or self.record.handle
            self.unbind()

    @property
    def stored_handle(self) -> Handle | None:
        """The session that is in the store, as far as this request has found out; it may be cleared."""
        return self.pending_end or (None if self.record is None else self.record.handle)

    def holds(self, handle: Handle) -> bool:
        """Whether that is the request's session, still: checked after each reply of the store, since another
        task of the request may have ended or replaced it meanwhile.
        """
        return self.record is not None and self.record.handle == handle

    # Access

    def check_readable(self) -> None:
        """Raises ``StoreUnavailable`` when the session could not be read."""
        if self.state == "unread":
            assert self.failure is not None
            self.raised = StoreUnavailable(self.failure.reason, retry_after=self.failure.retry_after)
            raise self.raised from self.failure

    def check_writable(self) -> None:
        """Raises ``RuntimeError`` after the response has started, ``StoreUnavailable`` when degraded."""
        if self.phase == "sealed":
            raise RuntimeError(
                "the session was changed after the response started: this change would be lost"
            )
        if self.state == "degraded":
            # Saving would give the visitor a new anonymous session in place of the one that was not read.
            self.raised = StoreUnavailable("the session could not be read, so it cannot be changed")
            raise self.raised

    def check_cookie(self, what: str) -> None:
        """Raises ``RuntimeError`` when it is too late for ``what``, which sets a cookie."""
        if self.phase != "open":
            raise RuntimeError(f"{what} needs a cookie to be set, and the response headers have been sent")

    # What changed

    def touch(self, keys: Iterable[str]) -> None:
        """The app has assigned or removed these keys."""
        touched = self.touched
        if not isinstance(touched, set):
            touched = self.touched = set()
        touched.update(keys)

    def held_by_app(self, value: Any) -> bool:
        """Whether the app may hold this value of the session's, and change it in place."""
        return self.exposed and type(value) not in UNCHANGEABLE

    def empty(self, contents: dict[str, Any]) -> None:
        """Nothing of the contents is to be saved."""
        dict.clear(contents)
        self.touched = frozenset()

    @contextmanager
    def sending(self) -> Iterator[None]:
        """What the app has assigned is being saved inside; when that fails, it is still to be saved."""
        touched, self.touched = self.touched, frozenset()
        try:
            yield
        except BaseException:
            self.touch(touched)
            raise

    def changes(self, contents: dict[str, Any]) -> Changes:
        """What this request has changed. Raises as ``differences``."""
        known = _NO_FIELDS if self.record is None else self.record.fields
        return differences(contents, known, self.touched, max_bytes=self.config.max_bytes)

    def check_sealed(self, contents: dict[str, Any]) -> None:
        """Raises ``RuntimeError`` when a nested value was changed after the response started."""
        if self.state == "bound":
            changed, removed = self.changes(contents)
            if changed or removed:
                names = ", ".join(repr(key) for key in (*changed, *removed))
                raise RuntimeError(f"the session was changed after the response started; lost: {names}")

    # Deadlines and errors of the store

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note an error of the work inside in ``raised``; work that succeeds makes an earlier one good."""
        try:
            yield
        except StoreUnavailable as error:
            self._note(error)
            raise
        self._note(None)

    def _note(self, error: StoreUnavailable | None) -> None:
        self.raised = error

    def spending(self, node: Node) -> Spending:
        """``Deadline.spending`` for the work inside; its error is noted in ``raised``."""
        return self.deadline(node).spending(self._note)

    def deadline(self, node: Node) -> Deadline:
        """That of the request until its response starts. After that the session goes on, for hours on a
        WebSocket, and each call has a deadline of its own.
        """
        if self._deadline is None or self.phase != "open":
            self.next_deadline(node)
        assert self._deadline is not None
        return self._deadline

    def next_deadline(self, node: Node) -> None:
        """Another operation begins. Raises as ``Node.ensure_started``."""
        node.ensure_started("using a session")
        self._deadline = Deadline(node.deadline, node.clock)

    # What was saved

    def created_as(self, record: Record, secret: str, sent_at: float) -> None:
        """The store has created ``record`` for this request, after ``sent_at``."""
        self.state = "bound"
        self.record = record
        self._extend(sent_at + record.expires_in, record)
        self.secret = secret
        self.cookie = "set"
        self.created = True

    def rotated(self, secret: str, write_id: str) -> None:
        """The store has replaced the session's secret."""
        assert self.record is not None
        self.record = msgspec.structs.replace(
            self.record,
            secret=secret_hash(secret.encode()),
            write_id=write_id,
            version=self.record.version + 1,
        )
        self.secret = secret
        self.cookie = "set"

    def saved(self, changes: Changes, write_id: str | None, sent_at: float) -> None:
        """The store holds these changes. ``write_id`` is the new one; ``None``: it held them already."""
        record, (changed, removed) = self.record, changes
        assert record is not None
        fields = {**record.fields, **changed}
        for key in removed:
            fields.pop(key, None)
        write: dict[str, Any] = {}
        if write_id is not None:
            write = {"write_id": write_id, "version": record.version + 1}
        self.record = msgspec.structs.replace(record, fields=fields, **write)
        self.extended(sent_at, not_before=self.expires_at)

    def extended(self, sent_at: float, *, not_before: float = 0.0) -> None:
        """The store has extended the idle time, after ``sent_at``."""
        assert self.record is not None
        end = sent_at + min(self.record.idle, self.record.absolute_in)
        self._extend(max(end, not_before), self.record)

    def _extend(self, expires_at: float, record: Record) -> None:
        self.expires_at = expires_at
        # Near the absolute timeout touching gains nothing.
        extensible = record.absolute_in > record.expires_in
        self.touch_at = expires_at - record.idle * (1 - _TOUCH_AFTER) if extensible else math.inf
        if extensible and self.config.cookie.rolling:
            # The first use in each tenth of the clock, also by a request that writes and so extends the
            # session itself: else a session that every request writes would never have its cookie renewed.
            # The time of the last use is right to one round trip: near a border there may be one renewal too
            # many.
            self.touch_at -= self.touch_at % (record.idle * _TOUCH_AFTER)

    def touch_due(self, now: float, *, accessed: bool) -> bool:
        """Whether it is time to extend the idle time of the stored session."""
        if self.record is None or now < self.touch_at:
            return False
        # A request that does not use the session leaves the renewal of the cookie to one that does, for a
        # while: its response may be cached for all visitors.
        wait = self.record.idle * _TOUCH_AFTER if self.config.cookie.rolling and not accessed else 0.0
        return now >= self.touch_at + wait

    # The cookie

    def renewal_due(self, now: float, *, accessed: bool) -> bool:
        """Whether the response should bring the cookie again, because its time is extended with the session's
        (``CookieConfig.rolling``).
        """
        return self.secret != "" and accessed and now >= self.touch_at

    def cookie_header(self, cookie: Cookie) -> tuple[bytes, bytes] | None:
        """The ``Set-Cookie`` header to send, or ``None``. From now on no cookie can be set."""
        self.phase = "answered"
        if self.cookie == "clear" and self.pending_end is None:
            return cookie.clear()
        if self.cookie == "set" and self.record is not None:
            return cookie.set(self.record, self.secret)
        return None

    def __repr__(self) -> str:
        rest = f", {self.pending_end} to be ended" if self.pending_end else ""
        return f"<UnitOfWork {self.state}{rest}>"
