"""Coroutines that are run without a task, as far as they go without waiting."""

from __future__ import annotations

import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any

__all__ = ["discard", "drive"]


def drive(awaitable: Awaitable[None]) -> Awaitable[None] | None:
    """Run a coroutine without a task as far as it goes; what is left of it when it had to wait, ``None`` when
    it is done.

    Raises: what the coroutine raises.
    """
    if not isinstance(awaitable, Coroutine):
        return awaitable
    try:
        waits_for = awaitable.send(None)
    except StopIteration:
        return None
    return _resume(awaitable, waits_for)


def discard(awaitable: Awaitable[object] | None) -> None:
    """Close a coroutine that will not be awaited."""
    if isinstance(awaitable, Coroutine):
        awaitable.close()


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    # A task that awaits this sees the future that the coroutine already yielded, as if it had started it
    # itself.
    while True:
        sent: Any = None
        raised: BaseException | None = None
        try:
            sent = yield waits_for
        except BaseException as error:
            raised = error
        try:
            waits_for = coroutine.send(sent) if raised is None else coroutine.throw(raised)
        except StopIteration:
            return
