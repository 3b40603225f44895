"""Tasks that belong to somebody, and whose errors are seen without taking their siblings along."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

__all__ = ["spawn"]

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
