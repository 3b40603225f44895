"""What a backend brings: the stores, the bus, and a lifetime."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from asgi_cluster.bus.bus import Bus, Receiver
from asgi_cluster.ids import NodeId
from asgi_cluster.rooms.history import HistoryStore
from asgi_cluster.rooms.presence import PresenceStore
from asgi_cluster.sessions.store import SessionStore
from asgi_cluster.tasks import Failing

__all__ = ["Backend"]


class Backend(Protocol):
    """One cluster's way to the others. ``open`` may be entered again after it was left, on any loop."""

    @property
    def store(self) -> SessionStore: ...
    @property
    def bus(self) -> Bus: ...
    @property
    def history(self) -> HistoryStore: ...
    @property
    def presence(self) -> PresenceStore: ...

    @property
    def needs_start(self) -> bool:
        """Whether anything needs ``open`` first. False for memory: then receivers may be called from another
        thread than their sockets' loops run in.
        """
        ...

    def open(
        self, node: NodeId, receiver: Receiver, *, listen: bool, failing: Failing | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Connect, register the node and receive, until the context is left.

        Entering returns when sessions can be read and messages arrive, or raises ``StoreUnavailable`` with a
        reason that names the address and what is wrong, never the password. Later outages do not end it.
        ``listen=False``: no registration, and no subscriber but for the answers to this node's own logouts
        (``Bus.reachable``). ``failing`` gets an entry for each background task that has failed.
        """
        ...

    def attach(self, node: NodeId, receiver: Receiver, *, listen: bool) -> None:
        """Receive without having been opened. Does nothing where a start is needed."""
        ...

    @property
    def ready(self) -> bool:
        """False when the store answers and the heartbeat on the subscriber's connection does not."""
        ...
