"""What is used of ``websockets``: its frames, and the state of a protocol object."""

from __future__ import annotations

from typing import Any

from websockets.frames import Frame, Opcode
from websockets.protocol import State

__all__ = ["frame", "is_open"]


def frame(data: bytes, *, binary: bool) -> bytes:
    """``data`` as one unmasked, uncompressed WebSocket message (RFC 6455 section 5.2)."""
    return Frame(Opcode.BINARY if binary else Opcode.TEXT, data).serialize(mask=False)


def is_open(connection: Any) -> bool:
    """Whether a protocol object of the library may send messages."""
    return connection.state is State.OPEN
