"""Who is in a room, in Redis: one hash per room, whose entries belong to a node's incarnation."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from asgi_cluster.backends.redis.names import Names
from asgi_cluster.backends.redis.registry import Registry
from asgi_cluster.backends.redis.scripts import load
from asgi_cluster.backends.redis.topology import Commands
from asgi_cluster.exceptions import BusUnavailable, StoreUnavailable
from asgi_cluster.rooms.presence import count_people

__all__ = ["RedisPresence"]

_ROOM_TTL = 7 * 24 * 3600 * 1000
"""Milliseconds after the last arrival, or the last look, for which a room's presence stays when no node is
left to clean it up: longer than sockets stay open."""

_LIST_LASTS = 1.0
"""Seconds for which a list of the registered nodes is good enough: a dead one counts for four seconds
anyhow.
"""

_UNREGISTERED_FOR = 10.0
"""Seconds for which a node has to be missing from the registry before a look at a room removes what it left
there.
"""


class RedisPresence:
    """``rooms.presence.PresenceStore``. An entry is ``<node> <incarnation>`` and, after a newline, the
    client info.

    What a dead node left behind is not shown; it is removed by ``reap``, else when the room
    is next read. ``registry`` is the one where the rooms are: on another server the node has another
    incarnation.
    """

    def __init__(self, topology: Commands, names: Names, registry: Registry) -> None:
        self._topology = topology
        self._names = names
        self._registry = registry
        self._registered: frozenset[bytes] = frozenset()
        self._listed_at = -_LIST_LASTS
        self._missing_since: dict[bytes, float] = {}

    async def enter(
        self, room: str, client: str, info: bytes, *, limit: int | None = None, timeout: float
    ) -> bool:
        """See ``PresenceStore.enter``. One round trip when it enters; where dead nodes left entries that
        count at first, one more to read these, and one to enter in spite of them.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        entry = _owner(*self._registry.identity()) + info
        args: list[str | bytes | int] = [client, entry, _ROOM_TTL, "" if limit is None else limit]
        if await self._run("presence_enter", room, args, timeout):
            return True
        _, unregistered = await self._look(room, deadline)
        if not unregistered:
            return False
        left = deadline - asyncio.get_running_loop().time()
        return bool(await self._run("presence_enter", room, [*args, *unregistered], left))

    async def leave(self, room: str, client: str, *, timeout: float) -> bool:
        key = self._names.room_in(room)
        try:
            return bool(await self._topology.call(key, "HDEL", key, client, timeout=timeout))
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error

    async def members(self, room: str, *, timeout: float) -> Mapping[str, bytes]:
        found, unregistered = await self._look(room, asyncio.get_running_loop().time() + timeout)
        return {client: info for client, owner, info in found if owner not in unregistered}

    async def _look(self, room: str, deadline: float) -> tuple[list[tuple[str, bytes, bytes]], set[bytes]]:
        """The entries (connection id, owner, client info), and which owners are not registered."""
        clock = asyncio.get_running_loop().time
        found: list[tuple[str, bytes, bytes]] = []
        for client, entry in _pairs(
            await self._run("presence_members", room, [_ROOM_TTL], deadline - clock())
        ):
            owner, newline, info = entry.partition(b"\n")
            found.append((client.decode("utf-8", "replace"), owner + newline, info))
        owners = {owner for _, owner, _ in found}
        # A node that is not in the last list may have registered since: only then is it read early.
        if not owners <= self._registered or clock() - self._listed_at >= _LIST_LASTS:
            await self._list_nodes(deadline - clock())
        unregistered = owners - self._registered
        await self._tidy(room, unregistered, deadline - clock())
        return found, unregistered

    async def _tidy(self, room: str, unregistered: set[bytes], timeout: float) -> None:
        # No running node was in the room when a node died: its entries were not reaped, and no client waits
        # for a leave. A node that has just started may be missing from the list for a moment, so only one
        # that stays missing is taken out.
        now = asyncio.get_running_loop().time()
        self._missing_since = {
            owner: since
            for owner, since in self._missing_since.items()
            if now - since < 10 * _UNREGISTERED_FOR
        }
        for owner in unregistered:
            if now - self._missing_since.setdefault(owner, now) >= _UNREGISTERED_FOR:
                await self._run("presence_reap", room, [owner], timeout)

    async def _list_nodes(self, timeout: float) -> None:
        listed_at = asyncio.get_running_loop().time()
        try:
            nodes = await self._registry.nodes(timeout=timeout)
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason) from error
        self._registered = frozenset(_owner(node, info.incarnation) for node, info in nodes.items())
        self._listed_at = listed_at

    async def stats(self, room: str, *, timeout: float) -> tuple[int, int]:
        return count_people(await self.members(room, timeout=timeout))

    async def reap(self, room: str, node: str, incarnation: str, *, timeout: float) -> Mapping[str, bytes]:
        removed = await self._run("presence_reap", room, [_owner(node, incarnation)], timeout)
        return {
            client.decode("utf-8", "replace"): entry.partition(b"\n")[2] for client, entry in _pairs(removed)
        }

    async def _run(self, name: str, room: str, args: Sequence[str | bytes | int], timeout: float) -> Any:
        try:
            return await self._topology.run(load(name), [self._names.room_in(room)], args, timeout=timeout)
        except StoreUnavailable as error:
            raise BusUnavailable(error.reason, outcome_unknown=error.outcome_unknown) from error


def _owner(node: str, incarnation: str) -> bytes:
    return f"{node} {incarnation}\n".encode()


def _pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
