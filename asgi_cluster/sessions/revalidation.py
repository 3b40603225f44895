"""Whether the sessions of open sockets still exist, and whether the users of the others were logged out.

A logout closes sockets through the bus. What the bus may have lost is found here: after every gap, once a
minute anyhow, and when a session's time is up, the store is read again. For a socket that acts as a user
without a session of that user (``identify``, a connect hook, ``accept(user_id=)``) the user's last logout is
read: how long ago it was, against how long ago the socket began. So nothing is read for that when a
socket connects.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from asgi_cluster.codes import CloseCode
from asgi_cluster.exceptions import ClusterError, StoreUnavailable
from asgi_cluster.ids import Handle, UserId
from asgi_cluster.node import Node
from asgi_cluster.sessions.reads import SessionReader
from asgi_cluster.sessions.store import UserLogout
from asgi_cluster.tasks import spawn

__all__ = ["OpenSockets", "Revalidator"]

logger = logging.getLogger("asgi_cluster.sessions")

_PERIOD = 60.0
_RETRY = 2.0
_AT_ONCE = 64  # sessions or users that are read together: a few milliseconds of the event loop
_LONGEST_TIMER = 3600.0
_SOON = 0.1  # seconds that an answer may take which says how long ago a logout was


class OpenSocket(Protocol):
    """One of this node's sockets."""

    handle: str | None
    state: Literal["connecting", "open", "closed"]
    close_code: int | None
    timer: asyncio.TimerHandle | None
    tasks: asyncio.TaskGroup

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call it on the socket's loop."""
        ...


class OpenSockets(Protocol):
    """This node's sockets, by session and by user."""

    def handles(self) -> Iterable[str]:
        """Sessions with at least one open socket here."""
        ...

    def close_session(self, handle: str, code: int, reason: str) -> int:
        """Close the sockets of a session; how many there were."""
        ...

    def users(self) -> Sequence[str]:
        """Users as whom at least one open socket here acts."""
        ...

    def acts_without_session(self, user: str) -> bool:
        """Whether one of them acts as ``user`` and has no session of that user."""
        ...

    def close_logged_out(
        self, user: str, name: str, *, at: float, keep: str | None, before: float | None
    ) -> None:
        """Close those of them that are older than the logout ``name``, which was at ``at``."""
        ...


