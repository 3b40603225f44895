"""The Centrifuge client protocol in JSON, without I/O: bytes in, commands out; results and pushes in, bytes
out.

After ``client.proto`` of the protocol's repository: a frame holds one or more commands (or replies), joined
by newlines; ``{}`` is ping and pong; a reply carries its command's ``id``, a push has none. Fields and flags
that this module does not have are ignored. Payloads stay raw JSON from end to end: they are checked once on
their way in, and never encoded again.

What is checked here, once for all commands: a frame is UTF-8 as a whole and JSON; half of a surrogate pair,
which JSON can write and UTF-8 cannot, is replaced by U+FFFD; ``null`` is an absent field, as in proto3 JSON.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from types import UnionType
from typing import Any, get_args, get_origin

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from asgi_cluster.bus.messages import PayloadKind

__all__ = [
    "PING",
    "BadFrame",
    "Command",
    "ErrorCode",
    "Pub",
    "ReplyError",
    "Result",
    "StreamPosition",
    "SubscribeResult",
    "decode_commands",
    "encode_error",
    "encode_push",
    "encode_reply",
    "to_json",
]

PING = b"{}"


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


class BadFrame(ValueError):
    """A frame that is no sequence of commands."""


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
        """What it asks for that is not to be had here and would change what a subscription is; ``""``:
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
    """What a client asks for; the first field that is set counts."""

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
    """Where a subscription stands, and what it missed."""

    recoverable: bool = False
    epoch: str = ""
    publications: Sequence[Pub] = ()
    recovered: bool = False
    offset: int = 0
    positioned: bool = False
    was_recovering: bool = False


Result = Struct | Mapping[str, Any]


def _nullable(kind: Any) -> Any:
    """``kind``, or ``null``; so may be each field of a ``Struct`` and each value of a ``dict`` in it. ``Raw``
    stays: in a payload ``null`` is data.
    """
    kind = next((member for member in get_args(kind) if get_origin(kind) is UnionType), kind)
    if get_origin(kind) is dict:
        value = _nullable(get_args(kind)[1])
        kind = dict[str, value]  # type: ignore[valid-type]
    elif issubclass(kind, Struct):
        fields = msgspec.structs.fields(kind)
        kind = msgspec.defstruct(
            kind.__name__,
            [
                (field.name, Raw | UnsetType, UNSET)
                if field.type is Raw
                else (field.name, _nullable(field.type), None)
                for field in fields
            ],
            omit_defaults=True,
        )
    return kind | None


_decoder = msgspec.json.Decoder(Command)
_nullable_decoder = msgspec.json.Decoder(_nullable(Command))
_encoder = msgspec.json.Encoder()


def decode_commands(frame: bytes) -> list[Command]:
    """The commands of a frame; ``{}`` (a pong) is a ``Command`` with nothing set.

    Raises:
        BadFrame: not UTF-8, not JSON, not an object, a field of the wrong type, or no command at all.
    """
    try:
        frame.decode()  # the decoder does not look into raw payloads and unknown fields
        commands = [_decode(line) for line in frame.split(b"\n") if line and not line.isspace()]
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise BadFrame(type(error).__name__) from error
    if not commands:
        raise BadFrame("an empty frame")
    return commands


def _decode(line: bytes) -> Command:
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        return _decoder.decode(_encoder.encode(_without_nulls(_well_formed(line))))


_HALF = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
"""Half of a surrogate pair, alone, where each backslash begins an escape."""

_BACKSLASH = b"\xff\xff"
"""Stands for an escaped backslash: UTF-8 does not have these bytes."""


def _well_formed(line: bytes) -> bytes:
    line = _HALF.sub(rb"\\ufffd", line.replace(rb"\\", _BACKSLASH))
    return line.replace(_BACKSLASH, rb"\\")


def _without_nulls(line: bytes) -> Any:
    """A command, ready to be encoded, without what is ``null``, except in payloads, and without unknown
    fields.

    A client chooses what is in the line, so this reads it once, whatever that is.
    """
    command = _nullable_decoder.decode(line)  # a null is None, and encoding leaves out fields that are None
    if command is not None and command.connect is not None:  # a line that is null stays so, and is refused
        for values in (command.connect.headers, command.connect.subs):
            for name in [name for name, value in (values or {}).items() if value is None]:
                del values[name]
    return command


def encode_reply(command_id: int, name: str, result: Result) -> bytes:
    """The reply to a command that succeeded."""
    return _encoder.encode({"id": command_id, name: result})


def encode_error(command_id: int, code: ErrorCode, message: str) -> bytes:
    """The reply to a command that failed."""
    error: dict[str, Any] = {"code": int(code), "message": message}
    if code.temporary:
        error["temporary"] = True
    return _encoder.encode({"id": command_id, "error": error})


def encode_push(name: str, value: Result, *, channel: str | None = None) -> bytes:
    """A push: ``pub``, ``join``, ``leave``, ``unsubscribe``, ``subscribe`` (with ``channel``), ``message``,
    ``disconnect``.
    """
    push = {name: value} if channel is None else {"channel": channel, name: value}
    return _encoder.encode({"push": push})


def to_json(kind: PayloadKind, data: bytes) -> Raw:
    """A payload as JSON clients get it: text as a string, bytes as base64 (the proto3 JSON mapping)."""
    if kind == "j":
        return Raw(data)
    text = data.decode() if kind == "t" else base64.b64encode(data).decode()
    return Raw(_encoder.encode(text))
