"""What a ``SubscriberSet`` needs of others: listeners of its channels, and heartbeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from asgi_cluster.backends.redis.listener import Heartbeat
from asgi_cluster.backends.redis.primary import Primary

__all__ = ["ChannelListener", "Channels", "HeartbeatSource"]


class ChannelListener(Protocol):
    """Gets what happens to its channels, and only to these. Called on the event loop; must not block."""

    def message(self, channel: str, payload: bytes) -> None:
        """It came on this channel."""
        ...

    def gap(self, reason: str, channels: frozenset[str]) -> None:
        """Messages may have been lost on these channels, maybe none. Their lease is 0 already."""
        ...

    def restored(self, channels: frozenset[str]) -> None:
        """A subscriber is connected again, and these channels, maybe none, are subscribed again."""
        ...


Channels = Sequence[tuple[ChannelListener, Sequence[str]]]
"""Listeners, each with its channels."""


class HeartbeatSource(Protocol):
    """Where subscribers are needed, and which heartbeats they send."""

    def primaries(self) -> Sequence[Primary]:
        """Those that need a subscriber, as of the last look."""
        ...

    def heartbeat(self, primary: Primary) -> Heartbeat:
        """The heartbeat there, at this moment. Raises ``ConnectionBroken`` when there can be none."""
        ...
