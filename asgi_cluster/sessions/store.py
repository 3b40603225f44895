"""The port that a session store fills: one method, one round trip, all or nothing.

A record is keyed by its handle. ``fields`` are the application's values, each encoded by itself, so that two
requests that change different keys do not undo each other. All times inside a store are the store's own
clock; what leaves it is a remaining duration, so that no two clocks are ever compared.

Every method takes ``timeout``, seconds, and raises ``StoreUnavailable`` when no reply came in that time. A
method that changes something publishes ``message`` (see ``bus.messages``) to the nodes that watch the
handle's bucket, *before* it changes it and in the same atomic step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from asgi_cluster.ids import Handle, UserId

__all__ = [
    "LOGOUT_KEPT",
    "UNKNOWN_NODES",
    "Change",
    "Device",
    "EndResult",
    "LockStore",
    "NewSession",
    "Record",
    "RecordStore",
    "SessionStore",
    "UserLogout",
    "UserStore",
    "WriteOutcome",
]

WriteOutcome = Literal["written", "unchanged", "ended", "gone", "conflict"]
"""``unchanged``: the record holds these values already; version and write id are as before. ``ended``:
nothing was left of an anonymous session, and it was removed. ``gone``: the record does not exist any more, or
its user was logged out; nothing was written.
"""

UNKNOWN_NODES = "?"
"""In ``EndResult.nodes``: the registry did not answer. No node has this id and none will acknowledge, so that
a caller that waits for all of them waits for the lease."""

LOGOUT_KEPT = 86400.0
"""Seconds for which ``UserStore.logouts`` finds a user's logout, at least."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One stored session, as read at one moment. Durations are seconds from when the read was *sent*."""

    handle: Handle
    secret: bytes
    """SHA-256 of the cookie's secret."""
    previous: bytes | None
    """SHA-256 of the secret before the last rotation, while its grace lasts; else ``None``."""
    previous_for: float
    """How long ``previous`` is still good."""
    user: UserId | None
    version: int
    write_id: str
    """Changes with every write: what ``conflict="error"`` compares."""
    created_at: float
    """Unix time of the store's clock."""
    expires_in: float
    """Until the idle or the absolute timeout, whichever comes first."""
    absolute_in: float
    """Until the absolute timeout."""
    idle: float
    """The idle timeout of this session."""
    persistent: bool
    """Made by ``login(lifetime=…)``: its cookie outlives the browser session."""
    fields: Mapping[str, bytes]
    """The application's values, each in msgpack."""


class NewSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session to be created."""

    handle: Handle
    secret: bytes
    user: UserId | None
    fields: Mapping[str, bytes]
    write_id: str
    idle: float
    absolute: float
    persistent: bool = False
    epoch: str = ""
    """A nonce to become the user's epoch, if the user has none yet. Chosen by the caller, so that a script
    stays pure.
    """
    agent: str = ""
    """The User-Agent header of the login, at most 256 characters, for the list of devices."""
    address: str = ""
    """The client address of the login, for the list of devices."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A write to a session that exists."""

    changed: Mapping[str, bytes]
    """Fields to be set."""
    removed: Sequence[str] = ()
    write_id: str
    """That of the record after this write."""
    expected: str | None = None
    """The write id that the caller has read; ``None``: merge with whatever was written since."""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One signed-in session in a user's list. Unix times of the store's clock."""

    handle: Handle
    created_at: float
    seen_at: float
    """When the idle time was last extended: right to a tenth of the idle timeout."""
    expires_in: float
    agent: str
    address: str


class EndResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ending sessions did."""

    sessions: int
    """Records that existed and are gone."""
    nodes: Sequence[str]
    """Nodes registered at the moment of the change: those that must answer. May hold ``UNKNOWN_NODES``."""
    replicas: int | None = None
    """Replicas that confirmed the write, when ``WAIT`` was called; else ``None``."""
    handles: Sequence[Handle] = ()
    """Of ``end_all``: the sessions that were ended."""
    overtaken: str = ""
    """Of ``end`` with ``expected``: the write id that the session has instead. Nothing was ended then."""
    fields: Mapping[str, bytes] = {}
    """Of an ``end`` that was overtaken: what the session holds."""


