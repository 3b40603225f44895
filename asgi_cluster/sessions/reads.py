"""The session store behind the local cache: single flight for reads, drop before and after a local write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager

from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, UserId
from asgi_cluster.sessions.cache import Entry, PendingRead, SessionCache
from asgi_cluster.sessions.damage import Damage
from asgi_cluster.sessions.store import (
    Device,
    EndResult,
    NewSession,
    Record,
    SessionStore,
    UserLogout,
    WriteOutcome,
)

__all__ = ["CachedStore"]


class CachedStore:
    """A ``SessionStore`` whose reads may come from the cache. Everything that changes a session goes through
    it.
    """

    def __init__(self, store: SessionStore, cache: SessionCache) -> None:
        self._store = store
        self.cache = cache
        self.ended: Container[Handle] = ()
        """Sessions that are known to be over. A store that has lost its last writes may still have them."""
        self.damage = Damage()
        """Records whose values could not be read."""

    def run_id(self, bucket: int) -> str | None:
        """See ``SessionStore.run_id``."""
        return self._store.run_id(bucket)

    async def read(self, handle: Handle, *, timeout: float) -> Entry:
        """The record (or its absence), at most one lease old with respect to changes made through this
        library.

        Concurrent reads share one read of the store, until a change overtakes it. Raises as the store.
        """
        return self.cache.get(handle) or await self.fetch(handle, timeout=timeout)

    async def fetch(self, handle: Handle, *, timeout: float) -> Entry:
        """The same, after a miss: without another look at the cache. Raises as the store."""
        loop = asyncio.get_running_loop()
        pending = self.cache.pending(handle)
        if (
            pending is not None
            and isinstance(pending.waiters, asyncio.Future)
            and pending.waiters.get_loop() is loop
        ):
            try:
                async with asyncio.timeout(timeout):
                    shared: Entry = await asyncio.shield(pending.waiters)
                return shared
            except TimeoutError as error:
                raise StoreUnavailable(f"no answer within {timeout:.2f} s") from error
            except asyncio.CancelledError:
                # Either this request was cancelled, or the one that had begun the read: then this one reads.
                if not pending.waiters.cancelled() or _cancelling():
                    raise
        return await self._read_store(self.cache.begin(handle), loop, timeout)

    async def _read_store(
        self, pending: PendingRead, loop: asyncio.AbstractEventLoop, timeout: float
    ) -> Entry:
        result: asyncio.Future[Entry] = loop.create_future()
        pending.waiters = result
        try:
            record = await self.read_fresh(pending.handle, timeout=timeout)
        except BaseException as error:
            self.cache.abort(pending)
            if isinstance(error, StoreUnavailable):
                result.set_exception(error)
                result.exception()  # retrieved here: there may be no waiter
            else:
                result.cancel()
            raise
        entry = self.cache.finish(pending, record)
        result.set_result(entry)
        return entry

    async def read_fresh(self, handle: Handle, *, timeout: float) -> Record | None:
        """The record as the store has it now: for handshakes and checks that must not rest on a cache."""
        record = await self._store.read(handle, timeout=timeout)
        return None if handle in self.ended else record

    async def read_stored(self, handle: Handle, *, timeout: float) -> Record | None:
        """The record as the store has it now, even if it is known to be over. Raises as the store."""
        return await self._store.read(handle, timeout=timeout)

    @contextmanager
    def _changing(self, handle: Handle) -> Iterator[None]:
        # Before the write: no read on this node may get the old value once the write can have happened. After
        # it, whatever its outcome: a read that began in between may have got the old value, and an unknown
        # outcome counts as changed.
        self.cache.drop(handle)
        try:
            yield
        finally:
            self.cache.drop(handle)

    async def create(self, draft: NewSession, *, timeout: float) -> float:
        """Raises as the store."""
        with self._changing(draft.handle):
            return await self._store.create(draft, timeout=timeout)

    async def write(
        self,
        handle: Handle,
        *,
        changed: Mapping[str, bytes],
        removed: Sequence[str],
        write_id: str,
        expected: str | None,
        message: bytes,
        ended: bytes,
        timeout: float,
    ) -> WriteOutcome:
        """Raises as the store."""
        with self._changing(handle):
            return await self._store.write(
                handle,
                changed=changed,
                removed=removed,
                write_id=write_id,
                expected=expected,
                message=message,
                ended=ended,
                timeout=timeout,
            )

    async def touch(self, handle: Handle, *, timeout: float) -> bool:
        """Raises as the store; what is cached then stays, since only the time until the end has changed."""
        alive = await self._store.touch(handle, timeout=timeout)
        self.cache.drop(handle)
        return alive

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
        """Raises as the store."""
        with self._changing(handle):
            return await self._store.rotate(
                handle,
                secret=secret,
                current=current,
                grace=grace,
                write_id=write_id,
                message=message,
                timeout=timeout,
            )

    async def end(
        self, handle: Handle, *, message: bytes, expected: str | None = None, timeout: float
    ) -> EndResult:
        """Raises as the store."""
        with self._changing(handle):
            return await self._store.end(handle, message=message, expected=expected, timeout=timeout)

    async def end_all(
        self, user: UserId, *, keep: Handle | None, epoch: str, message: bytes, timeout: float
    ) -> EndResult:
        """Raises as the store."""
        self.cache.drop_user(user, keep=keep)
        try:
            return await self._store.end_all(user, keep=keep, epoch=epoch, message=message, timeout=timeout)
        finally:
            self.cache.drop_user(user, keep=keep)

    def logouts(self, users: Sequence[UserId], *, timeout: float) -> Awaitable[Mapping[UserId, UserLogout]]:
        """Never cached. Raises as the store."""
        return self._store.logouts(users, timeout=timeout)

    async def devices(self, user: UserId, *, timeout: float) -> Sequence[Device]:
        """Never cached. Raises as the store."""
        found = await self._store.devices(user, timeout=timeout)
        return [device for device in found if device.handle not in self.ended]

    def lock(self, handle: Handle, *, token: str, hold: float, timeout: float) -> Awaitable[bool]:
        """Raises as the store."""
        return self._store.lock(handle, token=token, hold=hold, timeout=timeout)

    def unlock(self, handle: Handle, *, token: str, timeout: float) -> Awaitable[bool]:
        """Raises as the store."""
        return self._store.unlock(handle, token=token, timeout=timeout)


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
