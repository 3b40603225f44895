"""Who is in a room, in Redis: one hash per room, entries that belong to a node's incarnation."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.topology import Topology
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable

if TYPE_CHECKING:
    from asgi_cluster.backends.redis.bus import RedisBus

__all__ = ["RedisPresence"]

_ROOM_TTL = 24 * 3600 * 1000
"""Milliseconds after its last arrival for which a room's presence is kept when nobody is left to clean it up."""


class RedisPresence:
    """``realtime.presence.PresenceStore``. An entry is ``<node> <incarnation>`` and, after a newline, the client info."""

    def __init__(self, topology: Topology, names: Names, bus: RedisBus) -> None:
        self._topology = topology
        self._names = names
        self._bus = bus

    async def enter(self, room: str, client: str, info: bytes, *, timeout: float) -> None:
        """See ``PresenceStore.enter``."""
        key = self._names.room_in(room)
        node, incarnation = self._bus.identity()
        entry = _owner(node, incarnation) + info
        await self._call(key, "HSET", key, client, entry, timeout=timeout)
        self._topology.post(key, "PEXPIRE", key, _ROOM_TTL)

    async def leave(self, room: str, client: str, *, timeout: float) -> bool:
        """See ``PresenceStore.leave``."""
        key = self._names.room_in(room)
        return bool(await self._call(key, "HDEL", key, client, timeout=timeout))

    async def members(self, room: str, *, timeout: float) -> Mapping[str, bytes]:
        """See ``PresenceStore.members``. Entries of nodes that are gone are left out."""
        key = self._names.room_in(room)
        rows, nodes = await asyncio.gather(
            self._call(key, "HGETALL", key, timeout=timeout), self._nodes(timeout), return_exceptions=False
        )
        living = {_owner(node, info.incarnation) for node, info in nodes.items()}
        found: dict[str, bytes] = {}
        for client, entry in rows.items():
            owner, newline, info = entry.partition(b"\n")
            if owner + newline in living:
                found[client.decode()] = info
        return found

    async def stats(self, room: str, *, timeout: float) -> tuple[int, int]:
        """See ``PresenceStore.stats``."""
        members = await self.members(room, timeout=timeout)
        return len(members), len({_user(info) for info in members.values()})

    async def reap(self, room: str, node: str, incarnation: str, *, timeout: float) -> Mapping[str, bytes]:
        """Remove what a dead incarnation left behind; what this call removed, and nobody else did."""
        key = self._names.room_in(room)
        try:
            rows = await self._topology.run(
                load("presence_reap"), [key], [_owner(node, incarnation)], timeout=timeout
            )
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error
        return {
            client.decode(): entry.partition(b"\n")[2] for client, entry in zip(rows[::2], rows[1::2], strict=True)
        }

    async def _nodes(self, timeout: float) -> Any:
        try:
            return await self._bus.room_nodes(timeout=timeout)
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason) from error

    async def _call(self, key: str, *args: str | bytes | int, timeout: float) -> Any:
        try:
            return await self._topology.call(key, *args, timeout=timeout)
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error


def _owner(node: str, incarnation: str) -> bytes:
    return f"{node} {incarnation}\n".encode()


def _user(info: bytes) -> str:
    try:
        return str(msgspec.json.decode(info).get("user", ""))
    except (msgspec.DecodeError, AttributeError):
        return ""
