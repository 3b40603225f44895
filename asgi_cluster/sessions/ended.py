"""The end of a session, as an event: for responses that go on for long (SSE, streaming), which no logout
closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from asgi_cluster.exceptions import StoreUnavailable

__all__ = ["SessionEnded"]

_RETRY = 2.0
_LONGEST_WAIT = 3600.0


class SessionEnded:
    """Whether a session has ended: ``session.ended``, used as an ``asyncio.Event`` that only the cluster
    sets.

    Set by a logout on any node, by a user's logout, by a login that replaces the session, by its idle or
    absolute timeout, and when it could not be verified for ``unverified_limit`` seconds: whenever its sockets
    are closed. It belongs to its request; after it nothing is watched for it any more.
    """

    __slots__ = ("_loop", "_over", "_read", "_waiters", "handle", "owner")

    def __init__(
        self,
        handle: str,
        owner: str | None,
        read: Callable[[], Awaitable[float | None]] | None,
        *,
        over: bool = False,
    ) -> None:
        """``read`` gives the seconds that are left by the store, or ``None`` when it has no such session;
        without it there is no session, and so no end, unless it is ``over`` already.
        """
        self.handle = handle
        self.owner = owner
        self._read = read
        self._over = over
        self._waiters: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def is_set(self) -> bool:
        """Whether it has ended, as far as this node has received that."""
        return self._over

    async def wait(self) -> None:
        """Return when the session has ended; at once when it has already, also elsewhere and a moment ago.

        Reads the store when it begins and when the session's time is up, and again when the store does not
        answer. For a visitor without a stored session it never returns.
        """
        loop = self._loop = asyncio.get_running_loop()
        while not self._over:
            # Before the store is read: an end that the reply does not have yet finds this waiter.
            woken: asyncio.Future[None] = loop.create_future()
            self._waiters.add(woken)
            try:
                left = await self._left()
                if left is None:
                    self.close()
                    return
                async with asyncio.timeout(min(left, _LONGEST_WAIT)):
                    await woken
            except TimeoutError:
                continue
            finally:
                self._waiters.discard(woken)

    async def _left(self) -> float | None:
        if self._read is None:
            return _LONGEST_WAIT
        try:
            return await self._read()
        except StoreUnavailable:
            return _RETRY

    # For the hub

    def close(self, code: int = 0, reason: str = "") -> bool:
        """It has ended. From any thread. False: no socket was closed."""
        self._over = True
        self.may_have_ended()
        return False

    def may_have_ended(self) -> None:
        """It may have ended: a waiter reads the store. From any thread."""
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            return  # its loop is closed, and the waiter is gone

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def __repr__(self) -> str:
        return f"<SessionEnded {self.handle or 'without session'}: {'yes' if self._over else 'no'}>"
