"""The seconds of Redis work that one operation may spend."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from asgi_cluster.bus.lease import Clock
from asgi_cluster.exceptions import StoreUnavailable

__all__ = ["Deadline", "NotesErrors", "Spending"]


class NotesErrors(Protocol):
    """Whatever notes the last error of its work with the store."""

    raised: Any


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

    def spending(self, noting: NotesErrors | None = None) -> Spending:
        """``with deadline.spending() as timeout:`` for the store's work inside: the seconds that are left.
        What it took is deducted, whatever came of it.

        ``noting`` gets the error of the work as its ``raised``. Work that succeeds has made an earlier error
        good.

        Raises:
            StoreUnavailable: nothing is left.
        """
        return Spending(self, noting)

    def __repr__(self) -> str:
        return f"<Deadline {self.left:.3f} s of {self.total:g} s>"


class Spending:
    """One use of a deadline. A class, because ``contextlib`` costs a request five times as much."""

    __slots__ = ("_deadline", "_noting", "_started")

    def __init__(self, deadline: Deadline, noting: NotesErrors | None) -> None:
        self._deadline = deadline
        self._noting = noting

    def __enter__(self) -> float:
        deadline = self._deadline
        if deadline.left <= 0:
            error = StoreUnavailable(f"the {deadline.total:g} s for the session's Redis work are used up")
            if self._noting is not None:
                self._noting.raised = error
            raise error
        self._started = deadline.clock()
        return deadline.left

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> Literal[False]:
        deadline = self._deadline
        deadline.left -= deadline.clock() - self._started
        if self._noting is not None and (error is None or isinstance(error, StoreUnavailable)):
            self._noting.raised = error
        return False
