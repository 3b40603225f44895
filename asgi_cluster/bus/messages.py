"""What travels between the nodes: small frozen structs in msgpack, tagged, never pickle.

Every message goes to the nodes that watch a session bucket, to the members of a room, or to one node.
Session messages are published by the same script that changes the record, before it changes it, so that a
node that received no message has missed no change. A message that cannot be decoded raises
``MalformedMessage``; on the session channels that counts as a gap, because it may have been an
invalidation.

Arrays, not maps, on the wire: fields are only ever appended, each with a default, and an unknown tag is
malformed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

__all__ = [
    "MOST_ENDED",
    "Ack",
    "Changed",
    "Disconnect",
    "Ended",
    "Joined",
    "Left",
    "MalformedMessage",
    "Message",
    "NodeDied",
    "PersonalMessage",
    "Published",
    "UserEnded",
    "decode",
    "encode",
    "name_ended",
]

PayloadKind = Literal["t", "j", "b"]
"""``t`` text as given, ``j`` JSON, ``b`` binary."""

MOST_ENDED = 1000
"""Tokens that one ``UserEnded`` may name: the loop of a node that receives it handles each."""

_Code = Annotated[int, msgspec.Meta(ge=1000, le=4999)]


class Changed(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """A session's record changed: drop it from the cache."""

    handle: str
    origin: str


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """A session is over (logout, login, expiry by hand): drop it, close its sockets, answer with
    ``Ack``.

    ``request`` is ``""`` when no answer is wanted.
    """

    handle: str
    code: _Code
    reason: str
    origin: str
    request: str = ""


class UserEnded(msgspec.Struct, frozen=True, array_like=True, tag="u"):
    """Every session of a user is over, but ``keep``: drop them, close their sockets, answer with ``Ack``.

    ``ended`` are the tokens (handles without their bucket) of those that had not expired. Its place is the
    last, because the store fills it in when it publishes the message (``name_ended``): sockets of other
    sessions may have been opened since. At most ``MOST_ENDED``.
    """

    user: str
    keep: str | None
    code: _Code
    reason: str
    origin: str
    request: str = ""
    ended: Annotated[tuple[str, ...], msgspec.Meta(max_length=MOST_ENDED)] = ()


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """To the origin of a request: this node has done it, and closed that many sockets."""

    request: str
    node: str
    sockets: int


class Published(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """A room broadcast. ``data`` is ready to be framed: UTF-8 text, JSON text or raw bytes, as ``kind`` says.

    ``exclude`` is a connection id that is skipped live; ``client`` the connection that published, if one did.
    ``info`` is the publisher's client info as JSON, ``key`` what the ``latest`` policy keeps the last of.
    """

    kind: PayloadKind
    data: bytes
    id: str
    origin: str
    exclude: str | None = None
    key: str | None = None
    client: str | None = None
    info: bytes | None = None


class Joined(msgspec.Struct, frozen=True, array_like=True, tag="j"):
    """A member joined a room with ``join_leave``. ``info`` is the client info as JSON."""

    client: str
    info: bytes


class Left(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """A member left a room with ``join_leave``. ``info`` is the client info as JSON."""

    client: str
    info: bytes


class PersonalMessage(msgspec.Struct, frozen=True, array_like=True, tag="m"):
    """A message to every socket of one user, or of one session."""

    user: str | None
    handle: str | None
    kind: PayloadKind
    data: bytes
    id: str
    origin: str


class Disconnect(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """Close the sockets of a user or of a session, or take a user (``None``: all members) out of ``room``."""

    user: str | None
    handle: str | None
    room: str | None
    code: _Code
    reason: str
    origin: str


class NodeDied(msgspec.Struct, frozen=True, array_like=True, tag="n"):
    """The registry removed a dead node: its members are to be taken out of the rooms."""

    node: str
    incarnation: str
    origin: str


Message = (
    Changed | Ended | UserEnded | Ack | Published | Joined | Left | PersonalMessage | Disconnect | NodeDied
)


class MalformedMessage(ValueError):
    """Bytes on the bus that are no message of this package, or of an unknown version."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message as it travels."""
    return _encoder.encode(message)


def name_ended(message: bytes, tokens: Sequence[str]) -> bytes:
    """An encoded ``UserEnded`` whose list was empty, with (the last) ``tokens`` in it; all else as it is."""
    empty = _encoder.encode(())
    if not message.endswith(empty):
        return message
    return message.removesuffix(empty) + _encoder.encode(tokens[-MOST_ENDED:])


def decode(data: bytes) -> Message:
    """The message in ``data``.

    Raises:
        MalformedMessage: it is none, or its text is not UTF-8, which must not be sent to a socket.
    """
    try:
        message: Message = _decoder.decode(data)
        match message:
            case Published() | PersonalMessage():
                if message.kind != "b":
                    _check_text(message.data)
                if isinstance(message, Published) and message.info is not None:
                    _check_text(message.info)
            case Joined() | Left():
                _check_text(message.info)
            case _:
                pass
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise MalformedMessage(str(error)) from error
    return message


def _check_text(data: bytes) -> None:
    # It goes into text frames as it is: one that is no UTF-8 would end the connection of each receiver.
    if not data.isascii():
        data.decode()
