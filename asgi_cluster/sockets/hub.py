"""The index of this node's sockets, by session and by user, and what is done to them: closed, sent to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Container, Iterable, Sequence
from typing import Protocol, TypeVar

from asgi_cluster.bus.messages import PersonalMessage
from asgi_cluster.codes import CloseCode
from asgi_cluster.compat.uvicorn import reloads
from asgi_cluster.ids import ConnectionId
from asgi_cluster.sockets.closes import Closes
from asgi_cluster.sockets.logouts import RecentLogouts
from asgi_cluster.sockets.outboxes import Outboxes
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.sockets.socket import Member, Socket
from asgi_cluster.sockets.stats import RealtimeStats
from asgi_cluster.sockets.wire import Wire

__all__ = ["Hub", "Watcher"]

S = TypeVar("S")

_AT_ONCE = 50  # sockets that a step of a drain closes: some milliseconds

_UNCERTAIN = 1.0  # seconds by which an interval may differ between the store's clock and this node's


class Watcher(Protocol):
    """Something that ends with a session as a socket does, and is none: ``Session.ended``, in ``sessions``,
    which this folder does not import.
    """

    @property
    def handle(self) -> str: ...
    @property
    def owner(self) -> str | None: ...

    def close(self, code: int, reason: str) -> bool:
        """The session has ended. False: it does not count as a socket."""
        ...

    def may_have_ended(self) -> None:
        """The session may have ended."""
        ...


class Hub:
    """The index of this node's sockets. ``outbox_bytes`` bounds what may wait for each."""

    def __init__(self, *, outbox_bytes: int) -> None:
        self.outboxes = Outboxes(limit=outbox_bytes)
        self._sockets: dict[ConnectionId, Socket] = {}
        self._by_handle: dict[str, set[Socket | Watcher]] = {}
        self._by_user: dict[str, set[Socket]] = {}
        # Watchers, and sockets that act as another user than their session's: by the session's user.
        self._by_owner: dict[str, set[Socket | Watcher]] = {}
        self.logouts = RecentLogouts()
        self.closes = Closes()
        # memory:// joins loops in several threads; elsewhere it is never contended.
        self._lock = threading.RLock()

    # Sockets

    def register(self, socket: Socket) -> None:
        """From now on the socket is found by its session and its user."""
        with self._lock:
            self._sockets[socket.id] = socket
            if socket.handle is not None:
                self._by_handle.setdefault(socket.handle, set()).add(socket)
            self._index_user(socket)

    def _index_user(self, socket: Socket) -> None:
        if socket.user is not None:
            self._by_user.setdefault(socket.user, set()).add(socket)
        if socket.owner is not None and socket.owner != socket.user:
            self._by_owner.setdefault(socket.owner, set()).add(socket)

    def unregister(self, socket: Socket) -> None:
        """It is found no more, and leaves its rooms. Harmless when it was never registered."""
        with self._lock:
            self._sockets.pop(socket.id, None)
            _discard(self._by_handle, socket.handle, socket)
            _discard(self._by_user, socket.user, socket)
            _discard(self._by_owner, socket.owner, socket)
        if socket.connection is not None:
            socket.connection.gone()
        if socket.outbox is not None:
            socket.outbox.close()

    def watch(self, watcher: Watcher) -> None:
        """From now on ``watcher`` ends with its session."""
        with self._lock:
            self._by_handle.setdefault(watcher.handle, set()).add(watcher)
            if watcher.owner is not None:
                self._by_owner.setdefault(watcher.owner, set()).add(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """It does not any more. Harmless when it never did."""
        with self._lock:
            _discard(self._by_handle, watcher.handle, watcher)
            _discard(self._by_owner, watcher.owner, watcher)

    def set_user(self, socket: Socket, user: str | None, *, since: float) -> None:
        """The socket acts as ``user`` from now on. The decision about that began at ``since``."""
        with self._lock:
            socket.since = since
            _discard(self._by_user, socket.user, socket)
            _discard(self._by_owner, socket.owner, socket)
            socket.user = user
            if socket.id in self._sockets:
                self._index_user(socket)

    def close_if_logged_out(self, socket: Socket, *, since: int, final: bool = True) -> None:
        """Close a socket whose user was named just now, if that user was logged out after ``since`` (a
        reading of ``logouts.last``).

        With 4501; with 3011, so that the client reconnects and its user is determined again, when ``final``
        is false or the record of logouts does not reach back so far. The socket is in the index already: a
        logout that is not in the record yet finds the socket.
        """
        if socket.user is None:
            return
        ended = self.logouts.since(since, socket.user, socket.handle)
        if ended and final:
            socket.close(CloseCode.SESSION_ENDED, "logged out")
        elif ended is not False:
            socket.close(CloseCode.FORCE_RECONNECT, "the user may have been logged out meanwhile")

    def handles(self) -> Iterable[str]:
        """Sessions with an open socket, or a watcher, here."""
        return tuple(self._by_handle)

    def close_session(self, handle: str, code: int, reason: str) -> int:
        """Close a session's sockets and watchers; how many sockets there were."""
        return sum(socket.close(code, reason) for socket in tuple(self._by_handle.get(handle, ())))

    def close_user(self, user: str, code: int, reason: str) -> int:
        """Close the sockets that act as a user; how many there were."""
        return sum(socket.close(code, reason) for socket in tuple(self._by_user.get(user, ())))

    def end_user(
        self, user: str, *, keep: str | None, ended: Container[str], code: int, reason: str, name: str = ""
    ) -> int:
        """A user was logged out and the sessions ``ended`` are over: close the sockets of these sessions,
        whatever user they act as, and the sockets that act as the user with another session than one of the
        user's, or with none. How many there were. Those of the session ``keep`` stay. ``name`` as in
        ``RecentLogouts.record``.
        """
        # First: a socket that is given this user while the others are being closed finds the record.
        self.logouts.record(user, keep, name)
        return sum(
            socket.close(code, reason)
            for socket in self._acting_as(user)
            if socket.handle is None
            or (socket.handle != keep and (socket.owner != user or socket.handle in ended))
        )

    def users(self) -> Sequence[str]:
        """Users as whom at least one open socket here acts."""
        return tuple(self._by_user)

    def acts_without_session(self, user: str) -> bool:
        """Whether a socket here acts as ``user`` and has no session of that user."""
        return any(socket.owner != user for socket in tuple(self._by_user.get(user, ())))

    def close_logged_out(
        self, user: str, name: str, *, at: float, keep: str | None, before: float | None
    ) -> None:
        """Close the sockets that act as ``user`` without a session of that user and are older than the logout
        ``name``, if this node has not processed it. It was at ``at`` and kept the session ``keep``; the last
        one that did not keep that session was at ``before`` (``None``: there is none). Times as
        ``Socket.since``.

        With 4501. Those that are younger by less than the clocks may differ with 3011, so that the client
        reconnects and its user is determined again.
        """
        processed = self.logouts.has(user, name)
        for socket in tuple(self._by_user.get(user, ())):
            if socket.owner == user:
                continue
            if socket.handle is not None and socket.handle == keep:
                moment = before
            else:
                moment = None if processed else at
            if moment is None:
                continue
            if socket.since <= moment:
                socket.close(CloseCode.SESSION_ENDED, "logged out")
            elif socket.since <= moment + _UNCERTAIN:
                socket.close(CloseCode.FORCE_RECONNECT, "the user may have been logged out meanwhile")

    def sockets_of(self, user: str, *, keep: str | None) -> tuple[Socket, ...]:
        """The open sockets of a user's sessions, but those of ``keep``. The watchers of the others read the
        store themselves.
        """
        found = []
        for each in self._acting_as(user):
            if each.owner != user or each.handle == keep:
                continue
            if not isinstance(each, Socket):
                each.may_have_ended()
            elif each.close_code is None:
                found.append(each)
        return tuple(found)

    def _acting_as(self, user: str) -> tuple[Socket | Watcher, ...]:
        return (*tuple(self._by_user.get(user, ())), *tuple(self._by_owner.get(user, ())))

    def send_session(self, handle: str, message: PersonalMessage) -> int:
        """Send to a session's sockets that the cluster serves; to how many."""
        found = self._by_handle.get(handle, ())
        return _send_to([each for each in tuple(found) if isinstance(each, Socket)], message)

    def send_user(self, user: str, message: PersonalMessage) -> int:
        """Send to a user's sockets that the cluster serves; to how many."""
        return _send_to(self._by_user.get(user, ()), message)

    async def failed_closes(self, since: float) -> int:
        """How many closes, begun and counted here, have failed after ``since`` (``time.monotonic``)."""
        return await self.closes.failed(since) if self.closes else 0

    async def drain(self, seconds: float) -> None:
        """Close every socket with 3001, spread over ``seconds``, so that the clients do not all come back at
        once.
        """
        sockets = tuple(self._sockets.values())
        # 20 steps a second, and more where a step would block the loop for long.
        steps = min(len(sockets), max(1, round(seconds * 20), len(sockets) // _AT_ONCE))
        for step in range(steps):
            for socket in sockets[step::steps]:
                socket.close(CloseCode.SHUTDOWN, CloseCode.SHUTDOWN.text)
            await asyncio.sleep(seconds / steps)

    def reloads(self) -> bool:
        """Whether the server of a socket here restarts when a file changes."""
        return any(reloads(socket.server) for socket in tuple(self._sockets.values()))

    async def shutdown(self, *, timeout: float) -> None:
        """Close every socket with 3001 and wait until they are gone; what is left after ``timeout`` seconds
        is cut off.
        """
        for socket in tuple(self._sockets.values()):
            socket.close(CloseCode.SHUTDOWN, CloseCode.SHUTDOWN.text)
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while self._sockets and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # once, at the end, and sockets may go on other loops
        for socket in tuple(self._sockets.values()):
            socket.abort()
            self.unregister(socket)
            socket.detach()

    def served(self) -> tuple[Member, ...]:
        """What the open sockets that the cluster serves belong to."""
        found = (socket.connection for socket in tuple(self._sockets.values()))
        return tuple(member for member in found if member is not None)

    def member(self, connection: ConnectionId) -> Member | None:
        """What the open socket with this id belongs to."""
        socket = self._sockets.get(connection)
        return None if socket is None else socket.connection

    # Observing

    def __len__(self) -> int:
        return len(self._sockets)

    def stats(self, *, rooms: int) -> RealtimeStats:
        """A snapshot; walks the sockets once."""
        direct = 0
        fallback: dict[str, int] = {}
        for socket in tuple(self._sockets.values()):
            if not socket.why_not_direct:
                direct += 1
            else:
                fallback[socket.why_not_direct] = fallback.get(socket.why_not_direct, 0) + 1
        counters = self.outboxes.counters
        return RealtimeStats(
            connections=len(self._sockets),
            rooms=rooms,
            sent=counters.sent,
            dropped=counters.dropped,
            slow=counters.slow,
            direct=direct,
            fallback=fallback,
        )

    def __repr__(self) -> str:
        return f"<Hub {len(self._sockets)} sockets>"


def _discard(index: dict[str, set[S]], key: str | None, found: S) -> None:
    if key is None or key not in index:
        return
    index[key].discard(found)
    if not index[key]:
        del index[key]


def _send_to(sockets: Iterable[Socket], message: PersonalMessage) -> int:
    prepared: dict[Wire, PreparedMessage] = {}
    count = 0
    for socket in tuple(sockets):
        outbox = socket.outbox
        if socket.connection is None or outbox is None:
            continue
        variant = prepared.get(outbox.wire)
        if variant is None:
            variant = prepared[outbox.wire] = outbox.wire.message(message.kind, message.data)
        socket.call(outbox.push, variant)
        count += 1
    return count
