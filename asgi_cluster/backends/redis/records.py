"""A session as Redis holds it: the meta fields, the application's fields, and durations in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping

from asgi_cluster.ids import Handle, UserId
from asgi_cluster.sessions.store import Record, UserLogout

__all__ = ["decode_fields", "decode_logout", "decode_record", "field_pairs", "milliseconds"]

_LONGEST = 100 * 365 * 24 * 3600
"""Seconds. Redis refuses expiry times that overflow; a hundred years are as good as for ever."""


def milliseconds(seconds: float) -> int:
    """A duration as PEXPIRE takes it: whole, positive, and not so long that it overflows."""
    return max(1, round(min(seconds, _LONGEST) * 1000))


def field_pairs(fields: Mapping[str, bytes]) -> list[str | bytes]:
    """The application's fields as HSET takes them."""
    return [item for key, value in fields.items() for item in (f".{key}", value)]


def decode_fields(lengths: bytes, items: bytes) -> tuple[dict[bytes, bytes], dict[str, bytes]]:
    """The meta fields and the application's, from what ``packed`` in ``session.lua`` makes of a record.

    Raises:
        ValueError: a field's name is no UTF-8.
    """
    meta: dict[bytes, bytes] = {}
    fields: dict[str, bytes] = {}
    sizes = iter(map(int, lengths.split()))
    start = 0
    for key_size, value_size in zip(sizes, sizes, strict=True):
        middle = start + key_size
        end = middle + value_size
        key, value, start = items[start:middle], items[middle:end], end
        if key[:1] == b".":
            fields[key[1:].decode()] = value
        else:
            meta[key] = value
    return meta, fields


def decode_record(handle: Handle, now: int, ttl: int, lengths: bytes, items: bytes) -> Record:
    """The reply of ``session_read.lua``.

    Raises:
        KeyError, ValueError, OverflowError: the record is corrupt: a field is missing, no number, or no
            UTF-8.
    """
    meta, fields = decode_fields(lengths, items)
    previous_for = (int(meta[b"@prev_until"]) - now) / 1000 if b"@prev_until" in meta else 0.0
    user = meta.get(b"@user")
    return Record(
        handle=handle,
        secret=meta[b"@secret"],
        previous=meta[b"@prev"] if previous_for > 0 else None,
        previous_for=max(0.0, previous_for),
        user=None if user is None else UserId(user.decode()),
        version=int(meta[b"@ver"]),
        write_id=meta[b"@write"].decode(),
        created_at=int(meta[b"@created"]) / 1000,
        expires_in=ttl / 1000,
        absolute_in=(int(meta[b"@abs"]) - now) / 1000,
        idle=int(meta[b"@idle"]) / 1000,
        persistent=meta.get(b"@persistent") == b"1",
        fields=fields,
    )


def decode_logout(epoch: bytes, now: int) -> UserLogout | None:
    """The logout that made a user's epoch (``session_end_all.lua``); ``None`` when a login made it, and when
    it cannot be understood: it was tampered with, or the server's clock was set back.
    """
    try:
        name, at, keep, before = epoch.decode().split(" ")
    except ValueError:
        return None
    ago = _ago(at, now)
    if ago is None:
        return None
    return UserLogout(id=name, ago=ago, keep=Handle(keep) if keep else None, before=_ago(before, now))


def _ago(at: str, now: int) -> float | None:
    try:
        ago = (now - int(at)) / 1000
    except (ValueError, OverflowError):
        return None
    return ago if ago >= 0 else None
