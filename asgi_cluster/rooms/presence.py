"""The port for who is in a room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

__all__ = ["ClientInfo", "PresenceStore", "count_people", "read_info"]


class ClientInfo(Struct, frozen=True, omit_defaults=True):
    """What others may see of a connection (Centrifuge client protocol, ``ClientInfo``)."""

    user: str = ""
    client: str = ""
    conn_info: Raw | UnsetType = UNSET


class PresenceStore(Protocol):
    """Who is in a room, across the cluster. Entries belong to a node's incarnation and go with it."""

    async def enter(
        self, room: str, client: str, info: bytes, *, limit: int | None = None, timeout: float
    ) -> bool:
        """``client`` (a connection id) is in the room; ``info`` is its client info as JSON.

        With ``limit`` it enters only if fewer than so many other connections of registered nodes are there,
        in one atomic step, or if it is there already; False when it did not enter.
        """
        ...

    async def leave(self, room: str, client: str, *, timeout: float) -> bool:
        """It is no longer. False when it was not."""
        ...

    async def members(self, room: str, *, timeout: float) -> Mapping[str, bytes]:
        """Connection id to client info, of every registered node."""
        ...

    async def stats(self, room: str, *, timeout: float) -> tuple[int, int]:
        """Connections and distinct users."""
        ...

    async def reap(self, room: str, node: str, incarnation: str, *, timeout: float) -> Mapping[str, bytes]:
        """Remove what a dead incarnation of a node left behind; returns what this very call removed."""
        ...


class _Info(msgspec.Struct):
    user: str = ""
    conn_info: Any = None


_decoder = msgspec.json.Decoder(_Info)


def read_info(info: bytes) -> tuple[str, Any] | None:
    """User id and connection info of a client info; ``None`` when it is none."""
    try:
        found = _decoder.decode(info)
    except (ValueError, RecursionError):
        return None
    return found.user, found.conn_info


def count_people(members: Mapping[str, bytes]) -> tuple[int, int]:
    """Connections, and distinct users among their client infos. All without a user id count as one."""
    users = set()
    for info in members.values():
        read = read_info(info)
        users.add("" if read is None else read[0])
    return len(members), len(users)
