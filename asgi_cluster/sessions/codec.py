"""Session values as bytes: msgpack, value by value, and only what comes back equal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from asgi_cluster.arguments import described

__all__ = ["UNCHANGEABLE", "Decoded", "encode_value"]

UNCHANGEABLE = frozenset({type(None), bool, int, float, str, bytes, datetime})
"""By exact type: of any other value, a tuple with a list inside for example, the app may change a part."""

_STORE_PLAIN = (
    "Store plain values: None, bool, int, float, str, bytes, datetime with a time zone, lists and dicts of "
    "them."
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def encode_value(key: object, value: Any, known: bytes | None = None) -> bytes:
    """``value`` in msgpack; ``known`` itself when it still encodes to those bytes.

    Raises:
        TypeError: the key is no string, or the value would come back as something else. Names the key.
    """
    if not isinstance(key, str):
        raise TypeError(f"session keys are strings, not {type(key).__name__}: {key!r}")
    try:
        data = _encode(value)
        if data == known:
            return known
        back = _decode(data)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        cure = f". {_STORE_PLAIN}" if isinstance(error, TypeError) else ""
        raise TypeError(f"session[{key!r}] cannot be stored: {error}{cure}") from error
    # Tuples come back as lists, and that is allowed; anything else has to be equal.
    if back != value and back != _as_lists(value):
        if _holds_naive(value):
            raise TypeError(
                f"session[{key!r}] cannot be stored: a datetime without a time zone would come back as a "
                "str. Give it one, as datetime.now(UTC) does."
            )
        raise TypeError(
            f"session[{key!r}] cannot be stored: {described(value)} would not come back equal. {_STORE_PLAIN}"
        )
    return data


class Decoded:
    """The values of a record. Those that cannot be changed are decoded once for all requests.

    Lists and dicts stay bytes, decoded anew for each request: no two requests share an object that one of
    them may change.
    """

    __slots__ = ("_nested", "_plain")

    def __init__(self, fields: Mapping[str, bytes]) -> None:
        """Raises ``msgspec.DecodeError`` when a value cannot be read."""
        self._plain: dict[str, Any] = {}
        self._nested: dict[str, bytes] = {}
        for key, data in fields.items():
            value = _decoded(data)
            if isinstance(value, list | dict):
                self._nested[key] = data
            else:
                self._plain[key] = value

    def into(self, target: dict[str, Any]) -> None:
        """Put the values into ``target``, past whatever it overrides. Raises ``msgspec.DecodeError``."""
        dict.update(target, self._plain)
        for key, data in self._nested.items():
            dict.__setitem__(target, key, _decoded(data))


def _decoded(data: bytes) -> Any:
    try:
        return _decode(data)
    except (ValueError, RecursionError) as error:  # text that is no UTF-8, lists in lists without end
        raise msgspec.DecodeError(str(error)) from error


def _holds_naive(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_naive, value))
    if isinstance(value, dict):
        return any(map(_holds_naive, value.values()))
    return isinstance(value, datetime) and value.utcoffset() is None


def _as_lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return value
