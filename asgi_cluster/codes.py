"""The close codes that sessions and sockets share.

The ranges are those of the Centrifuge client protocol: 3000-3499 and 4000-4499 ask the client to reconnect,
3500-3999 and 4500-4999 do not.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["CloseCode"]


class CloseCode(IntEnum):
    """Why we close a socket."""

    SHUTDOWN = 3001
    """This node is going away: come back, to another one."""
    FORCE_RECONNECT = 3011
    """The session has a new identity (login): come back with the new cookie."""
    STORE_UNAVAILABLE = 4100
    """The session could not be read at the handshake: come back later."""
    UNVERIFIED = 4101
    """The session could not be verified for too long (``unverified_limit``): come back later."""
    SESSION_ENDED = 4501
    """Logged out, here or elsewhere: do not come back without a new login."""
    SESSION_EXPIRED = 4502
    """The session ran into its idle or absolute timeout."""
