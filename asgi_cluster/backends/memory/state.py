"""What a Redis would hold, in this process: shared by every ``memory://`` cluster of the same name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from asgi_cluster.bus.bus import Receiver
from asgi_cluster.realtime.history import Entry
from asgi_cluster.sessions.store import Draft

__all__ = ["Log", "State", "Stored", "shared_state"]


@dataclass(slots=True)
class Stored:
    """One session record."""

    draft: Draft
    secret: bytes
    fields: dict[str, bytes]
    write_id: str
    epoch: str
    created_at: float
    seen_at: float
    absolute_at: float
    expires_at: float
    version: int = 1
    previous: bytes | None = None
    previous_until: float = 0.0


@dataclass(slots=True)
class Log:
    """One room's history."""

    epoch: str
    offset: int = 0
    entries: list[Entry] = field(default_factory=list)
    expires_at: float = 0.0
    named_until: float = 0.0


@dataclass(slots=True)
class Node:
    """One attached cluster."""

    receiver: Receiver
    started_at: float
    rooms: set[str] = field(default_factory=set)


class State:
    """The tables, under one lock: TestClient and its like run every request in a thread and a loop of its own."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.sessions: dict[str, Stored] = {}
        self.epochs: dict[str, str] = {}
        self.by_user: dict[str, set[str]] = {}
        self.locks: dict[str, tuple[str, float]] = {}
        self.logs: dict[str, Log] = {}
        self.once: dict[tuple[str, str], tuple[int, str, float]] = {}
        self.present: dict[str, dict[str, tuple[str, bytes]]] = {}
        self.nodes: dict[str, Node] = {}
        self._writes = 0

    def tell_everyone(self, payload: bytes) -> None:
        """A session message, to every node, in order, before the caller goes on."""
        for node in list(self.nodes.values()):
            node.receiver.session_message(payload)

    def tell_room(self, room: str, payload: bytes) -> None:
        """A room message, to every node that has members there."""
        for node in list(self.nodes.values()):
            if room in node.rooms:
                node.receiver.room_message(room, payload)

    def drop(self, handle: str) -> None:
        """Remove a session and its place in the user's index."""
        stored = self.sessions.pop(handle, None)
        if stored is not None and stored.draft.user is not None:
            handles = self.by_user.get(stored.draft.user)
            if handles is not None:
                handles.discard(handle)
                if not handles:
                    del self.by_user[stored.draft.user]
                    self.epochs.pop(stored.draft.user, None)

    def tidy(self) -> None:
        """Every thousand writes: forget what has expired, so that a long-running process does not fill up."""
        self._writes += 1
        if self._writes % 1000:
            return
        now = self.clock()
        for handle in [h for h, stored in self.sessions.items() if stored.expires_at <= now]:
            self.drop(handle)
        self.locks = {handle: lock for handle, lock in self.locks.items() if lock[1] > now}
        self.once = {key: result for key, result in self.once.items() if result[2] > now}
        self.logs = {room: log for room, log in self.logs.items() if log.named_until > now}


_shared: dict[str, State] = {}


def shared_state(name: str | None) -> State:
    """The state of that name in this process; a new one that nobody shares when ``name`` is ``None``."""
    return State() if name is None else _shared.setdefault(name, State())
