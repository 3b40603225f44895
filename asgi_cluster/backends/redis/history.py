"""The history of rooms, in Redis: a stream and a hash per room, one script per operation."""

from __future__ import annotations

import secrets
from typing import Any

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.topology import Commands
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from asgi_cluster.ids import new_token
from asgi_cluster.rooms.history import (
    EPOCH_LASTS,
    JUMP,
    NUMBERING_OUTLIVES,
    ONCE,
    Declarations,
    Entry,
    Page,
    Position,
)

__all__ = ["RedisHistory"]

_DECLARED = 7 * 24 * 3600.0
"""Seconds for which declared rules outlive the last node, so that a worker has them meanwhile."""


class RedisHistory:
    """``rooms.history.HistoryStore`` on Redis streams.

    An entry's id is its offset, and it carries the offset of the entry before. One can go on from a position
    if it is the top, or if the first entry after it names it as the one before: that covers trimming, jumps
    after a failover, and positions that only a lost primary ever gave out.
    """

    in_process = False

    def __init__(self, topology: Commands, names: Names) -> None:
        self._topology = topology
        self._names = names
        self._publish = "SPUBLISH" if topology.sharded else "PUBLISH"

    async def declare(
        self, digest: str, rules: bytes, *, node: str, view: float, timeout: float
    ) -> Declarations:
        keys = [self._names.room_rules(), self._names.room_views(), self._names.room_epoch()]
        args: list[str | bytes | int] = [
            digest,
            rules,
            node,
            new_token(),
            _ms(EPOCH_LASTS),
            _ms(_DECLARED),
            _ms(view),
        ]
        epoch, wait, others = await self._run("room_rules", keys, args, timeout)
        pairs = zip(others[::2], others[1::2], strict=True)
        named = [(name.decode("utf-8", "replace"), declared) for name, declared in pairs]
        return Declarations(_name(epoch), wait / 1000, named)

    async def publish(
        self,
        room: str,
        payload: bytes,
        *,
        size: int,
        ttl: float,
        idempotency_key: str | None,
        epoch: str,
        timeout: float,
    ) -> Position:
        keys = [self._names.room_log(room), self._names.room_meta(room)]
        if idempotency_key is not None:
            keys.append(self._names.room_once(room, idempotency_key))
        args: list[str | bytes | int] = [
            payload,
            size,
            _ms(ttl),
            _ms(ttl + NUMBERING_OUTLIVES),
            epoch,
            self._publish,
            self._names.room_channel(room),
            _ms(ONCE),
            JUMP * (1 + secrets.randbelow(JUMP)),
        ]
        offset, name = await self._run("room_publish", keys, args, timeout)
        return Position(offset, _name(name))

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
        args: list[str | bytes | int] = [
            "" if since is None else since.offset,
            "" if since is None else since.epoch,
            "" if limit is None else limit,
            int(reverse),
            epoch,
            _ms(ttl + NUMBERING_OUTLIVES),
        ]
        keys = [self._names.room_log(room), self._names.room_meta(room)]
        top, name, complete, heads, bodies = await self._run("room_read", keys, args, timeout)
        return Page(_entries(heads, bodies), Position(top, _name(name)), bool(complete))

    async def _run(self, name: str, keys: list[str], args: list[str | bytes | int], timeout: float) -> Any:
        try:
            return await self._topology.run(load(name), keys, args, timeout=timeout)
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error


def _name(epoch: bytes) -> str:
    # One that was tampered with is an epoch that no position has.
    return epoch.decode("ascii", "backslashreplace")


def _entries(heads: bytes, bodies: bytes) -> list[Entry]:
    entries: list[Entry] = []
    numbers = iter(map(int, heads.split()))
    start = 0
    for offset, previous, length in zip(numbers, numbers, numbers, strict=True):
        entries.append(Entry(offset, previous, bodies[start : start + length]))
        start += length
    return entries


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
