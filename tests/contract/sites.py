"""A cluster under test: several nodes of one backend, on memory or on a server."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from asgi_cluster.backends.choose import open_backend
from asgi_cluster.backends.port import Backend
from asgi_cluster.bus.messages import Ack, encode
from asgi_cluster.ids import NodeId
from asgi_cluster.node import Node

LEASE = 1.0
TIMEOUT = 5.0
_PROBE = encode(Ack("", "", 0))[:4]


@dataclass
class Recorder:
    """A receiver that keeps what it gets."""

    sessions: list[bytes] = field(default_factory=list)
    rooms: list[tuple[str, bytes]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    def session_message(self, payload: bytes) -> None:
        # A node that starts tries its channels with an answer to no request.
        if not payload.startswith(_PROBE):
            self.sessions.append(payload)

    def room_message(self, room: str, payload: bytes) -> None:
        self.rooms.append((room, payload))

    def sessions_gap(self, reason: str, buckets: frozenset[int] | None) -> None:
        self.gaps.append(reason)

    def rooms_gap(self, rooms: frozenset[str]) -> None:
        self.gaps.append("rooms")

    def rooms_restored(self, rooms: frozenset[str]) -> None:
        pass

    def node_removed(self, node: str, incarnation: str) -> None:
        pass

    def load(self) -> tuple[int, int]:
        return 3, 2

    __hash__ = object.__hash__


def make_node(label: str = "node", *, listens: bool = True) -> Node:
    """A node that is not started, with an id of its own, as a backend needs it."""
    return Node(
        label=label,
        listens=listens,
        deadline=1.0,
        needs_start=True,
        crosses_loops=False,
        attach=lambda: None,
    )


@dataclass
class Member:
    """One node: its backend, and what it received."""

    id: NodeId
    backend: Backend
    heard: Recorder
    stack: AsyncExitStack

    async def leave(self) -> None:
        """Stop, properly."""
        await self.stack.aclose()


@dataclass
class Site:
    """Where nodes meet. ``url`` as a user would write it; a prefix of its own."""

    kind: str
    url: str
    prefix: str
    stack: AsyncExitStack
    rooms_url: str | None = None

    async def node(self, *, listen: bool = True) -> Member:
        """One more node, open until the test ends or it leaves."""
        backend = open_backend(
            self.url,
            prefix=self.prefix,
            lease_duration=LEASE,
            rooms_url=self.rooms_url,
            ssl_context=None,
            credential_provider=None,
        )
        heard = Recorder()
        node = make_node(listens=listen)
        stack = AsyncExitStack()
        await stack.enter_async_context(backend.open(node, heard, heard))
        self.stack.push_async_exit(stack)
        return Member(node.id, backend, heard, stack)
