"""The identifiers that travel, as types of their own."""

from __future__ import annotations

import hashlib
import secrets
from typing import NewType

from asgi_cluster.arguments import expect

__all__ = [
    "BUCKETS",
    "ConnectionId",
    "Handle",
    "NodeId",
    "UserId",
    "bucket_of",
    "check_user",
    "new_handle",
    "new_secret",
    "new_token",
    "secret_hash",
]

BUCKETS = 256

NodeId = NewType("NodeId", str)
"""``label-pid-random``: one running cluster object."""

Handle = NewType("Handle", str)
"""``<bucket>.<token>``: names a session without giving access to it; safe to show and to log."""

UserId = NewType("UserId", str)
"""The application's own name for a person, at most 255 characters."""

ConnectionId = NewType("ConnectionId", str)
"""One WebSocket connection, unique in the cluster."""


def check_user(user_id: object) -> UserId:
    """The user id, if it can be one: 1 to 255 printable characters.

    Raises:
        TypeError, ValueError: it cannot.
    """
    cure = f": convert it, str({user_id})" if isinstance(user_id, int) else ""
    expect("user_id", user_id, str, cure=cure)
    if not isinstance(user_id, str) or not 1 <= len(user_id) <= 255 or not user_id.isprintable():
        raise ValueError(f"user_id must be 1 to 255 printable characters, not {user_id!r}")
    return UserId(user_id)


def bucket_of(user: str) -> int:
    """The bucket (0 to 255) that holds everything of ``user``."""
    return hashlib.sha256(user.encode()).digest()[0]


def new_handle(user: str | None) -> Handle:
    """A fresh handle, in the user's bucket, or in a random one when ``user`` is ``None``."""
    bucket = secrets.randbelow(BUCKETS) if user is None else bucket_of(user)
    return Handle(f"{bucket:02x}.{secrets.token_urlsafe(16)}")


def new_secret() -> str:
    """A fresh cookie secret with 256 bits of entropy (OWASP asks for at least 64)."""
    return secrets.token_urlsafe(32)


def secret_hash(secret: bytes) -> bytes:
    """SHA-256 of a cookie secret: what the record holds. The secret itself is never stored."""
    return hashlib.sha256(secret).digest()


def new_token() -> str:
    """A fresh random name with 96 bits: write ids, request ids, epochs, connection ids."""
    return secrets.token_urlsafe(12)
