"""The closes of this node's sockets that take a while, and those that failed."""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic

__all__ = ["Closes"]

_CLOSE_IS_LATE = 0.25  # seconds that a receipt waits for closes under way


class Closes:
    """The closes that need a task of their own (servers other than uvicorn), and those that failed.

    A receipt counts a close when it was begun; what fails afterwards is deducted.
    """

    __slots__ = ("_failures", "_under_way")

    def __init__(self) -> None:
        # Each with the task group of its socket.
        self._under_way: dict[asyncio.Future[None], asyncio.TaskGroup] = {}
        self._failures: deque[float] = deque(maxlen=1000)

    def begun(self, closing: asyncio.Future[None], tasks: asyncio.TaskGroup) -> None:
        """A task of ``tasks`` closes a socket; ``closing`` is done when it has."""
        self._under_way[closing] = tasks

    def finished(self, closing: asyncio.Future[None], *, failed: bool) -> None:
        """The server has taken the close, or refused it."""
        self._under_way.pop(closing, None)
        if failed:
            self._failures.append(monotonic())

    def forget(self, closing: asyncio.Future[None]) -> None:
        """The socket is over, however the close ended."""
        self._under_way.pop(closing, None)

    def __bool__(self) -> bool:
        return bool(self._under_way or self._failures)

    @property
    def tasks(self) -> asyncio.TaskGroup | None:
        """Of this loop, where something is under way; ``None`` otherwise."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None
        return next((tasks for closing, tasks in self._under_way.items() if closing.get_loop() is loop), None)

    async def failed(self, since: float) -> int:
        """How many have failed after ``since`` (``time.monotonic``). Waits for those under way, a quarter of
        a second at most: one that takes longer waits for a client that does not read, and counts as failed.
        """
        loop = asyncio.get_running_loop()
        waiting = [closing for closing in self._under_way if closing.get_loop() is loop]
        late = (await asyncio.wait(waiting, timeout=_CLOSE_IS_LATE))[1] if waiting else ()
        return len(late) + sum(moment >= since for moment in self._failures)
