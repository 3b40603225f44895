"""The seconds of Redis work that one operation may spend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from asgi_cluster.bus.lease import Clock
from asgi_cluster.exceptions import StoreUnavailable

__all__ = ["Deadline", "Note", "Spending"]

Note = Callable[[StoreUnavailable | None], None]
"""Called with the error of the work, or with ``None`` when it has succeeded."""


class Deadline:
    """Of one operation, however long it lasts otherwise: a request until its response starts, or one call on
    a session that goes on after that. Only the time inside of ``spending`` counts.
    """

    __slots__ = ("clock", "left", "total")

    def __init__(self, total: float, clock: Clock) -> None:
        self.total = total
        self.left = total
        """Seconds."""
        self.clock = clock

    def spending(self, note: Note | None = None) -> Spending:
        """``with deadline.spending() as timeout:`` for the store's work inside: the seconds that are left.
        What it took is deducted, whatever came of it.

        Raises:
            StoreUnavailable: nothing is left.
        """
        return Spending(self, note)

    def __repr__(self) -> str:
        return f"<Deadline {self.left:.3f} s of {self.total:g} s>"


class Spending:
    """One use of a deadline. A class, because ``contextlib`` costs a request five times as much."""

    __slots__ = ("_deadline", "_note", "_started")

    def __init__(self, deadline: Deadline, note: Note | None) -> None:
        self._deadline = deadline
        self._note = note

    def __enter__(self) -> float:
        deadline = self._deadline
        if deadline.left <= 0:
            error = StoreUnavailable(f"the {deadline.total:g} s for the session's Redis work are used up")
            if self._note is not None:
                self._note(error)
            raise error
        self._started = deadline.clock()
        return deadline.left

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> Literal[False]:
        deadline = self._deadline
        deadline.left -= deadline.clock() - self._started
        if self._note is not None and (error is None or isinstance(error, StoreUnavailable)):
            self._note(error)
        return False
