"""Publications as they are kept."""

from __future__ import annotations

import logging

from asgi_cluster.bus.messages import MalformedMessage, Published, decode
from asgi_cluster.rooms.history import Entry

__all__ = ["published"]

logger = logging.getLogger("asgi_cluster.realtime")


def published(room: str, entry: Entry) -> Published | None:
    """The message in a history entry; ``None`` when it cannot be read."""
    try:
        message = decode(entry.payload)
    except MalformedMessage:
        logger.warning(
            "publication %d of room %r cannot be decoded and is left out (another version?)",
            entry.offset,
            room,
        )
        return None
    return message if isinstance(message, Published) else None
