"""The messages of the Centrifuge client protocol: commands, results, errors, whatever their encoding.

After ``client.proto`` of the protocol's repository. Fields and flags that this module does not have are
ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from msgspec import UNSET, Raw, Struct, UnsetType

__all__ = [
    "Command",
    "ConnectCommand",
    "Empty",
    "ErrorCode",
    "HistoryCommand",
    "Pub",
    "PublishCommand",
    "RefreshCommand",
    "ReplyError",
    "Result",
    "RoomCommand",
    "RpcCommand",
    "SendCommand",
    "StreamPosition",
    "SubscribeCommand",
    "SubscribeResult",
]


class ErrorCode(IntEnum):
    """Errors in replies (the reference server's ``errors.go``)."""

    INTERNAL = 100
    UNAUTHORIZED = 101
    UNKNOWN_CHANNEL = 102
    PERMISSION_DENIED = 103
    METHOD_NOT_FOUND = 104
    ALREADY_SUBSCRIBED = 105
    LIMIT_EXCEEDED = 106
    BAD_REQUEST = 107
    NOT_AVAILABLE = 108
    TOKEN_EXPIRED = 109
    EXPIRED = 110
    TOO_MANY_REQUESTS = 111
    UNRECOVERABLE_POSITION = 112

    @property
    def text(self) -> str:
        """The message that goes with it."""
        return "internal server error" if self is ErrorCode.INTERNAL else self.name.lower().replace("_", " ")

    @property
    def temporary(self) -> bool:
        """Whether the client should try again."""
        return self in (ErrorCode.INTERNAL, ErrorCode.TOO_MANY_REQUESTS)


class ReplyError(Exception):
    """A command failed: ``code`` and ``message`` go back to the client."""

    def __init__(self, code: ErrorCode, message: str | None = None) -> None:
        self.code = code
        self.message = message or code.text
        super().__init__(code, message)


class StreamPosition(Struct, frozen=True):
    """A place in a room's history."""

    offset: int = 0
    epoch: str = ""


class ConnectCommand(Struct, frozen=True):
    """``subs`` (server-side subscriptions to recover) by room."""

    token: str = ""
    data: Raw = Raw()
    name: str = ""
    version: str = ""
    headers: dict[str, str] = {}
    subs: dict[str, SubscribeCommand] = {}


class SubscribeCommand(Struct, frozen=True):
    """``recover`` asks for everything after ``offset`` of ``epoch``."""

    channel: str = ""
    recover: bool = False
    epoch: str = ""
    offset: int = 0
    data: Raw = Raw()
    flag: int = 0
    token: str = ""
    delta: str = ""
    tf: Raw = Raw()
    type: int = 0
    phase: int = 0
    cursor: str = ""
    limit: int = 0
    asc: bool = False

    @property
    def unsupported(self) -> str:
        """What it requests that is not to be had here and would change what a subscription is; ``""``:
        nothing.

        ``positioned``, ``recoverable``, ``join_leave``, ``delta`` and channel compaction (``flag`` 1) are
        offers: the result, or what follows it, says whether the server takes them up.
        """
        if self.type or self.phase or self.cursor or self.limit or self.asc:
            return "map and shared poll subscriptions"
        if bytes(self.tf) not in (b"", b"null"):
            return "tags filters"
        return "subscription tokens" if self.token else ""

    @property
    def rejects_unrecovered(self) -> bool:
        """Whether the client wants error 112 in place of a subscription that could not be recovered."""
        return bool(self.flag & 2)


class RoomCommand(Struct, frozen=True):
    """Unsubscribe, presence, presence stats."""

    channel: str = ""


class PublishCommand(Struct, frozen=True):
    channel: str = ""
    data: Raw = Raw()
    type: int = 0
    key: str = ""
    removed: bool = False

    @property
    def unsupported(self) -> str:
        """As with ``SubscribeCommand``."""
        return "map publications" if self.type or self.key or self.removed else ""


class HistoryCommand(Struct, frozen=True):
    """``limit`` 0: only the position; negative: as many as there are. ``since`` without an epoch: of the
    present one.
    """

    channel: str = ""
    limit: int = 0
    since: StreamPosition | None = None
    reverse: bool = False


class RpcCommand(Struct, frozen=True):
    method: str = ""
    data: Raw = Raw()


class SendCommand(Struct, frozen=True):
    data: Raw = Raw()


class RefreshCommand(Struct, frozen=True):
    token: str = ""


class Empty(Struct, frozen=True):
    """A command, or a result, without fields."""


class Command(Struct, frozen=True):
    """What a client requests; the first field that is set counts."""

    id: int = 0
    connect: ConnectCommand | None = None
    subscribe: SubscribeCommand | None = None
    unsubscribe: RoomCommand | None = None
    publish: PublishCommand | None = None
    presence: RoomCommand | None = None
    presence_stats: RoomCommand | None = None
    history: HistoryCommand | None = None
    ping: Empty | None = None
    send: SendCommand | None = None
    rpc: RpcCommand | None = None
    refresh: RefreshCommand | None = None
    sub_refresh: RoomCommand | None = None


class Pub(Struct, frozen=True):
    """A publication as clients see it. ``offset`` only in rooms with history."""

    data: Raw
    info: Raw | UnsetType = UNSET
    offset: int | UnsetType = UNSET
    tags: dict[str, str] | UnsetType = UNSET


class SubscribeResult(Struct, frozen=True, omit_defaults=True):
    """The position of a subscription, and what it missed."""

    recoverable: bool = False
    epoch: str = ""
    publications: Sequence[Pub] = ()
    recovered: bool = False
    offset: int = 0
    positioned: bool = False
    was_recovering: bool = False


Result = Struct | Mapping[str, Any]
