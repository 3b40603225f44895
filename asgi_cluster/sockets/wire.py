"""How messages look to one kind of client."""

from __future__ import annotations

from typing import Protocol

from asgi_cluster.bus.messages import PayloadKind, Published
from asgi_cluster.sockets.prepared import PreparedMessage

__all__ = ["BARE", "Wire"]


class Wire(Protocol):
    """One form in which messages travel. There is one object of each, and it has no state.

    A message is encoded once for each form that its receivers have, whatever their number.
    """

    @property
    def joins(self) -> bool:
        """Whether several messages, all of them text, may travel as one, joined by newlines."""
        ...

    def message(self, kind: PayloadKind, data: bytes) -> PreparedMessage:
        """What the app sends to one connection, user or session."""
        ...

    def publication(
        self, room: str, message: Published, offset: int | None, *, local: bool
    ) -> PreparedMessage:
        """A publication. ``offset`` is ``None`` without history; ``local``: it did not go over the bus
        (``on_bus_error="local"``).
        """
        ...

    def join(self, room: str, info: bytes) -> PreparedMessage | None:
        """A member has come; ``info`` is its client info as JSON. ``None``: this form has no such message."""
        ...

    def leave(self, room: str, info: bytes) -> PreparedMessage | None:
        """A member has gone. As ``join``."""
        ...


class _Bare:
    """The payload and nothing else: the app's own sockets."""

    joins = False

    def message(self, kind: PayloadKind, data: bytes) -> PreparedMessage:
        return PreparedMessage(data, binary=kind == "b")

    def publication(
        self, room: str, message: Published, offset: int | None, *, local: bool
    ) -> PreparedMessage:
        return PreparedMessage(message.data, binary=message.kind == "b")

    def join(self, room: str, info: bytes) -> None:
        return None

    def leave(self, room: str, info: bytes) -> None:
        return None


BARE: Wire = _Bare()
"""The payload and nothing else: the app's own sockets."""
