"""What a backend brings: the stores, the two buses, and a lifetime."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from asgi_cluster.bus.room_bus import RoomBus, RoomReceiver
from asgi_cluster.bus.session_bus import SessionBus, SessionReceiver
from asgi_cluster.bus.stats import BusStats
from asgi_cluster.node import Node
from asgi_cluster.rooms.history import HistoryStore
from asgi_cluster.rooms.presence import PresenceStore
from asgi_cluster.sessions.store import SessionStore

__all__ = ["Backend"]


class Backend(Protocol):
    """One cluster's way to the others. ``open`` may be entered again after it was left, on any loop."""

    @property
    def store(self) -> SessionStore: ...
    @property
    def session_bus(self) -> SessionBus: ...
    @property
    def room_bus(self) -> RoomBus: ...
    @property
    def history(self) -> HistoryStore: ...
    @property
    def presence(self) -> PresenceStore: ...

    @property
    def needs_start(self) -> bool:
        """Whether anything needs ``open`` first. False for memory."""
        ...

    @property
    def crosses_loops(self) -> bool:
        """Whether receivers may be called from another thread than their sockets' loops run in. True for
        memory.
        """
        ...

    def open(
        self, node: Node, sessions: SessionReceiver, rooms: RoomReceiver
    ) -> AbstractAsyncContextManager[None]:
        """Connect, register the node and receive, until the context is left.

        Entering returns when sessions can be read and messages arrive, or raises ``StoreUnavailable`` with a
        reason that names the address and what is wrong, never the password. Later outages do not end it. A
        node that does not listen is not registered, and receives only the answers to its own logouts
        (``SessionBus.reachable``). ``node.failing`` gets an entry for each background task that has failed.
        """
        ...

    def attach(self, node: Node, sessions: SessionReceiver, rooms: RoomReceiver) -> None:
        """Receive without having been opened. Does nothing where a start is needed."""
        ...

    @property
    def ready(self) -> bool:
        """False when the store answers and the heartbeat on the subscriber's connection does not."""
        ...

    def stats(self) -> BusStats:
        """The figures of both buses together; ``malformed`` is 0, because payloads are not decoded here."""
        ...
