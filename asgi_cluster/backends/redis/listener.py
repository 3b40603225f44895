"""What a subscriber needs of others: a heartbeat, and a receiver of its events."""

from __future__ import annotations

from typing import Protocol

from asgi_cluster.backends.redis.primary import Primary

__all__ = ["Command", "Heartbeat", "Listener"]

Command = tuple[str | bytes | int, ...]
"""A command and its arguments."""


class Heartbeat(Protocol):
    """The commands that a subscriber writes on its connection, over and over."""

    def registration(self) -> Command:
        """Registers the node; answers anything but an error."""
        ...

    def beat(self) -> Command:
        """Answers 1, or 0 when the node is not registered (any more)."""
        ...

    def interrupted(self) -> None:
        """The lease was not live without a break."""
        ...


class Listener(Protocol):
    """Called with the events of the subscriber of ``primary``, on the event loop; must not block.

    A protocol, because its implementation makes the subscribers, and they must not import it.
    """

    def heartbeat(self, primary: Primary) -> Heartbeat:
        """Which heartbeat to send at this moment."""
        ...

    def message(self, channel: str, payload: bytes) -> None:
        """It came on one of the subscriber's channels."""
        ...

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        """Messages may have been lost on these channels.

        Their lease is 0 already, or they have none any more.
        """
        ...

    def acknowledged(self, primary: Primary, channels: frozenset[str]) -> None:
        """From now on messages on these channels arrive."""
        ...

    def reported(self) -> None:
        """A primary of a Cluster has reported its epoch (``PrimaryReport``), and answered a heartbeat."""
        ...

    def moved(self) -> None:
        """A slot has moved to another server."""
        ...