class Revalidator:
    """Closes sockets whose session is over: 4501 ended, 4502 expired, 4101 when the store did not
    answer for too long.
    """

    def __init__(
        self,
        reader: SessionReader,
        sockets: OpenSockets,
        *,
        node: Node,
        unverified_limit: float,
    ) -> None:
        self._reader = reader
        self._sockets = sockets
        self._deadline = node.deadline
        self._unverified_limit = unverified_limit
        self._clock = node.clock
        self._wake: asyncio.Event | None = None

    def wake(self) -> None:
        """Messages may have been lost: read every session with an open socket again."""
        if self._wake is not None:
            self._wake.set()

    def recheck(self, sockets: Sequence[OpenSocket], then: Callable[[int], None]) -> None:
        """Read the sessions of these sockets (at least one) now. From any thread.

        ``then`` is called with the number of sockets that were closed, if the store answered for all of them.
        """
        handles = {socket.handle for socket in sockets if socket.handle is not None}
        sockets[0].call(self._recheck_soon, sockets[0].tasks, handles, then)

    def _recheck_soon(
        self, tasks: asyncio.TaskGroup, handles: Iterable[str], then: Callable[[int], None]
    ) -> None:
        spawn(tasks, self._recheck(handles, then), name="asgi-cluster session check")

    async def _recheck(self, handles: Iterable[str], then: Callable[[int], None]) -> None:
        closed = await self._close_ended(handles)
        if closed is None:
            self.wake()
        else:
            then(closed)

    async def run(self) -> None:
        """For as long as the cluster is started."""
        self._wake = asyncio.Event()
        verified_at = self._clock()
        try:
            while True:
                pause = _PERIOD * random.uniform(0.75, 1.25)
                if await self._close_ended(self._sockets.handles()) is not None:
                    verified_at = self._clock()
                    if not await self._close_logged_out():
                        pause = _RETRY * random.uniform(0.5, 1.0)
                else:
                    pause = _RETRY * random.uniform(0.5, 1.0)
                    # Spread, so that the nodes' clients do not all come back in the same second.
                    limit = self._unverified_limit * random.uniform(0.75, 1.0)
                    if self._clock() - verified_at > limit:
                        self._give_up()
                        verified_at = self._clock()
                try:
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                except TimeoutError:
                    continue
                finally:
                    self._wake.clear()
        finally:
            self._wake = None

    def watch(self, socket: OpenSocket, expires_in: float) -> None:
        """Read the session again when its time is up; requests may have extended it meanwhile. Nothing is
        read for a socket that is closed: it may have gone while the last reply was under way.
        """
        if socket.state == "closed":
            return
        # asyncio refuses timers of more than a day or so on some platforms, and an hour costs nothing.
        delay = min(expires_in, _LONGEST_TIMER) + 0.01
        loop = asyncio.get_running_loop()
        socket.timer = loop.call_later(delay, self._time_is_up, socket)

    def _time_is_up(self, socket: OpenSocket) -> None:
        if socket.handle is not None and socket.close_code is None:
            spawn(socket.tasks, self._check(socket, Handle(socket.handle)), name="asgi-cluster expiry check")

    async def _check(self, socket: OpenSocket, handle: Handle) -> None:
        try:
            record = await self._reader.read_fresh(handle, timeout=self._deadline)
        except ClusterError:
            # No answer is not an expiry: the sweep closes the socket when that lasts.
            self.watch(socket, _RETRY)
            return
        if record is None:
            self._sockets.close_session(handle, CloseCode.SESSION_EXPIRED, "session expired")
        else:
            self.watch(socket, record.expires_in)

    async def _close_ended(self, asked: Iterable[str]) -> int | None:
        """Close the sockets of those sessions that are over: how many; ``None`` when the store did not
        answer.
        """
        handles = [Handle(handle) for handle in asked]
        closed = 0
        for start in range(0, len(handles), _AT_ONCE):
            some = handles[start : start + _AT_ONCE]
            answers = await asyncio.gather(*map(self._is_over, some))
            for handle, over in zip(some, answers, strict=True):
                if over:
                    closed += self._sockets.close_session(handle, CloseCode.SESSION_ENDED, "session ended")
            if None in answers:
                return None
        return closed

    async def _is_over(self, handle: Handle) -> bool | None:
        try:
            return await self._reader.read_fresh(handle, timeout=self._deadline) is None
        except StoreUnavailable:
            return None

    async def _close_logged_out(self) -> bool:
        """Close the sockets of users who were logged out, as far as they have no session of their own.
        False when the store did not answer.
        """
        users = self._sockets.users()
        for start in range(0, len(users), _AT_ONCE):
            some = [
                UserId(user)
                for user in users[start : start + _AT_ONCE]
                if self._sockets.acts_without_session(user)
            ]
            if not some:
                await asyncio.sleep(0)
                continue
            try:
                found = await self._logouts(some)
            except StoreUnavailable:
                return False
            now = self._clock()
            for user, logout in found.items():
                before = None if logout.before is None else now - logout.before
                self._sockets.close_logged_out(
                    user, logout.id, at=now - logout.ago, keep=logout.keep, before=before
                )
        return True

    async def _logouts(self, users: Sequence[UserId]) -> Mapping[UserId, UserLogout]:
        asked = self._clock()
        found = await self._reader.store.logouts(users, timeout=self._deadline)
        if found and self._clock() - asked > _SOON:
            # By as much a logout may seem later than it was. When the connection was waited for, the second
            # answer comes at once.
            found = await self._reader.store.logouts(users, timeout=self._deadline)
        return found

    def _give_up(self) -> None:
        handles = list(self._sockets.handles())
        if handles:
            logger.warning(
                "closing the sockets of %d sessions that could not be verified for too long", len(handles)
            )
        for handle in handles:
            self._sockets.close_session(handle, CloseCode.UNVERIFIED, "session could not be verified")
