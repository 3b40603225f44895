"""Everything that asgi-cluster raises on purpose.

    ClusterError
    ├── NotStarted           used before the cluster was started
    ├── StoreUnavailable     the session store did not answer in time, or refused
    ├── BusUnavailable       a message could not be handed to the bus
    ├── SessionConflict      another request changed the session meanwhile (conflict="error")
    ├── NotPermitted         a room rule, or a connect hook, refused
    └── TokenExpired         a connect hook was given a token that has expired

Bad arguments are ``ValueError`` or ``TypeError``, raised where they are given.
A socket that is gone raises ``OSError``, as the ASGI specification asks of ``send``.
"""

from __future__ import annotations

__all__ = [
    "BusUnavailable",
    "ClusterError",
    "NotPermitted",
    "NotStarted",
    "SessionConflict",
    "StoreUnavailable",
    "TokenExpired",
]


class ClusterError(Exception):
    """The base of every error of this package."""


class NotStarted(ClusterError):
    """The cluster was used before it was started, or after it was stopped."""

    def __init__(self, action: str = "this") -> None:
        self.action = action
        super().__init__(action)

    def __str__(self) -> str:
        return (
            f"{self.action} needs a started cluster. Serve ClusterMiddleware with ASGI lifespan on "
            "(uvicorn --lifespan on), enter it yourself with 'async with cluster:', or use 'memory://', "
            "which needs no start."
        )


class StoreUnavailable(ClusterError):
    """The session store did not answer within the deadline, or refused.

    ``outcome_unknown`` is true when a write was sent and its reply never came: it may have happened.
    ``retry_after`` is the number of seconds after which another try makes sense.
    """

    def __init__(self, reason: str, *, outcome_unknown: bool = False, retry_after: float = 1.0) -> None:
        self.reason = reason
        self.outcome_unknown = outcome_unknown
        self.retry_after = retry_after
        super().__init__(reason)

    def __str__(self) -> str:
        tail = "; the write may have happened" if self.outcome_unknown else ""
        return f"the session store is unavailable: {self.reason}{tail}"


class BusUnavailable(ClusterError):
    """A message could not be handed to the bus.

    ``outcome_unknown`` is true when it was sent and no reply came: some nodes may have it.
    """

    def __init__(self, reason: str, *, outcome_unknown: bool = False) -> None:
        self.reason = reason
        self.outcome_unknown = outcome_unknown
        super().__init__(reason)

    def __str__(self) -> str:
        tail = "; the message may have been delivered" if self.outcome_unknown else ""
        return f"the bus is unavailable: {self.reason}{tail}"


class SessionConflict(ClusterError):
    """Another request changed the session since this one read it (``conflict="error"``)."""

    def __init__(self, handle: str) -> None:
        self.handle = handle
        super().__init__(handle)

    def __str__(self) -> str:
        return f"session {self.handle} was changed by another request since this one read it"


_INVALID_TOKEN = 3500


class NotPermitted(ClusterError):
    """Raised by a room rule or a connect hook to refuse; the client gets ``reason``.

    Without a ``code`` it is answered as error 103 "permission denied" of the Centrifuge protocol. With
    ``code=3500``, which says that the client's token is invalid, the connection is closed with that code and
    the client does not come back: ``raise NotPermitted("invalid token", code=3500)``.

    Raises:
        ValueError: another code.
    """

    def __init__(self, reason: str = "permission denied", *, code: int | None = None) -> None:
        if code not in (None, _INVALID_TOKEN):
            raise ValueError(
                f"code must be None (error 103) or {_INVALID_TOKEN} (invalid token), not {code!r}"
            )
        self.reason = reason
        self.code = code
        super().__init__(reason)

    def __str__(self) -> str:
        return self.reason


class TokenExpired(ClusterError):
    """Raised by a ``connect`` hook when the client's token was good and has expired.

    The client is answered with error 109 "token expired" of the Centrifuge protocol: an SDK with a function
    that fetches tokens fetches a new one and connects again. Raised when a token is refreshed, it closes the
    connection with 3005 "connection expired", and the client connects again.
    """

    def __str__(self) -> str:
        return "the token has expired"
