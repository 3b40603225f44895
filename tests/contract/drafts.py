"""Sessions to store, and short forms of the store's methods for the tests."""

from __future__ import annotations

from typing import Any

from asgi_cluster.ids import Handle, UserId, new_handle, new_token
from asgi_cluster.sessions.store import Change, EndResult, NewSession, SessionStore, UserLogout, WriteOutcome
from tests.contract.sites import TIMEOUT


def draft(user: str | None = None, **changes: Any) -> NewSession:
    """An ordinary session."""
    values: dict[str, Any] = {
        "handle": new_handle(user),
        "secret": b"s" * 32,
        "user": None if user is None else UserId(user),
        "fields": {"cart": b"\x01", "theme": b"\xa4dark"},
        "write_id": new_token(),
        "idle": 100.0,
        "absolute": 1000.0,
        "epoch": new_token(),
        "agent": "Browser/1",
        "address": "192.0.2.1",
    }
    return NewSession(**(values | changes))


async def create(store: SessionStore, user: str | None = None, **changes: Any) -> NewSession:
    """Store one."""
    made = draft(user, **changes)
    await store.create(made, timeout=TIMEOUT)
    return made


async def write(
    store: SessionStore,
    handle: Handle,
    *,
    message: bytes = b"changed",
    ended: bytes = b"emptied",
    timeout: float = TIMEOUT,
    **changes: Any,
) -> WriteOutcome:
    """Change a field, or what is given."""
    values: dict[str, Any] = {"changed": {"cart": b"\x02"}, "write_id": new_token()}
    change = Change(**(values | changes))
    return await store.write(handle, change, message=message, ended=ended, timeout=timeout)


async def rotate(
    store: SessionStore, handle: Handle, current: bytes, secret: bytes, grace: float = 10.0
) -> WriteOutcome:
    """Replace the secret."""
    return await store.rotate(
        handle,
        secret=secret,
        current=current,
        grace=grace,
        write_id=new_token(),
        message=b"rotated",
        timeout=TIMEOUT,
    )


async def end(store: SessionStore, handle: Handle) -> EndResult:
    """Log one out."""
    return await store.end(handle, message=b"ended", timeout=TIMEOUT)


async def end_all(store: SessionStore, user: str, keep: Handle | None = None, epoch: str = "") -> EndResult:
    """Log a user out."""
    return await store.end_all(
        UserId(user), keep=keep, epoch=epoch or new_token(), message=b"all ended", timeout=TIMEOUT
    )


async def last_logout(store: SessionStore, user: str) -> UserLogout | None:
    """The user's last logout everywhere."""
    return (await store.logouts([UserId(user)], timeout=TIMEOUT)).get(UserId(user))


async def alive(store: SessionStore, handle: Handle) -> bool:
    """Whether the store still has it."""
    return await store.read(handle, timeout=TIMEOUT) is not None
