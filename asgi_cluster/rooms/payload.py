"""What applications and clients send, as it travels."""

from __future__ import annotations

from typing import Any

import msgspec

from asgi_cluster.bus.messages import PayloadKind

__all__ = ["decode_payload", "encode_payload", "from_client", "read_client"]

_DEEPEST = 128


def encode_payload(data: Any) -> tuple[PayloadKind, bytes]:
    """``str`` as text, ``bytes`` as they are, everything else as JSON.

    Raises:
        TypeError: JSON does not have this.
        ValueError: text with surrogates, or a number that JSON does not have.
    """
    try:
        if isinstance(data, str):
            return "t", data.encode()
        if isinstance(data, bytes | bytearray | memoryview):
            return "b", bytes(data)
        encoded = msgspec.json.encode(data)
        encoded.decode()  # a ``msgspec.Raw`` in it is not looked into
    except UnicodeError as error:
        raise ValueError(
            f"this cannot be sent, because it is not Unicode text ({error}). A text that was cut inside an "
            'emoji ends in half of a surrogate pair; text.encode("utf-16", "surrogatepass").decode("utf-16", '
            '"replace") replaces that. Binary data is sent as bytes.'
        ) from error
    return "j", encoded


def decode_payload(kind: PayloadKind, data: bytes) -> Any:
    """What ``encode_payload`` was given.

    Raises:
        ValueError: it is not readable. ``encode_payload`` and ``from_client`` make nothing like that.
    """
    if kind == "t":
        return data.decode()
    return data if kind == "b" else _decode(data)


def _decode(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except RecursionError as error:
        raise ValueError("too many levels") from error


def read_client(raw: msgspec.Raw) -> Any:
    """A client's JSON, decoded; ``None`` when there is none.

    Raises:
        ValueError: numbers out of range, or more than 128 levels. That is legal JSON, but other clients and
            readers of the history may fail to decode it, so it must not reach them.
    """
    data = bytes(raw)
    if not data:
        return None
    value = _decode(data)
    if data.count(b"[") + data.count(b"{") > _DEEPEST:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST + 1):
        containers = [found for found in level if isinstance(found, dict | list)]
        if not containers:
            return
        level = [
            inner for found in containers for inner in (found.values() if isinstance(found, dict) else found)
        ]
    raise ValueError(f"more than {_DEEPEST} levels")


def from_client(raw: msgspec.Raw) -> tuple[PayloadKind, bytes]:
    """A client's JSON that ``read_client`` can read; a JSON string becomes text, so that the app's own
    sockets get it bare, as from ``broadcast("…")``.
    """
    data = bytes(raw)
    if data[:1] == b'"':
        return "t", msgspec.json.decode(data, type=str).encode()
    return "j", data
