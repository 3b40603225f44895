"""Tasks that belong to somebody, and whose errors are seen without taking their siblings along."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

__all__ = ["check_loop", "running_asyncio_loop", "spawn"]

logger = logging.getLogger("asgi_cluster.tasks")


async def _guarded(coroutine: Coroutine[Any, Any, object], name: str) -> None:
    try:
        await coroutine
    except Exception:
        # A TaskGroup cancels everything when one child raises; one socket's bug must not end the node's other
        # work.
        logger.exception("%s failed", name)


def spawn(
    group: asyncio.TaskGroup, coroutine: Coroutine[Any, Any, object], *, name: str
) -> asyncio.Task[None]:
    """Run ``coroutine`` as a child of ``group``; an exception is logged and ends only this task.

    Raises:
        RuntimeError: the group is not open (any more); the coroutine is closed unrun.
    """
    try:
        return group.create_task(_guarded(coroutine, name), name=name)
    except BaseException:
        coroutine.close()
        raise


def running_asyncio_loop() -> asyncio.AbstractEventLoop:
    """Raises ``RuntimeError`` where asyncio does not run: on trio."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError as error:
        raise RuntimeError("asgi-cluster runs on asyncio; trio is not supported") from error


def check_loop(owner: asyncio.AbstractEventLoop | None) -> None:
    """Raises ``RuntimeError`` on another event loop than ``owner``; ``None``: there is none yet."""
    if owner is not None and asyncio.get_running_loop() is not owner:
        raise RuntimeError(
            "this cluster was started on another event loop. Call it there, from other threads with "
            "asyncio.run_coroutine_threadsafe(..., cluster.loop)"
        )
