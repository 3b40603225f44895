"""Makes a server send messages and measures the cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.generator import Crowd
from loadtest.processes import Target

Say = Callable[[str], None]
"""Prints one line of progress."""


@dataclass(frozen=True)
class Measure:
    """The result of one run: messages to a number of sockets."""

    sent: int
    deliveries: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        """Deliveries per second of wall clock."""
        return self.deliveries / self.seconds if self.seconds else 0.0

    @property
    def cost(self) -> float:
        """Microseconds of the server's CPU per delivery."""
        return self.cpu / self.deliveries * 1e6 if self.deliveries else float("nan")


def saturated(target: Target, clients: Crowd, *, size: int, seconds: float) -> Measure:
    """The highest rate: ten publishes at a time, and at most two portions that have not arrived yet."""
    sockets = clients.plan.sockets
    # A portion is much smaller than what any of the servers queues for one slow client.
    largest = max(10, min(1000, 400_000 // sockets, 200_000 // size) // 10 * 10)
    portion = 10
    before, cpu, start = clients.received, target.cpu(), time.monotonic()
    sent = 0
    while time.monotonic() - start < seconds:
        asked = time.monotonic()
        target.ask(f"/publish?count={portion}&batch=10&size={size}")
        sent += portion
        if not clients.wait_received(before + (sent - portion) * sockets):
            break  # a message is lost: nothing more will arrive
        if time.monotonic() - asked < seconds / 10:
            portion = min(largest, portion * 2)
    clients.wait_received(before + sent * sockets)
    elapsed = clients.last_arrival - start
    return Measure(sent, clients.received - before, elapsed, target.cpu() - cpu)


def one_at_a_time(target: Target, clients: Crowd, *, size: int, seconds: float) -> Measure:
    """Each message alone: it is sent long after the one before it has arrived."""
    sockets = clients.plan.sockets
    gap = 3 + sockets * 0.02 + sockets * size / 1e6
    count = max(20, int(seconds * 1000 / gap))
    before, cpu, start = clients.received, target.cpu(), time.monotonic()
    target.ask(f"/publish?count={count}&batch=1&size={size}&gap={gap:.3f}")
    clients.wait_received(before + count * sockets)
    elapsed = clients.last_arrival - start
    return Measure(count, clients.received - before, elapsed, target.cpu() - cpu)