class UserLogout(msgspec.Struct, frozen=True, kw_only=True):
    """The last time that a user was logged out everywhere, as read at one moment."""

    id: str
    """The ``epoch`` that ``end_all`` was given."""
    ago: float
    """Seconds, by the store's clock, from then to the read."""
    keep: Handle | None
    """The session that it kept, when that is not one of the user's own; else ``None``."""
    before: float | None
    """Seconds since the last logout that did not keep ``keep``; ``None`` when there is none, or no ``keep``.
    """


class RecordStore(Protocol):
    """The record of each session."""

    def run_id(self, bucket: int) -> str | None:
        """The server that holds a bucket now: another one may lack the last changes. ``""``: one that
        loses nothing; ``None``: not connected.
        """
        ...

    async def read(self, handle: Handle, *, timeout: float) -> Record | None:
        """The record, or ``None`` when there is none, it has expired, or its user was logged out."""
        ...

    async def create(self, new: NewSession, *, timeout: float) -> float:
        """Store a new session; with a user, enter it in the user's index. Publishes nothing: no node
        can have cached it. Its ``created_at``.
        """
        ...

    async def write(
        self,
        handle: Handle,
        change: Change,
        *,
        message: bytes,
        ended: bytes = b"",
        timeout: float,
    ) -> WriteOutcome:
        """Set and remove fields of a session that still exists, and extend its idle time.

        Nothing is published when the record holds these values already. When the removals leave nothing of an
        anonymous session it is removed, and ``ended`` is published in place of ``message``; with ``b""`` it
        stays, empty.
        """
        ...

    async def touch(self, handle: Handle, *, timeout: float) -> bool:
        """Extend the idle time. False when the session is gone. Publishes nothing: a cache may only drop
        earlier.
        """
        ...

    async def rotate(
        self,
        handle: Handle,
        *,
        secret: bytes,
        current: bytes,
        grace: float,
        write_id: str,
        message: bytes,
        timeout: float,
    ) -> WriteOutcome:
        """Replace the secret whose hash is ``current``; it stays good for ``grace`` seconds. Another current
        secret: ``conflict``.
        """
        ...

    async def end(
        self, handle: Handle, *, message: bytes, expected: str | None = None, timeout: float
    ) -> EndResult:
        """Remove one session, and its entry in the user's index. Published even when there was none.

        ``expected`` is the write id that the caller read: another one means ``EndResult.overtaken``, and
        nothing is removed or published. ``None``: whatever was written.
        """
        ...


class UserStore(Protocol):
    """The sessions of each user."""

    async def devices(self, user: UserId, *, timeout: float) -> Sequence[Device]:
        """The user's current sessions, the most recently used first. Prunes what expired."""
        ...

    async def end_all(
        self, user: UserId, *, keep: Handle | None, epoch: str, message: bytes, timeout: float
    ) -> EndResult:
        """Give the user a new epoch, so that every session but ``keep`` ends at once, and remove their
        records. ``messages.name_ended`` says which in the message. ``epoch`` also names this logout.
        """
        ...

    async def logouts(self, users: Sequence[UserId], *, timeout: float) -> Mapping[UserId, UserLogout]:
        """The last ``end_all`` of these users (at least one), of those who had one lately
        (``LOGOUT_KEPT``).
        """
        ...


class LockStore(Protocol):
    """A lock for each session."""

    async def lock(self, handle: Handle, *, token: str, hold: float, timeout: float) -> bool:
        """Take the session's lock for ``hold`` seconds. False when another caller has it."""
        ...

    async def unlock(self, handle: Handle, *, token: str, timeout: float) -> bool:
        """Give the lock back, if ``token`` still holds it."""
        ...


class SessionStore(RecordStore, UserStore, LockStore, Protocol):
    """Where sessions live."""
