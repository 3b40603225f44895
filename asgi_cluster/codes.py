"""The codes with which a socket is closed, or a subscription ends.

The ranges are those of the Centrifuge client protocol (``disconnect.go``): 3000-3499 and 4000-4499 ask the
client to reconnect, 3500-3999 and 4500-4999 do not.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["CloseCode", "UnsubscribeCode"]


class CloseCode(IntEnum):
    """Why a node closes a socket. The codes from 3000 to 3999 are the protocol's own."""

    TOO_BIG = 1009
    """A frame above ``max_message_bytes`` (RFC 6455 section 7.4.1)."""
    SHUTDOWN = 3001
    """This node is going away: come back, to another one."""
    SERVER_ERROR = 3004
    """A hook of the app failed."""
    EXPIRED = 3005
    """The connection's token has expired and was not refreshed."""
    SLOW = 3008
    """The client does not read: its outbox is full."""
    INSUFFICIENT_STATE = 3010
    """Publications are lost to this client: come back and recover."""
    FORCE_RECONNECT = 3011
    """The session has a new identity (login): come back with the new cookie."""
    NO_PONG = 3012
    """The client did not answer a ping."""
    TOO_MANY_REQUESTS = 3013
    """More commands than ``max_commands_per_second``."""
    INVALID_TOKEN = 3500
    """The connect hook refused the token for good."""
    BAD_REQUEST = 3501
    """What the client sent is no command."""
    STALE = 3502
    """No connect command within ``connect_timeout``."""
    FORCE_DISCONNECT = 3503
    """The app ended the connection."""
    CONNECTION_LIMIT = 3504
    """One connection too many of a user or a session."""
    INAPPROPRIATE_PROTOCOL = 3506
    """The client offers only a protocol that is not supported."""
    NOT_AVAILABLE = 3508
    """What the client requested is not available here."""
    STORE_UNAVAILABLE = 4100
    """The session could not be read at the handshake: come back later."""
    UNVERIFIED = 4101
    """The session could not be verified for too long (``unverified_limit``): come back later."""
    SESSION_ENDED = 4501
    """Logged out, here or elsewhere: do not come back without a new login."""
    SESSION_EXPIRED = 4502
    """The session ran into its idle or absolute timeout."""

    @property
    def text(self) -> str:
        """The reason that goes with it."""
        return _TEXTS.get(self, self.name.lower().replace("_", " "))


_TEXTS = {CloseCode.SERVER_ERROR: "internal server error", CloseCode.EXPIRED: "connection expired"}


class UnsubscribeCode(IntEnum):
    """Why a subscription ended (``unsubscribe.go``); from 2500 on the client subscribes again."""

    SERVER = 2000
    INSUFFICIENT_STATE = 2500
