"""A session that a request creates: what goes to the store, and the record that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asgi_cluster.ids import UserId, new_handle, new_secret, new_token, secret_hash
from asgi_cluster.sessions.device import device_of
from asgi_cluster.sessions.store import NewSession, Record

__all__ = ["new_session", "record_of"]


def new_session(
    scope: Mapping[str, Any],
    user: UserId | None,
    fields: Mapping[str, bytes],
    *,
    idle: float,
    absolute: float,
    persistent: bool = False,
) -> tuple[NewSession, str]:
    """A session with a new handle, and the secret for its cookie."""
    secret = new_secret()
    agent, address = device_of(scope)
    new = NewSession(
        handle=new_handle(user),
        secret=secret_hash(secret.encode()),
        user=user,
        fields=fields,
        write_id=new_token(),
        idle=idle,
        absolute=absolute,
        persistent=persistent,
        epoch=new_token() if user is not None else "",
        agent=agent,
        address=address,
    )
    return new, secret


def record_of(new: NewSession, created_at: float) -> Record:
    """What the store has now."""
    return Record(
        handle=new.handle,
        secret=new.secret,
        previous=None,
        previous_for=0.0,
        user=new.user,
        version=1,
        write_id=new.write_id,
        created_at=created_at,
        expires_in=min(new.idle, new.absolute),
        absolute_in=new.absolute,
        idle=new.idle,
        persistent=new.persistent,
        fields=new.fields,
    )
