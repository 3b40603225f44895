"""Nodes as the bus tests use them: a backend, open, and a receiver that keeps what it gets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from asgi_cluster.backends.redis.backend import RedisBackend
from asgi_cluster.backends.redis.bus import RedisRoomBus, RedisSessionBus
from asgi_cluster.bus.messages import Changed, MalformedMessage, decode
from asgi_cluster.ids import NodeId
from tests.contract.sites import make_node

LEASE = 2.0


@dataclass
class Receiver:
    """Everything in the order in which it came. ``leased`` is asked at each gap: it must be over by then."""

    events: list[tuple[Any, ...]] = field(default_factory=list)
    leased: Callable[[], bool] = lambda: False

    def session_message(self, payload: bytes) -> None:
        try:
            message = decode(payload)
        except MalformedMessage:
            return
        if isinstance(message, Changed):
            self.events.append(("session", message.handle))

    def room_message(self, room: str, payload: bytes) -> None:
        self.events.append(("room", room, payload.partition(b"\n")[2]))

    def sessions_gap(self, reason: str, buckets: frozenset[int] | None) -> None:
        self.events.append(("gap", reason, buckets, time.monotonic(), self.leased()))

    def rooms_gap(self, rooms: frozenset[str]) -> None:
        self.events.append(("rooms gap", rooms))

    def rooms_restored(self, rooms: frozenset[str]) -> None:
        self.events.append(("rooms restored", rooms))

    def node_removed(self, node: str, incarnation: str) -> None:
        self.events.append(("removed", node, incarnation))

    def load(self) -> tuple[int, int]:
        return 7, 3

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == kind]

    def heard(self, room: str) -> list[bytes]:
        return [event[2] for event in self.of("room") if event[1] == room]


@dataclass
class Node:
    """One open backend."""

    id: NodeId
    backend: RedisBackend
    receiver: Receiver

    @property
    def session_bus(self) -> RedisSessionBus:
        return self.backend.session_bus

    @property
    def room_bus(self) -> RedisRoomBus:
        return self.backend.room_bus

    @property
    def incarnation(self) -> str:
        return self.backend.room_bus.incarnation

    @property
    def live(self) -> bool:
        return all(self.session_bus.lease(bucket).live for bucket in range(256))


@asynccontextmanager
async def opened(url: str, prefix: str, **options: Any) -> AsyncIterator[Node]:
    """A node while entered."""
    listen = options.pop("listen", True)
    receiver = options.pop("receiver", None) or Receiver()
    backend = RedisBackend(url, prefix=prefix, lease_duration=LEASE, **options)
    made = make_node(listens=listen)
    node = Node(made.id, backend, receiver)
    receiver.leased = lambda: node.session_bus.lease(0).live
    async with backend.open(made, receiver, receiver):
        yield node


def our_tasks() -> list[str]:
    """Names of tasks of this package that are still running."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("asgi-cluster")]
