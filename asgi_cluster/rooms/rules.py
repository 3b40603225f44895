"""Which rooms clients may enter, and what these rooms can do."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from asgi_cluster.arguments import Seconds, expect, seconds
from asgi_cluster.rooms.names import FORBIDDEN
from asgi_cluster.sockets.batches import SlowPolicy

if TYPE_CHECKING:
    from asgi_cluster.rooms.connection import Connection

__all__ = [
    "ConnectRequest",
    "Connected",
    "Permission",
    "RoomRequest",
    "RoomRule",
    "find_rule",
]

_WILDCARD = re.compile(r"\*|<[^<>]*>")
_PARAMETER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectRequest:
    """A client of the built-in endpoint connects, or goes on after ``expires_in`` with a new token.

    ``data`` is what the client sent along, decoded; ``None`` when it sent nothing. ``user_id`` is the
    session's user, or the one that ``identify`` found, if any: in a refresh too, whoever the hook named when
    the client connected.
    """

    token: str
    data: Any
    headers: Mapping[str, str]
    """Headers that the client's SDK emulates in the connect command: set by the client, and not to be
    trusted.
    """
    session: Any
    """The ``Session`` of the handshake."""
    user_id: str | None
    scope: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Connected:
    """What a ``connect`` hook may return in place of a bare user id."""

    user_id: str | None = None
    """``None``: the session's user. When the answer to a refresh means another user than the connection has,
    the connection is closed with 3500.
    """
    expires_in: Seconds[float | None] = Seconds(None)
    """Seconds (or a ``timedelta``) after which the client has to refresh, with a new token; ``None``: never
    (again).
    """
    data: Any = None
    """Goes to the client in the connect reply; any JSON value."""
    info: Any = None
    """Shown to others in presence, joins, leaves and publications (``conn_info``); any JSON value."""
    rooms: Sequence[str] = ()
    """Rooms that the client is subscribed to by the server, without a request of its own."""

    def __post_init__(self) -> None:
        if self.expires_in is not None:
            object.__setattr__(self, "expires_in", seconds("expires_in", self.expires_in))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomRequest:
    """A client is about to subscribe to a room, publish in it, or see its presence or history.

    ``params`` holds what the pattern's ``{names}`` matched; ``data`` what the client sent along, decoded, or
    ``None``.
    """

    connection: Connection
    room: str
    params: Mapping[str, str]
    data: Any = None


Permission = Callable[[RoomRequest], bool | Awaitable[bool]] | Literal[True] | None


@dataclass(frozen=True, slots=True)
class RoomRule:
    """Opens the rooms whose names match ``pattern`` to clients. The first rule that matches counts.

    ``{name}`` in the pattern matches one or more characters except ``:``; everything else stands for itself.
    ``*`` and ``<name>`` are refused, because they are meant as ``{name}``.

    Raises:
        TypeError: an argument of the wrong type; names it.
        ValueError: a pattern that cannot be meant, or options that do not go together.
    """

    pattern: str
    _: KW_ONLY
    subscribe: Permission = None
    """``(RoomRequest) -> bool`` or awaitable, or raises ``NotPermitted``; ``True``: every client;
    ``None``: no client. Anything but a bool refuses, and is logged as an error.
    """
    publish: Permission = None
    """As ``subscribe``, for publications of clients."""
    history: int = 0
    """Publications kept, whoever publishes; 0: none. Where nodes' rules differ, the largest counts."""
    history_ttl: Seconds[float] = Seconds(600)
    """Seconds (or a ``timedelta``) after its last publication for which a room keeps its history."""
    presence: bool = False
    """Whether subscribers can see who is in the room."""
    join_leave: bool = False
    """Whether subscribers get joins and leaves."""
    slow: SlowPolicy = "disconnect"
    """What happens to a subscriber who does not read fast enough: it is disconnected (3008) and comes back,
    the message is dropped for it, or only the latest message per ``key`` is kept for it. The last two need
    ``history=0``."""
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        expect("pattern", self.pattern, str)
        if not self.pattern:
            raise ValueError(f"a room rule needs a pattern, not {self.pattern!r}")
        if FORBIDDEN.search(self.pattern):
            raise ValueError(
                f"room rule {self.pattern!r} can never match: a room name has no control characters, line "
                "ends, surrogates or U+FFFD"
            )
        named = f"room rule {self.pattern!r}:"
        expect(f"{named} presence", self.presence, bool)
        expect(f"{named} join_leave", self.join_leave, bool)
        object.__setattr__(self, "history_ttl", seconds(f"{named} history_ttl", self.history_ttl))
        names = _PARAMETER.findall(self.pattern)
        if len(set(names)) < len(names):
            raise ValueError(f"room rule {self.pattern!r} uses a name twice")
        literals = _PARAMETER.split(self.pattern)[::2]
        if any(set(literal) & set("{}") for literal in literals):
            raise ValueError(f"room rule {self.pattern!r} has a brace that is not part of a {{name}}")
        for literal in literals:
            wildcard = _WILDCARD.search(literal)
            if wildcard is not None:
                raise ValueError(
                    f"room rule {self.pattern!r}: {wildcard[0]!r} would stand for itself. Write {{name}} for "
                    'what varies, as in "chat:{name}"; it matches one or more characters except ":"'
                )
        for name in ("subscribe", "publish"):
            permission = getattr(self, name)
            if permission is not None and permission is not True and not callable(permission):
                raise ValueError(f"room rule {self.pattern!r}: {name} must be a function, True or None")
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 0:
            raise ValueError(f"{named} history must be a whole number of at least 0, not {self.history!r}")
        if not self.history_ttl > 0:
            raise ValueError(
                f"room rule {self.pattern!r}: history_ttl must be above 0, not {self.history_ttl!r}"
            )
        if self.slow not in ("disconnect", "drop", "latest"):
            raise ValueError(
                f"room rule {self.pattern!r}: slow must be disconnect, drop or latest, not {self.slow!r}"
            )
        if self.history and self.slow != "disconnect":
            raise ValueError(
                f"room rule {self.pattern!r}: slow={self.slow!r} loses messages, history must not: "
                'use slow="disconnect" (the client comes back and recovers), or history=0'
            )
        expression = "".join(
            re.escape(part) if index % 2 == 0 else f"(?P<{part}>[^:]+)"
            for index, part in enumerate(_PARAMETER.split(self.pattern))
        )
        object.__setattr__(self, "_regex", re.compile(expression))

    def match(self, room: str) -> dict[str, str] | None:
        """What the pattern's names stand for in ``room``; ``None`` when it does not match."""
        found = self._regex.fullmatch(room)
        return None if found is None else found.groupdict()

    def covers(self, other: RoomRule) -> bool:
        """Whether every room of ``other`` is one of this rule too."""
        # A character that no literal holds stands for "anything but a colon": what matches with it matches
        # always.
        return self._regex.fullmatch(_PARAMETER.sub("\ue000", other.pattern)) is not None


def find_rule(rules: Sequence[RoomRule], room: str) -> tuple[RoomRule, dict[str, str]] | None:
    """The first rule for ``room``, and what its pattern's names stand for."""
    for rule in rules:
        params = rule.match(room)
        if params is not None:
            return rule, params
    return None
