"""Tasks that belong to a group, and whose errors are logged without cancelling their siblings."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, MutableMapping
from typing import Any

__all__ = [
    "Failing",
    "cancellations",
    "check_loop",
    "keep_running",
    "running_asyncio_loop",
    "spawn",
    "stop_if_cancelled",
]

logger = logging.getLogger("asgi_cluster.tasks")

Failing = MutableMapping[object, tuple[str, str]]
"""Background work that has failed: for each a name and the kind of its last error."""

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0
_STEADY = 2.0
"""Seconds for which work that had failed must have gone on before it counts as running again."""


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
    guarded = _guarded(coroutine, name)
    try:
        task = group.create_task(guarded, name=name)
    except BaseException:
        guarded.close()
        coroutine.close()
        raise
    # A task that is cancelled before its first step has not begun to await it.
    task.add_done_callback(lambda _: coroutine.close())
    return task


def running_asyncio_loop() -> asyncio.AbstractEventLoop:
    """Raises ``RuntimeError`` where asyncio does not run: on trio."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError as error:
        raise RuntimeError("asgi-cluster runs on asyncio; trio is not supported") from error


async def keep_running(
    work: Callable[[], Coroutine[Any, Any, None]],
    *,
    name: str,
    failing: Failing | None = None,
) -> None:
    """Run ``work()`` and, when it fails, again after a pause that grows from 0.1 to 30 s; returns when it
    returns.

    Each failure is logged with its traceback. From the first one until the work has gone on for two seconds,
    ``failing`` has an entry with its name and the kind of the last error.
    """
    loop = asyncio.get_running_loop()
    failing = {} if failing is None else failing
    key = object()  # works of one name, as the subscribers of several primaries, do not share an entry
    pause = _FIRST_PAUSE
    try:
        while True:
            began = loop.time()
            steady = loop.call_later(_STEADY, failing.pop, key, None)
            try:
                await work()
                return
            except Exception as error:
                stop_if_cancelled()
                if loop.time() - began >= _STEADY:
                    pause = _FIRST_PAUSE
                failing[key] = name, type(error).__name__
                logger.exception("%s failed: it is started again in %.1f s at most", name, pause)
            finally:
                steady.cancel()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE)
    finally:
        failing.pop(key, None)


def cancellations() -> int:
    """How often the running task has been cancelled, and goes on all the same."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def stop_if_cancelled(before: int = 0) -> None:
    """For what goes on after a ``TaskGroup`` of its own has failed. ``before``: ``cancellations`` when it
    began, in a task that may have been cancelled before that.

    When a child fails and the task is cancelled in the same moment, Python before 3.13 raises the child's
    error and the cancellation is lost: a caller that waits for the loop's end waits for ever.

    Raises:
        asyncio.CancelledError: the task has been cancelled.
    """
    if cancellations() > before:
        raise asyncio.CancelledError


def check_loop(owner: asyncio.AbstractEventLoop | None) -> None:
    """Raises ``RuntimeError`` on another event loop than ``owner``; ``None``: there is none yet."""
    if owner is not None and asyncio.get_running_loop() is not owner:
        raise RuntimeError(
            "this cluster was started on another event loop. Call it there, from other threads with "
            "asyncio.run_coroutine_threadsafe(..., cluster.loop)"
        )
