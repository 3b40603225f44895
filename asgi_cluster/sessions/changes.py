"""What differs between the contents of a session and its record, key by key. It does no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from asgi_cluster.sessions.codec import encode_value

__all__ = ["Changes", "carried_over", "differences"]

Changes = tuple[Mapping[str, bytes], Sequence[str]]
"""New values, encoded, and removed keys."""


def differences(
    contents: dict[str, Any], known: Mapping[str, bytes], touched: Set[str], *, max_bytes: int
) -> Changes:
    """What a request changed in ``known``, by its assignments (``touched``) or in place.

    Raises:
        TypeError: a value would not come back equal; names the key.
        ValueError: the session holds more than ``max_bytes``.
    """
    changed = {}
    for key, value in dict.items(contents):
        before = known.get(key)
        data = encode_value(key, value, before)
        if data is not before or key in touched:
            changed[key] = data
    removed = [key for key in {*known, *touched} if not dict.__contains__(contents, key)]
    if changed:
        size = sum(map(len, changed.values())) + sum(len(v) for k, v in known.items() if k not in changed)
        if size > max_bytes:
            raise ValueError(f"the session holds {size} bytes; max_bytes is {max_bytes}")
    return changed, removed


def carried_over(known: Mapping[str, bytes], held: Mapping[str, bytes], own: Set[str]) -> Changes:
    """What brings a new session, which has got ``known`` of the one that it replaces, to ``held``: what that
    has now. The request's ``own`` keys stay as the request has them.
    """
    changed = {key: data for key, data in held.items() if key not in own and data != known.get(key)}
    return changed, [key for key in known if key not in own and key not in held]
