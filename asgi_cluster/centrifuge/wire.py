"""What clients of the endpoint get: pushes of the Centrifuge client protocol, in JSON."""

from __future__ import annotations

import msgspec

from asgi_cluster.bus.messages import PayloadKind, Published
from asgi_cluster.centrifuge.messages import Pub
from asgi_cluster.centrifuge.protocol import encode_push, to_json
from asgi_cluster.rooms.history import Entry
from asgi_cluster.rooms.publications import published
from asgi_cluster.sockets.prepared import PreparedMessage
from asgi_cluster.sockets.wire import Wire

__all__ = ["JSON", "pub_of"]


class _Json:
    joins = True

    def message(self, kind: PayloadKind, data: bytes) -> PreparedMessage:
        return PreparedMessage(encode_push("message", {"data": to_json(kind, data)}))

    def publication(
        self, room: str, message: Published, offset: int | None, *, local: bool
    ) -> PreparedMessage:
        pub = _pub(message, offset)
        if local:
            pub = msgspec.structs.replace(pub, tags={"delivery": "local"})
        return PreparedMessage(encode_push("pub", pub, channel=room))

    def join(self, room: str, info: bytes) -> PreparedMessage:
        return PreparedMessage(encode_push("join", {"info": msgspec.Raw(info)}, channel=room))

    def leave(self, room: str, info: bytes) -> PreparedMessage:
        return PreparedMessage(encode_push("leave", {"info": msgspec.Raw(info)}, channel=room))


JSON: Wire = _Json()
"""Newline-joined JSON (``centrifuge-json``)."""


def pub_of(room: str, entry: Entry) -> Pub | None:
    """A history entry as clients get it; ``None`` when it cannot be read."""
    message = published(room, entry)
    return None if message is None else _pub(message, entry.offset)


def _pub(message: Published, offset: int | None) -> Pub:
    pub = Pub(to_json(message.kind, message.data))
    if message.info is not None:
        pub = msgspec.structs.replace(pub, info=msgspec.Raw(message.info))
    return pub if offset is None else msgspec.structs.replace(pub, offset=offset)
