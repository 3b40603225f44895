"""One message in one wire form."""

from __future__ import annotations

from typing import Any

from asgi_cluster.compat import websockets

__all__ = ["PreparedMessage"]


class PreparedMessage:
    """One message in one wire form, encoded and framed once, whoever gets it."""

    __slots__ = ("_event", "_frame", "binary", "data", "size")

    def __init__(self, data: bytes, *, binary: bool = False) -> None:
        self.data = data
        self.binary = binary
        self.size = len(data)
        self._frame: bytes | None = None
        self._event: dict[str, Any] | None = None

    @property
    def frame(self) -> bytes:
        """An unmasked, uncompressed WebSocket frame. Valid where permessage-deflate was negotiated, too (RFC
        7692 section 6).
        """
        if self._frame is None:
            self._frame = websockets.frame(self.data, binary=self.binary)
        return self._frame

    @property
    def event(self) -> dict[str, Any]:
        """The ASGI message."""
        if self._event is None:
            self._event = (
                {"type": "websocket.send", "bytes": self.data}
                if self.binary
                else {"type": "websocket.send", "text": self.data.decode()}
            )
        return self._event
