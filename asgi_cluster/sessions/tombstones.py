"""Sessions that have ended, noted by this node in case that the store loses the end.

Replication is asynchronous: a primary that fails can lose its last writes, a logout among them, and then
the session is still there on the next one. Every node that has committed a logout, or has received the
message of one, keeps for a while the handle and the server that had it. When another server answers for
that bucket, the node reads each of these sessions, and ends those that are still there. Until then it
serves none of them, whatever the store has. A handle is never used twice, so that nothing but the lost
session can be hit.

A logout of all sessions of a user is kept in the same way, as the handles that it ended, and not by the
epoch that it replaced: a login after the failover gets that epoch again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

from asgi_cluster.exceptions import StoreUnavailable
from asgi_cluster.ids import Handle
from asgi_cluster.sessions.store import RecordStore

__all__ = ["Tombstones"]

logger = logging.getLogger("asgi_cluster.sessions")

_LIMIT = 10_000
_KEPT = 600.0
_LOOK_EVERY = 1.0
_SPREAD = 1.0
"""Seconds. All nodes with the handle read it after a failover; spread, most find that another has ended it.
"""
_AT_ONCE = 64
_UNKNOWN = "?"
"""No server has this run id: the session is read at the next look."""


class Tombstones:
    """Handles that were ended: at most ``limit``, for ``kept`` seconds, the oldest dropped first.

    ``end`` ends a session once more, everywhere; raises ``StoreUnavailable``.
    """

    def __init__(
        self,
        store: RecordStore,
        end: Callable[[Handle], Awaitable[None]],
        *,
        deadline: float,
        clock: Callable[[], float],
        limit: int = _LIMIT,
        kept: float = _KEPT,
    ) -> None:
        self._store = store
        self._end = end
        self._deadline = deadline
        self._clock = clock
        self._limit = limit
        self._kept = kept
        self._stones: dict[Handle, tuple[str, float]] = {}  # the server that had it, until when; oldest first
        self._servers: Counter[tuple[int, str]] = Counter()  # how many stones of a bucket each has

    def __len__(self) -> int:
        return len(self._stones)

    def __iter__(self) -> Iterator[Handle]:
        return iter(self._stones)

    def __contains__(self, handle: object) -> bool:
        return handle in self._stones

    def remember(self, handle: Handle, run_id: str) -> None:
        """``handle`` was ended on the server ``run_id``; ``""``: one that loses nothing.

        Only for ends that are committed. A session whose end is uncertain may rightly be there.
        """
        self._forget(handle)
        if not run_id:
            return
        self._stones[handle] = (run_id, self._clock() + self._kept)
        self._servers[_bucket(handle), run_id] += 1
        if len(self._stones) > self._limit:
            self._forget(next(iter(self._stones)))

    def end_later(self, handle: Handle) -> None:
        """End ``handle`` as soon as the store answers, if it is there: no client has its secret."""
        self.remember(handle, _UNKNOWN)

    def _forget(self, handle: Handle) -> None:
        stone = self._stones.pop(handle, None)
        if stone is not None:
            self._uncount(handle, stone[0])

    def _uncount(self, handle: Handle, run_id: str) -> None:
        server = _bucket(handle), run_id
        self._servers[server] -= 1
        if not self._servers[server]:
            del self._servers[server]

    async def run(self) -> None:
        """For as long as the cluster is started."""
        while True:
            await asyncio.sleep(_LOOK_EVERY * random.uniform(0.5, 1.0))
            self._expire()
            if self._uncertain_servers():
                await asyncio.sleep(random.uniform(0, _SPREAD))
                await self._check()

    def _expire(self) -> None:
        now = self._clock()
        while self._stones:
            handle = next(iter(self._stones))
            if self._stones[handle][1] > now:
                return
            self._forget(handle)

    def _uncertain_servers(self) -> set[tuple[int, str]]:
        """Those that do not answer for their bucket any more. Cheap: the buckets are counted, not walked."""
        return {
            (bucket, run_id)
            for bucket, run_id in self._servers
            if (current := self._store.run_id(bucket)) is not None and current != run_id
        }

    async def _check(self) -> None:
        uncertain = self._uncertain_servers()
        # The newest first: they are the likeliest to be lost.
        handles = [
            handle
            for handle, (run_id, _) in reversed(self._stones.items())
            if (_bucket(handle), run_id) in uncertain
        ]
        ended = 0
        for start in range(0, len(handles), _AT_ONCE):
            some = handles[start : start + _AT_ONCE]
            outcomes = await asyncio.gather(*map(self._end_again, some))
            ended += outcomes.count(True)
            if None in outcomes:
                break  # the rest at the next look: until then they are as uncertain as before
        if ended:
            logger.warning("%d sessions that are over were in the store: ended again", ended)

    async def _end_again(self, handle: Handle) -> bool | None:
        """Whether it had to be; ``None``: the store did not answer."""
        # Read before the session: if the server changes again meanwhile, the session is read again.
        run_id = self._store.run_id(_bucket(handle))
        if run_id is None:
            return None
        try:
            found = await self._store.read(handle, timeout=self._deadline) is not None
            if found:
                await self._end(handle)
        except StoreUnavailable:
            return None
        stone = self._stones.get(handle)
        if stone is not None:
            # In its old place, with its old time: this is no new end.
            self._uncount(handle, stone[0])
            self._servers[_bucket(handle), run_id] += 1
            self._stones[handle] = (run_id, stone[1])
        return found


def _bucket(handle: Handle) -> int:
    return int(handle[:2], 16)
