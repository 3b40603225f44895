"""Reads of the session store: through the local cache, with one read of the store for concurrent readers."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence

from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle, UserId
from asgi_cluster.sessions.cache import SessionCache
from asgi_cluster.sessions.entry import Entry, PendingRead
from asgi_cluster.sessions.store import Device, Record, SessionStore

__all__ = ["SessionReader"]


class SessionReader:
    """Does not return sessions in ``ended``: a store that has lost its last writes may still have them."""

    def __init__(self, store: SessionStore, cache: SessionCache, *, ended: Container[Handle] = ()) -> None:
        self.store = store
        self._cache = cache
        self._ended = ended

    async def read(self, handle: Handle, *, timeout: float) -> Entry:
        """The record (or its absence), at most one lease old with respect to changes made through this
        library.

        Concurrent reads share one read of the store, until the session is changed. Raises as the store.
        """
        return self._cache.get(handle) or await self.fetch(handle, timeout=timeout)

    async def fetch(self, handle: Handle, *, timeout: float) -> Entry:
        """The same, after a miss: without another look at the cache. Raises as the store."""
        loop = asyncio.get_running_loop()
        pending = self._cache.pending(handle)
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
        return await self._read_store(self._cache.begin(handle), loop, timeout)

    async def _read_store(
        self, pending: PendingRead, loop: asyncio.AbstractEventLoop, timeout: float
    ) -> Entry:
        result: asyncio.Future[Entry] = loop.create_future()
        pending.waiters = result
        try:
            record = await self.read_fresh(pending.handle, timeout=timeout)
        except BaseException as error:
            self._cache.abort(pending)
            if isinstance(error, StoreUnavailable):
                result.set_exception(error)
                result.exception()  # retrieved here: there may be no waiter
            else:
                result.cancel()
            raise
        entry = self._cache.finish(pending, record)
        result.set_result(entry)
        return entry

    async def read_fresh(self, handle: Handle, *, timeout: float) -> Record | None:
        """The record as the store has it now: for handshakes and checks that must not rest on a cache."""
        record = await self.store.read(handle, timeout=timeout)
        return None if handle in self._ended else record

    async def devices(self, user: UserId, *, timeout: float) -> Sequence[Device]:
        """The user's current sessions; never cached. Raises as the store."""
        found = await self.store.devices(user, timeout=timeout)
        return [device for device in found if device.handle not in self._ended]


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
