"""Background tasks that live exactly as long as a block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from asgi_cluster.tasks import Failing, keep_running

__all__ = ["Background", "background"]


class Background:
    """Starts tasks in the block's group."""

    def __init__(self, group: asyncio.TaskGroup, failing: Failing | None = None) -> None:
        self._group = group
        self._failing = failing
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run until it ends, or the block does."""
        task = self._group.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def keep(self, work: Callable[[], Coroutine[Any, Any, None]], *, name: str) -> asyncio.Task[None]:
        """Run ``work()`` until the block ends. An exception is logged, and the work started again. Meanwhile
        ``failing`` has an entry for it.
        """
        return self.start(keep_running(work, name=name, failing=self._failing), name=f"asgi-cluster {name}")

    def cancel(self) -> None:
        """All of them; the block waits for their end."""
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def background(failing: Failing | None = None) -> AsyncIterator[Background]:
    """Cancels what was started in it on leaving. ``failing`` gets an entry for each work of ``keep`` that has
    failed.

    An exception of the block leaves it as it is, not wrapped in a group.
    """
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as group:
        tasks = Background(group, failing)
        try:
            yield tasks
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            failure = error
        finally:
            tasks.cancel()
    if failure is not None:
        raise failure
