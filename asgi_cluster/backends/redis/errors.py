"""Redis errors as errors of this package.

Only the Redis backend sees those of redis-py; no text repeats a password, a key or a payload.
"""

from __future__ import annotations

import re

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ConnectionError,
    InvalidResponse,
    NoPermissionError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from asgi_cluster.exceptions import StoreUnavailable

__all__ = [
    "NOT_EXECUTED",
    "ConnectionBroken",
    "first_word",
    "is_timeout",
    "reason_of",
    "unavailable",
]

NOT_EXECUTED = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "NOSCRIPT", "LOADING", "READONLY", "MASTERDOWN")
"""First words of error replies which prove that the command did nothing."""

_COMMAND = re.compile(r"no permissions to run the '([\w|-]+)' command")
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -?([A-Z]{3,}) ")

_NO_PASSWORD = re.compile(
    "authentication required|must be called with the client already authenticated", re.I
)
_MISTAKES = (
    (
        re.compile(r"unknown command ['`]hello\b", re.I),
        "the server is too old: Redis 6.2 or newer is needed (it has no HELLO)",
    ),
    (re.compile(r"unknown command ['`]sentinel\b", re.I), "this is no Sentinel"),
    (
        re.compile("DB index is out of range|invalid DB index|SELECT is not allowed"),
        "it has no database of the number in the URL's path",
    ),
)
"""Replies to a URL that names another server than it means, and what is wrong then."""


class ConnectionBroken(Exception):
    """The connection is gone. ``sent``: whether the command may have reached the server."""

    def __init__(self, reason: str, *, sent: bool = True) -> None:
        self.reason = reason
        self.sent = sent
        super().__init__(reason)


def first_word(error: BaseException) -> str:
    """What the server calls the error: ``OOM``, ``NOPERM``…"""
    # redis-py strips the first word off the errors it has classes for.
    if isinstance(error, BusyLoadingError):
        return "LOADING"
    if isinstance(error, NoPermissionError):
        return "NOPERM"
    name = {
        "ReadOnlyError": "READONLY",
        "NoScriptError": "NOSCRIPT",
        "MovedError": "MOVED",
        "AskError": "ASK",
        "TryAgainError": "TRYAGAIN",
        "ClusterDownError": "CLUSTERDOWN",
        "MasterDownError": "MASTERDOWN",
        "OutOfMemoryError": "OOM",
        "ExecAbortError": "EXECABORT",
    }.get(type(error).__name__)
    if name is not None:
        return name
    text = str(error)
    if "ACL failure in script" in text or "can't run this command" in text:  # the latter is Redis 7.0's
        return "NOPERM"
    # Redis 6.2 wraps what a script's command answered: "ERR Error running script (…): @user_script:3: -OOM
    # command not…"
    inner = _IN_SCRIPT.search(text)
    word = inner[1] if inner else text.split(" ", 1)[0]
    return word if word.isupper() and word.isalpha() else "ERR"


def reason_of(error: BaseException) -> str:
    """What is wrong, for people, without secrets."""
    if isinstance(error, ConnectionBroken | StoreUnavailable):
        return error.reason
    if isinstance(error, AuthenticationError | AuthorizationError) and not isinstance(
        error, NoPermissionError
    ):
        if _NO_PASSWORD.search(str(error)):
            return "the server wants a password and was given none (redis://:password@host:6379/0)"
        return "the server refused the user name or password"
    if isinstance(error, NoPermissionError):
        return f"the user lacks a permission: {error}"
    if isinstance(error, BusyLoadingError):
        return "the server is loading its data"
    if isinstance(error, ResponseError):
        for pattern, reason in _MISTAKES:
            if pattern.search(str(error)):
                return reason
        word = first_word(error)
        if word == "NOPERM":
            command = _COMMAND.search(str(error))
            what = f"to run '{command[1]}'" if command else "for a command that a script of this package runs"
            return f"the user lacks the permission {what}: docs/security.md lists what is needed"
        return f"the server answered {word}"
    if isinstance(error, InvalidResponse):
        return "this is no Redis server: what it answered is not Redis's protocol"
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionError):
        # redis-py has no more structure than this; it names host and port, never credentials.
        return str(error) or "the connection failed"
    return type(error).__name__


def is_timeout(error: BaseException) -> bool:
    """Whether it was time that ran out: the server may only be busy."""
    cause = error.__cause__ if isinstance(error, ConnectionBroken) and error.__cause__ is not None else error
    return isinstance(cause, TimeoutError | RedisTimeoutError)


def unavailable(error: BaseException, *, sent: bool) -> StoreUnavailable:
    """The public error for ``error``. After a reply of the server the outcome is certain; without one it is
    not.
    """
    replied = isinstance(error, ResponseError)
    return StoreUnavailable(reason_of(error), outcome_unknown=sent and not replied)
