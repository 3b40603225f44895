"""The commands of one client that are not finished: bounded, side by side, in order where order counts."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Hashable

__all__ = ["PendingCommands"]


class PendingCommands:
    """Commands under way, each in a task.

    Commands that share a *lane* run one after the other, in the order in which they arrived; all others run
    at the same time.
    """

    __slots__ = ("_last", "_tasks")

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], bool] = {}
        self._last: dict[Hashable, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def before(self, lanes: Collection[Hashable]) -> set[asyncio.Task[None]]:
        """The commands that one in these lanes has to wait for."""
        return {self._last[lane] for lane in lanes if lane in self._last}

    def add(self, task: asyncio.Task[None], lanes: Collection[Hashable], *, outlives: bool) -> None:
        """``task`` runs a command. ``outlives``: its effect does not need the client to be there."""
        self._tasks[task] = outlives
        for lane in lanes:
            self._last[lane] = task

        def done(task: asyncio.Task[None]) -> None:
            del self._tasks[task]
            for lane in lanes:
                if self._last.get(lane) is task:
                    del self._last[lane]

        task.add_done_callback(done)

    async def one_done(self, other: asyncio.Future[None]) -> None:
        """Return when a command is finished, or ``other`` is done."""
        await asyncio.wait((*self._tasks, other), return_when=asyncio.FIRST_COMPLETED)

    async def cancel(self) -> None:
        """The client is gone: cancel what does not outlive it."""
        await asyncio.sleep(0)  # each has begun now: a coroutine that has not cannot end in order
        for task, outlives in tuple(self._tasks.items()):
            if not outlives:
                task.cancel()

    async def end(self, timeout: float) -> bool:
        """Wait ``timeout`` seconds, then cancel what is left; False when something ignored its cancellation
        for as long again.
        """
        for _ in range(2):
            if self._tasks:
                await asyncio.wait(tuple(self._tasks), timeout=timeout)
            for task in tuple(self._tasks):
                task.cancel()
        return not self._tasks
