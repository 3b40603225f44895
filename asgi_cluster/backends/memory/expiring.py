"""A mapping whose entries expire at a time of their own, and are removed soon after."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from asgi_cluster.bus.lease import Clock

__all__ = ["Expiring"]

K = TypeVar("K", bound=str)
V = TypeVar("V")

_SLACK = 64


class Expiring(Generic[K, V]):
    """``get`` never returns what has expired; what has expired is removed a little at every ``set``.

    Times are readings of ``clock``. ``on_expired(key, value)`` is called for what expired, and not for what
    was removed.
    """

    __slots__ = ("_clock", "_due", "_entries", "_on_expired")

    def __init__(self, clock: Clock, *, on_expired: Callable[[K, V], None] | None = None) -> None:
        self._clock = clock
        self._on_expired = on_expired
        self._entries: dict[K, tuple[V, float]] = {}
        # One item per entry and not per extension: an item that comes up early is pushed again with the time
        # that holds now.
        self._due: list[tuple[float, K]] = []

    def get(self, key: K) -> V | None:
        """The value, or ``None``."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, until = entry
        if until > self._clock():
            return value
        self._expire(key, value)
        return None

    def until(self, key: K) -> float:
        """When the entry expires; ``KeyError`` when there is none."""
        return self._entries[key][1]

    def set(self, key: K, value: V, until: float) -> None:
        """Set or replace, to expire at ``until``."""
        fresh = key not in self._entries
        self._entries[key] = (value, until)
        if fresh:
            heapq.heappush(self._due, (until, key))
        self._sweep(2)

    def pop(self, key: K) -> V | None:
        """Remove; the value if it had not expired."""
        value = self.get(key)
        self._entries.pop(key, None)
        return value

    def sweep(self) -> None:
        """Remove everything that has expired."""
        self._sweep(len(self._due) + 1)

    def _sweep(self, steps: int) -> None:
        now = self._clock()
        while steps and self._due and self._due[0][0] <= now:
            steps -= 1
            _, key = heapq.heappop(self._due)
            entry = self._entries.get(key)
            if entry is None:
                continue
            value, until = entry
            if until <= now:
                self._expire(key, value)
            else:
                heapq.heappush(self._due, (until, key))
        if len(self._due) > 2 * len(self._entries) + _SLACK:
            # Many were removed before their time: their items would stay until then.
            self._due = [(until, key) for key, (_, until) in self._entries.items()]
            heapq.heapify(self._due)

    def _expire(self, key: K, value: V) -> None:
        del self._entries[key]
        if self._on_expired is not None:
            self._on_expired(key, value)

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        """Entries, expired ones that were not yet removed among them."""
        return len(self._entries)
