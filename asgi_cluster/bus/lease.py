"""How long a node may serve its cache without an answer from the bus.

The heartbeat is a write on the subscriber's own connection. Redis executes commands one after another, and
what it pushed to a connection before it executed a command of that connection arrives before the command's
reply. So the reply to a heartbeat sent at *s* proves: every invalidation committed before *s* has been
delivered. So until *s + duration* no change that this node has not received is older than *duration*.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

__all__ = ["Clock", "Heartbeats", "Lease", "boot_clock"]

Clock = Callable[[], float]


def _boot_clock() -> Clock:
    # CLOCK_BOOTTIME goes on while the machine is suspended: a laptop or a paused VM must not resume with a
    # live lease.
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    if clock_id is None:
        return time.monotonic
    return partial(time.clock_gettime, clock_id)


boot_clock: Clock = _boot_clock()
"""Seconds on a clock that never goes back and counts suspended time where the system can."""


class Lease:
    """The time until which no invalidation can have been missed.

    ``until`` is a reading of ``clock``; 0.0 means revoked.
    """

    __slots__ = ("clock", "duration", "until")

    def __init__(self, duration: float, *, clock: Clock = boot_clock) -> None:
        self.duration = duration
        self.clock = clock
        self.until = 0.0

    def renew(self, sent_at: float) -> None:
        """The heartbeat sent at ``sent_at`` was answered by the server that has this node's subscriptions."""
        self.until = max(self.until, sent_at + self.duration)

    def revoke(self) -> None:
        """A gap: messages may have been lost, and only a heartbeat sent from now on proves anything."""
        self.until = 0.0

    @property
    def live(self) -> bool:
        """Whether a cached entry may be served at this moment."""
        return self.clock() < self.until

    @property
    def remaining(self) -> float:
        """Seconds until it lapses; 0.0 when it has."""
        return max(0.0, self.until - self.clock())

    def __repr__(self) -> str:
        return f"<Lease {self.remaining:.3f} s of {self.duration} s>"


class Heartbeats:
    """Which replies to heartbeats may renew the lease: those to heartbeats sent after the last subscription
    was acknowledged, and no others.

    Replies come in the order of the heartbeats, because both travel on one connection.
    """

    __slots__ = ("_beats", "_subscribed", "lease")

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._beats: deque[tuple[float, bool]] = deque()
        self._subscribed = False

    def gap(self) -> None:
        """The connection is gone, or a subscription is: nothing that was sent before can prove anything any
        more.
        """
        self.lease.revoke()
        self._subscribed = False
        self._beats.clear()

    def subscribed(self) -> None:
        """Every subscription is acknowledged: heartbeats sent from now on count."""
        self._subscribed = True

    def beat(self) -> None:
        """A heartbeat is being sent."""
        self._beats.append((self.lease.clock(), self._subscribed))

    def reply(self, renewed: bool) -> None:
        """The oldest heartbeat was answered; ``renewed`` if the write was executed, by the server that has
        this node's subscriptions.
        """
        if self._beats:
            sent_at, counts = self._beats.popleft()
            if counts and renewed:
                self.prove(sent_at)

    def prove(self, sent_at: float) -> None:
        """Nothing that was committed before ``sent_at`` can have been missed."""
        self.lease.renew(sent_at)

    @property
    def waiting_since(self) -> float | None:
        """When the oldest unanswered heartbeat was sent, on the lease's clock; ``None`` when all are
        answered.
        """
        return self._beats[0][0] if self._beats else None
