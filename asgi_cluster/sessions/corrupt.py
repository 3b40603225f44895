"""Records that cannot be read: counted, and logged once each."""

from __future__ import annotations

import logging
from collections import OrderedDict

from asgi_cluster.ids import Handle

__all__ = ["CorruptRecords"]

logger = logging.getLogger("asgi_cluster.sessions")

_REMEMBERED = 256


class CorruptRecords:
    """Counts reads of corrupt records. A record that every request reads is logged once."""

    def __init__(self) -> None:
        self.count = 0
        """How often a corrupt record was read."""
        self._logged: OrderedDict[Handle, None] = OrderedDict()

    def found(self, handle: Handle, what: str) -> None:
        """The record of ``handle`` is corrupt: ``what`` says how, without its contents."""
        self.count += 1
        if handle not in self._logged:
            logger.error("session %s %s: treated as missing", handle, what)
        self._logged[handle] = None
        self._logged.move_to_end(handle)
        if len(self._logged) > _REMEMBERED:
            self._logged.popitem(last=False)

    def __repr__(self) -> str:
        return f"<CorruptRecords found {self.count} times>"
