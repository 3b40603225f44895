"""The Centrifuge client protocol in JSON, without I/O: bytes in, commands out; results and pushes in, bytes
out.

A frame holds one or more commands (or replies), joined by newlines; ``{}`` is ping and pong; a reply carries
its command's ``id``, a push has none. Payloads stay raw JSON from end to end: they are checked once on their
way in, and never encoded again.

What is checked here, once for all commands: a frame is UTF-8 as a whole and JSON; half of a surrogate pair,
which JSON can write and UTF-8 cannot, is replaced by U+FFFD; ``null`` is an absent field, as in proto3 JSON.
"""

from __future__ import annotations

import base64
import re
from types import UnionType
from typing import Any, get_args, get_origin

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from asgi_cluster.bus.messages import PayloadKind
from asgi_cluster.centrifuge.messages import Command, ErrorCode, Result

__all__ = [
    "PING",
    "BadFrame",
    "decode_commands",
    "encode_error",
    "encode_push",
    "encode_reply",
    "to_json",
]

PING = b"{}"


class BadFrame(ValueError):
    """A frame that is no sequence of commands."""


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
