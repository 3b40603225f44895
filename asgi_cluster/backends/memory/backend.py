"""Memory as a backend: no server, no start, any loop, any thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asgi_cluster.backends.memory.bus import MemoryBus
from asgi_cluster.backends.memory.rooms import MemoryHistory, MemoryPresence
from asgi_cluster.backends.memory.state import shared_state
from asgi_cluster.backends.memory.store import MemorySessionStore
from asgi_cluster.bus.bus import Receiver
from asgi_cluster.ids import NodeId

__all__ = ["MemoryBackend"]


class MemoryBackend:
    """Everything in this process. Backends of the same ``name`` are nodes of one cluster; ``None``: one that is alone."""

    needs_start = False
    crosses_loops = True

    def __init__(self, name: str | None, *, lease_duration: float) -> None:
        state = shared_state(name)
        self.bus = MemoryBus(state, lease_duration=lease_duration)
        self.store = MemorySessionStore(state)
        self.history = MemoryHistory(state)
        self.presence = MemoryPresence(state, lambda: self.bus.id)

    @asynccontextmanager
    async def open(self, node: NodeId, receiver: Receiver, *, listen: bool) -> AsyncIterator[None]:
        """See ``Backend.open``."""
        if listen:
            self.bus.attach(node, receiver)
        try:
            yield
        finally:
            self.bus.detach()

    def attach(self, node: NodeId, receiver: Receiver) -> None:
        """See ``Backend.attach``."""
        self.bus.attach(node, receiver)

    @property
    def ready(self) -> bool:
        """See ``Backend.ready``."""
        return True
