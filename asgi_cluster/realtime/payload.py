"""What applications send, as it travels."""

from __future__ import annotations

from typing import Any

import msgspec

from asgi_cluster.bus.messages import PayloadKind

__all__ = ["decode_payload", "encode_payload", "from_client"]


def encode_payload(data: Any) -> tuple[PayloadKind, bytes]:
    """``str`` as text, ``bytes`` as they are, everything else as JSON.

    Raises:
        TypeError: JSON does not have this.
        ValueError: text with surrogates, or a number that JSON does not have.
    """
    if isinstance(data, str):
        return "t", data.encode()
    if isinstance(data, bytes | bytearray | memoryview):
        return "b", bytes(data)
    return "j", msgspec.json.encode(data)


def decode_payload(kind: PayloadKind, data: bytes) -> Any:
    """What ``encode_payload`` was given."""
    if kind == "t":
        return data.decode()
    return data if kind == "b" else msgspec.json.decode(data)


def from_client(raw: msgspec.Raw) -> tuple[PayloadKind, bytes]:
    """A client's JSON; a JSON string becomes text, so that the app's own sockets get it bare, as from
    ``broadcast("…")``.
    """
    data = bytes(raw)
    if data[:1] == b'"':
        try:
            return "t", msgspec.json.decode(data, type=str).encode()
        except (msgspec.DecodeError, UnicodeEncodeError):
            return "j", data
    return "j", data
