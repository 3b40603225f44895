"""The errors of asgi-cluster.

    ClusterError
    ├── NotStarted           used before the cluster was started
    ├── StoreUnavailable     the session store did not answer in time, or refused
    ├── BusUnavailable       a message could not be published, or a room not joined
    ├── SessionConflict      another request changed the session meanwhile (conflict="error")
    ├── NotPermitted         a room rule, or a connect hook, refused
    └── TokenExpired         a connect hook was given a token that has expired

A wrong argument is a ``ValueError`` or a ``TypeError`` of the call that gets it. Sending to a closed
WebSocket raises ``OSError``, as the ASGI specification requires of ``send``.
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
    """The cluster was used before it was started, or after it was stopped.

    ``action`` names what was called.
    """

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

    The middleware answers it with 503 unless the app handles it. ``reason`` says what happened.
    ``outcome_unknown`` is true when a write was sent and no reply came: it may have been executed.
    ``retry_after`` is the number of seconds after which a retry makes sense; it becomes ``Retry-After``.
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
    """Redis did not take a message or a subscription within the deadline, or refused it.

    The middleware answers it with 503 unless the app handles it. ``reason`` says what happened.
    ``outcome_unknown`` is true when the message was sent and no reply came: some nodes may have received it.
    """

    def __init__(self, reason: str, *, outcome_unknown: bool = False) -> None:
        self.reason = reason
        self.outcome_unknown = outcome_unknown
        super().__init__(reason)

    def __str__(self) -> str:
        tail = "; the message may have been delivered" if self.outcome_unknown else ""
        return f"the bus is unavailable: {self.reason}{tail}"


class SessionConflict(ClusterError):
    """Another request changed the session since this one read it (``SessionConfig(conflict="error")``).

    Nothing was written. The middleware answers it with 409 unless the app handles it. ``handle`` is the
    session's public name.
    """

    def __init__(self, handle: str) -> None:
        self.handle = handle
        super().__init__(handle)

    def __str__(self) -> str:
        return f"session {self.handle} was changed by another request since this one read it"


_INVALID_TOKEN = 3500


class NotPermitted(ClusterError):
    """Raised by a room rule or a connect hook to refuse; the client gets ``reason``.

    With ``code=None`` the answer is error 103 "permission denied" of the Centrifuge protocol. ``code=3500``
    means that the client's token is invalid: the connection is closed with that code, and the client does not
    reconnect. Write ``raise NotPermitted("invalid token", code=3500)``.

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
    """Raised by a ``connect`` hook when the client's token was valid and has expired.

    The answer to a connect is error 109 "token expired" of the Centrifuge protocol: an SDK that has a
    function for tokens calls it for a new one and connects again. When the client refreshes its token, this
    error closes the connection with 3005 "connection expired", and the client connects again.
    """

    def __str__(self) -> str:
        return "the token has expired"
