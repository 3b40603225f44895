"""What rooms remember, in Redis: a stream and a hash per room, one script per operation."""

from __future__ import annotations

from typing import Any

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.topology import Topology
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from asgi_cluster.realtime.history import Entry, Page, Position

__all__ = ["RedisHistory"]

_META_TTL = 24 * 3600 * 1000
"""Milliseconds for which a silent room keeps its numbering: clients that were away longer start anew."""

_ONCE_TTL = 300 * 1000


class RedisHistory:
    """``realtime.history.HistoryStore`` on Redis streams.

    An entry's id is its offset, and it carries the offset of the entry before. A position can be continued from if it is the top,
    or if the log holds an entry whose previous offset it is: that covers trimming, jumps after a failover, and positions that
    only a lost primary ever gave out.
    """

    def __init__(self, topology: Topology, names: Names) -> None:
        self._topology = topology
        self._names = names
        self._publish = "SPUBLISH" if topology.sharded else "PUBLISH"

    async def publish(
        self, room: str, payload: bytes, *, size: int, ttl: float, idempotency_key: str | None, epoch: str, timeout: float
    ) -> Position:
        """See ``HistoryStore.publish``."""
        keys = [self._names.room_log(room), self._names.room_meta(room)]
        if idempotency_key is not None:
            keys.append(self._names.room_once(room, idempotency_key))
        args: list[str | bytes | int] = [
            payload,
            size,
            _ms(ttl),
            epoch,
            self._run_id(room),
            self._publish,
            self._names.room_channel(room),
            max(_META_TTL, _ms(ttl)),
            _ONCE_TTL,
        ]
        offset, name, _ = await self._run("room_publish", keys, args, timeout)
        return Position(offset, name.decode())

    async def read(
        self,
        room: str,
        *,
        since: Position | None,
        limit: int | None,
        reverse: bool = False,
        epoch: str,
        ttl: float,
        timeout: float,
    ) -> Page:
        """See ``HistoryStore.read``."""
        args: list[str | bytes | int] = [
            "" if since is None else since.offset,
            "" if since is None else since.epoch,
            "" if limit is None else limit,
            int(reverse),
            epoch,
            self._run_id(room),
            max(_META_TTL, _ms(ttl)),
        ]
        keys = [self._names.room_log(room), self._names.room_meta(room)]
        top, name, complete, rows = await self._run("room_read", keys, args, timeout)
        entries = [
            Entry(int(entry_id.split(b"-", 1)[0]), int(values[1]), bytes(values[3])) for entry_id, values in rows
        ]
        return Page(entries, Position(top, name.decode()), bool(complete))

    def _run_id(self, room: str) -> str:
        try:
            return self._topology.run_id(self._names.room_meta(room))
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason) from error

    async def _run(self, name: str, keys: list[str], args: list[str | bytes | int], timeout: float) -> Any:
        try:
            return await self._topology.run(load(name), keys, args, timeout=timeout)
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
