"""The end of a loop tick: what it brought is written."""

from __future__ import annotations

import asyncio
import logging
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_cluster.realtime.outbox import Outbox

__all__ = ["Flusher"]

logger = logging.getLogger("asgi_cluster.realtime")

_SLICE = 0.01  # seconds the flusher may hold the loop: a large room must not make everything else wait


class Flusher:
    """Writes, at the end of a loop tick, what the outboxes of this loop got during it."""

    __slots__ = ("__weakref__", "_dirty", "_loop", "_scheduled")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._dirty: list[Outbox] = []
        self._scheduled = False

    def add(self, outbox: Outbox) -> None:
        """``outbox`` has something to write."""
        self._dirty.append(outbox)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        until = perf_counter() + _SLICE
        for index, outbox in enumerate(dirty):
            try:
                outbox.flush()
            except Exception:
                logger.exception("writing to a socket failed")
                outbox.close()
            if index & 31 == 31 and perf_counter() > until:
                self._dirty = dirty[index + 1 :] + self._dirty
                break
        if self._dirty:
            self._loop.call_soon(self._flush)
        else:
            self._scheduled = False
