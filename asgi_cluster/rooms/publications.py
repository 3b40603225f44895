"""A room's messages in the form in which each reader wants them."""

from __future__ import annotations

import logging

import msgspec

from asgi_cluster.bus.messages import MalformedMessage, Published, decode
from asgi_cluster.centrifuge.protocol import Pub, encode_push, to_json
from asgi_cluster.rooms.history import Entry

__all__ = ["encode_publication", "pub_of", "published"]

logger = logging.getLogger("asgi_cluster.realtime")


def pub_of(room: str, entry: Entry) -> Pub | None:
    """A history entry as clients get it; ``None`` when it cannot be read."""
    message = published(room, entry)
    if message is None:
        return None
    return _pub(message, entry.offset)


def _pub(message: Published, offset: int | None) -> Pub:
    pub = Pub(to_json(message.kind, message.data))
    if message.info is not None:
        pub = msgspec.structs.replace(pub, info=msgspec.Raw(message.info))
    return pub if offset is None else msgspec.structs.replace(pub, offset=offset)


def encode_publication(room: str, message: Published, offset: int | None, *, local: bool = False) -> bytes:
    """The push for clients. ``local`` marks what did not go over the bus (``on_bus_error="local"``)."""
    pub = _pub(message, offset)
    if local:
        pub = msgspec.structs.replace(pub, tags={"delivery": "local"})
    return encode_push("pub", pub, channel=room)


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
