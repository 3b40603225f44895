"""Handles on users and sessions, wherever in the cluster they are."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from asgi_cluster.arguments import described, expect, seconds
from asgi_cluster.bus.messages import Disconnect, PersonalMessage, encode
from asgi_cluster.bus.session_bus import SessionBus
from asgi_cluster.codes import CloseCode
from asgi_cluster.ids import Handle, UserId, bucket_of, new_token
from asgi_cluster.node import Node
from asgi_cluster.rooms.payload import encode_payload
from asgi_cluster.sessions.receipts import LogoutReceipt
from asgi_cluster.sessions.service import SessionService
from asgi_cluster.sessions.session import Session

__all__ = ["RemoteSession", "RemoteUser", "SessionInfo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """One of a user's current sessions."""

    handle: Handle
    created_at: datetime
    """When it signed in, by the store's clock."""
    seen_at: datetime
    """When it was last used, right to a tenth of the idle timeout."""
    expires_at: datetime
    """When it ends unless it is used."""
    agent: str
    """The User-Agent of its login; ``""`` when there was none."""
    address: str
    """The client address of its login, as the ASGI server gave it."""


class RemoteSession:
    """``cluster.session(handle)``: a session by its public handle, on whatever nodes its sockets are."""

    __slots__ = ("_bus", "_service", "handle")

    def __init__(self, service: SessionService, bus: SessionBus, handle: Handle) -> None:
        self._service = service
        self._bus = bus
        self.handle = handle

    async def logout(self, reason: str = "logged out", timeout: float | timedelta = 1.0) -> LogoutReceipt:
        """End it on every node and close its sockets with 4501. ``timeout`` and ``StoreUnavailable`` as in
        ``Session.logout``.
        """
        return await self._service.logouts.end(
            self.handle, code=CloseCode.SESSION_ENDED, reason=reason, timeout=seconds("timeout", timeout)
        )

    async def send(self, data: Any) -> None:
        """Send ``data`` to every socket of this session, at most once each; a socket that is not connected
        misses it.

        Raises:
            BusUnavailable: it could not be handed to the bus.
        """
        kind, payload = encode_payload(data)
        message = PersonalMessage(None, self.handle, kind, payload, new_token(), self._service.node.id)
        await _publish(self._service.node, self._bus, int(self.handle[:2], 16), encode(message))

    def __repr__(self) -> str:
        return f"<RemoteSession {self.handle}>"


class RemoteUser:
    """``cluster.user(id)``: the sessions and sockets of a user, on all nodes."""

    __slots__ = ("_bus", "_service", "id")

    def __init__(self, service: SessionService, bus: SessionBus, user: UserId) -> None:
        self._service = service
        self._bus = bus
        self.id = user

    async def sessions(self) -> Sequence[SessionInfo]:
        """The current sessions, the most recently used first. One round trip. Raises ``StoreUnavailable``."""
        node = self._service.node
        node.ensure_started("listing sessions")
        devices = await self._service.reader.devices(self.id, timeout=node.deadline)
        now = datetime.now().astimezone().timestamp()
        return [
            SessionInfo(
                handle=device.handle,
                created_at=_moment(device.created_at),
                seen_at=_moment(device.seen_at),
                expires_at=_moment(now + device.expires_in),
                agent=device.agent,
                address=device.address,
            )
            for device in devices
        ]

    def session(self, handle: str) -> RemoteSession:
        """One of this user's sessions.

        Raises:
            ValueError: the handle cannot be one of this user's.
        """
        checked = check_handle(handle)
        if int(checked[:2], 16) != bucket_of(self.id):
            raise ValueError(f"{handle!r} is no session of this user")
        return RemoteSession(self._service, self._bus, checked)

    async def logout(
        self,
        *,
        exclude: Session | str | None = None,
        reason: str = "logged out everywhere",
        timeout: float | timedelta = 1.0,
    ) -> LogoutReceipt:
        """End every session of this user but ``exclude`` (a session or its handle), and close their sockets
        with 4501.

        Sockets of this user without a session of the cluster (``identify=``) are closed too. One round
        trip, and then the acknowledgements, at most ``timeout`` (seconds or a ``timedelta``). Raises
        ``StoreUnavailable`` as ``Session.logout``.
        """
        keep = exclude.handle if isinstance(exclude, Session) else exclude
        return await self._service.logouts.end_all(
            self.id,
            keep=None if keep is None else check_handle(keep),
            code=CloseCode.SESSION_ENDED,
            reason=reason,
            timeout=seconds("timeout", timeout),
        )

    async def send(self, data: Any) -> None:
        """Send ``data`` to every socket of this user, at most once each. Raises ``BusUnavailable``."""
        kind, payload = encode_payload(data)
        message = PersonalMessage(self.id, None, kind, payload, new_token(), self._service.node.id)
        await _publish(self._service.node, self._bus, bucket_of(self.id), encode(message))

    async def disconnect(self, code: int = 3503, reason: str = "force disconnect") -> None:
        """Close every socket of this user; the sessions go on. ``code`` as in ``codes.CloseCode``. Raises
        ``BusUnavailable``.
        """
        expect("code", code, int)
        if not 3000 <= code <= 4999:
            raise ValueError(f"a close code is 3000 to 4999, not {code!r}")
        message = Disconnect(self.id, None, None, code, reason, self._service.node.id)
        await _publish(self._service.node, self._bus, bucket_of(self.id), encode(message))

    def __repr__(self) -> str:
        return f"<RemoteUser {self.id!r}>"


def check_handle(handle: str) -> Handle:
    """The handle, if it has the shape of one.

    Raises:
        TypeError, ValueError: it has not.
    """
    if not isinstance(handle, str):
        raise TypeError(f"a session handle is a str, not {described(handle)}")
    bucket, dot, token = handle.partition(".")
    hexadecimal = len(bucket) == 2 and all(digit in "0123456789abcdef" for digit in bucket)
    if not (dot and hexadecimal and len(token) == 22 and token.replace("-", "a").replace("_", "a").isalnum()):
        raise ValueError(f"not a session handle: {handle!r}")
    return Handle(handle)


def _publish(node: Node, bus: SessionBus, bucket: int, payload: bytes) -> Awaitable[None]:
    node.ensure_started("sending")
    return bus.publish(bucket, payload, timeout=node.deadline)


def _moment(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp).astimezone()
